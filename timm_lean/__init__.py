"""timm-lean: smaller convolutional networks for timm and MMDetection.

Importing this package registers its models with timm.
"""
from . import models, pruning, sharing  # what registers models or recipe steps
from .calibration import Calibration, calibrate
from .checkpoint.format import load_model, save_hf_dir, save_model
from .errors import CheckpointError, LeanError, OutputError
from .export.rounding import round_weights
from .pruning import compact, keep_zeros, prune_channels, prune_kernels, remove_blocks
from .regularizers import create_regularizer
from .search import compress
from .sharing import fold, share
from .version import __version__

__all__ = [
    'Calibration', 'CheckpointError', 'LeanError', 'OutputError', '__version__', 'calibrate', 'compact', 'compress',
    'create_regularizer', 'fold', 'keep_zeros', 'load_model', 'models', 'prune_channels', 'prune_kernels', 'pruning',
    'remove_blocks', 'round_weights', 'save_hf_dir', 'save_model', 'share', 'sharing',
]
