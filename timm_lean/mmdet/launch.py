"""Training and evaluation of a detector by its config: MMEngine's Runner behind checks.

Before a Runner is built the config and its data are looked at, so that a mistake is one line and not a traceback from
a dataset. On a machine without a GPU, AMP is left out (MMEngine has none there) and processes talk through gloo.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from mmdet.evaluation import DumpDetResults
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner, find_latest_checkpoint

from timm_lean.checkpoint.files import output_file
from timm_lean.errors import LeanError

from .adopt import adopt_structure
from .checks import registry_errors
from .data import datasets
from .detector import WEIGHTS_FILE, load_detector, load_strictly
from .fit_machine import prepare
from .hooks import unwrap
from .own_data import settle_data
from .settings import open_config

__all__ = ['prepare', 'test_detector', 'train_detector']

_NO_WINDOWS = ('agg', 'cairo', 'pdf', 'pgf', 'ps', 'svg', 'template')  # backends of matplotlib


def train_detector(
        config: str,
        *,
        resume: str | None = None,
        amp: bool = False,
        auto_scale_lr: bool = False,
        **kwargs: Any,
) -> None:
    """Train a detector.

    Args:
        config: A config file, or 'mmdet::...' or 'timm_lean::...'.
        resume: Continue from this checkpoint; 'auto' for the latest one in the work dir.
        amp: Mixed precision.
        auto_scale_lr: Scale the learning rate with the batch size.
        **kwargs: What `_settle` sets in the config.

    Raises:
        LeanError: The config, an option or the data is wrong.
    """
    if resume not in (None, 'auto'):
        _check_exists(resume)
    cfg = _settle(open_config(config), config, **kwargs)
    if amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise LeanError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config.')
        cfg.auto_scale_lr.enable = True
    sources = [cfg.get('load_from')]
    if resume is not None:
        sources.insert(0, find_latest_checkpoint(cfg.work_dir) if resume == 'auto' else resume)
        cfg.resume = True
        cfg.load_from = None if resume == 'auto' else resume
    for source in filter(None, sources):
        adopt_structure(cfg, source)
    prepare(cfg, ('train', 'val'))
    with registry_errors():
        runner = Runner.from_cfg(cfg)
    if cfg.get('load_from'):
        # MMEngine loads it again, and only warns about what does not fit; heads may be others, the backbone not
        load_strictly(unwrap(runner.model), cfg.load_from, part='' if cfg.get('resume') else 'backbone.')
    with registry_errors():
        runner.train()


def test_detector(
        checkpoint: str,
        config: str | None = None,
        *,
        out: str | None = None,
        show: bool = False,
        show_dir: str | None = None,
        wait_time: float = 2.,
        tta: bool = False,
        trust_imports: Sequence[str] = (),
        **kwargs: Any,
) -> None:
    """Evaluate a detector.

    Args:
        checkpoint: A .safetensors or .pth file, or the folder of an exported detector.
        config: Its config; the one in the checkpoint if None.
        out: Write the predictions to this .pkl file.
        show: Show pictures of the predictions in a window.
        show_dir: Write pictures of the predictions there.
        wait_time: Seconds for which `show` shows each.
        tta: Test-time augmentation, by the config's tta_model and tta_pipeline or by flipping.
        trust_imports: For a config from the checkpoint, see `load_detector`.
        **kwargs: What `_settle` sets in the config.

    Raises:
        LeanError: The config, an option, the checkpoint or the data is wrong.
    """
    out_file = output_file(out, '.pkl', '--out') if out else None
    if not wait_time >= 0:
        raise LeanError(f'--wait-time takes seconds of at least 0, got {wait_time}.')
    if show:
        _check_display()
    _check_exists(checkpoint)
    path = Path(checkpoint)
    if config is None:
        cfg = _settle(_stored_config(path, trust_imports), checkpoint, **kwargs)
    else:
        cfg = _settle(open_config(config), config, **kwargs)
        adopt_structure(cfg, path / WEIGHTS_FILE if path.is_dir() else path)
    cfg.load_from, cfg.resume = None, False
    prepare(cfg, ('test',))
    if show or show_dir:
        cfg.setdefault('default_hooks', {})
        cfg.default_hooks['visualization'] = dict(
            type='DetVisualizationHook', draw=True, show=show, wait_time=wait_time,
            test_out_dir=str(Path(show_dir).absolute()) if show_dir else None)
        if not cfg.get('visualizer'):  # a file says none, for it says where to write
            cfg.visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
        # the hook draws by the visualizer made last, and a name that an earlier run in this process used makes none
        cfg.visualizer.name = f'test_{uuid4().hex}'
    if tta:
        _augment(cfg)
    with registry_errors():
        runner = Runner.from_cfg(cfg)
    detector = unwrap(runner.model)
    load_strictly(
        detector.module if tta else detector,  # type: ignore[arg-type]
        path / WEIGHTS_FILE if path.is_dir() else path)
    if out_file is not None:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=str(out_file)))
    with registry_errors():
        runner.test()


def _check_exists(checkpoint: str) -> None:
    """Now, not when the run has been set up; what MMEngine loads from elsewhere is left to it."""
    if '://' not in checkpoint and not Path(checkpoint).exists():
        raise LeanError(f'The checkpoint {checkpoint} does not exist.')


def _check_display() -> None:
    """MMEngine shows pictures by matplotlib, which without a display waits for each and shows nothing."""
    import matplotlib
    backend = matplotlib.get_backend()
    if backend.lower() in _NO_WINDOWS:
        raise LeanError(f'--show needs a display, and matplotlib finds none here (its backend is {backend}). Write the '
                        'pictures to a folder by --show-dir DIR.')


def _stored_config(source: Path, trust_imports: Sequence[str]) -> Config:
    """The config in a detector's file or folder, for an evaluation; where to write is not the file's to say.

    Raises:
        LeanError: It does not say which detector it holds, or cannot be loaded.
    """
    if source.suffix != '.safetensors' and not source.is_dir():
        raise LeanError(f'{source} does not say which detector it holds. Give its config: CONFIG {source}.')
    detector: Any = load_detector(source, trust_imports=trust_imports)  # says what is wrong with it
    cfg: Config = detector.cfg
    for key in ('work_dir', 'default_hooks', 'custom_hooks', 'vis_backends'):
        cfg.pop(key, None)
    cfg.visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
    evaluators = cfg.get('test_evaluator')
    for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        if isinstance(evaluator, dict):
            evaluator.pop('outfile_prefix', None)
    return cfg


def _augment(cfg: Config) -> None:
    """Test-time augmentation as in MMDetection's `tools/test.py`: the config's own, else by flipping, in place."""
    cfg.setdefault('tta_model', dict(
        type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)))
    for dataset in datasets(cfg.test_dataloader.dataset):
        if 'tta_pipeline' not in cfg:
            meta_keys = (
                'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
            flips = [dict(type='RandomFlip', prob=1.), dict(type='RandomFlip', prob=0.)]
            cfg.tta_pipeline = [*dataset.pipeline[:-1], dict(
                type='TestTimeAug', transforms=[flips, [dict(type='PackDetInputs', meta_keys=meta_keys)]])]
        dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def _settle(
        cfg: Config,
        name: str,
        *,
        work_dir: str | None = None,
        data_root: str | None = None,
        classes: Sequence[str] | None = None,
        cfg_options: dict[str, Any] | None = None,
        launcher: str = 'none',
) -> Config:
    """Set in a config what was given.

    Args:
        cfg: The config, changed in place.
        name: Where it comes from.
        work_dir: Folder of the run; `work_dirs/` and the config's name if neither this nor the config says.
        data_root: The dataset's folder, instead of the config's.
        classes: The data's classes, instead of the config's; those in the annotations if empty.
        cfg_options: Settings by their dotted names.
        launcher: How several processes were started: none, pytorch, slurm or mpi.
    """
    cfg.launcher = launcher
    if 'model' not in cfg:
        raise LeanError(f'{name} has no model.')
    settle_data(cfg, data_root, classes)
    if cfg_options:
        try:
            cfg.merge_from_dict(cfg_options)
        except (KeyError, TypeError, IndexError) as e:
            raise LeanError(f'--cfg-options do not fit the config: {e}') from e
    if work_dir:
        cfg.work_dir = work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = str(Path('work_dirs') / Path(name).stem)
    return cfg
