"""MMDetection with this package's techniques: everything that knows mmengine or mmdet.

Importing it makes MMDetection work without compiled mmcv (`mmcv_ext`), mends what time has broken (`compat`),
registers the backbone, hooks, dataset and checkpoint loader, and lets `in_channels='auto'` and `lean_steps` work.
Import it before `mmcv.ops`.
"""
import importlib.util

from timm_lean.errors import PackageMissingError

_MISSING = [name for name in ('mmengine', 'mmcv', 'mmdet') if importlib.util.find_spec(name) is None]
if _MISSING:
    raise PackageMissingError(
        f'{", ".join(_MISSING)} {"is" if len(_MISSING) == 1 else "are"} not installed. MMDetection support comes with '
        "the extra 'mmdet': pip install 'timm-lean[mmdet]'.")

from timm_lean import mmcv_ext  # noqa: E402

from . import compat  # noqa: E402

mmcv_ext.install()
compat.apply()

from mmdet.registry import MODELS as MMDET_MODELS  # noqa: E402

from . import channels, configs, structure  # noqa: E402

channels.install(MMDET_MODELS)
structure.install(MMDET_MODELS)
configs.install()

from .backbone import TimmBackbone  # noqa: E402
from .channels import resolve_channels  # noqa: E402
from .detector import export_detector, load_detector, open_detector, write_detector  # noqa: E402
from .hooks import RegularizerHook, SafetensorsHook  # noqa: E402
from .predict import predict_images  # noqa: E402
from .pruning_hook import KernelPruningHook  # noqa: E402
from .runs import calibration_images  # noqa: E402
from .scenes import DigitScenes, write_scenes  # noqa: E402
from .scoring import average_precision  # noqa: E402
from .structure_hooks import ChannelPruningHook, ShareHook  # noqa: E402
from .verbs import lean_detector  # noqa: E402

__all__ = [
    'ChannelPruningHook', 'DigitScenes', 'KernelPruningHook', 'RegularizerHook', 'SafetensorsHook', 'ShareHook',
    'TimmBackbone', 'average_precision', 'calibration_images', 'export_detector', 'lean_detector', 'load_detector',
    'open_detector', 'predict_images', 'resolve_channels', 'write_detector', 'write_scenes',
]
