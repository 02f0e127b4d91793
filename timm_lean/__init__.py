"""timm-lean: smaller convolutional networks for timm and MMDetection.

Importing this package registers its models with timm.
"""
from . import models
from .checkpoint import load_model, save_model
from .errors import CheckpointError, LeanError
from .export import fold
from .regularizers import create_regularizer
from .sharing import share
from .version import __version__

__all__ = [
    'CheckpointError', 'LeanError', '__version__', 'create_regularizer', 'fold', 'load_model', 'models', 'save_model',
    'share',
]
