"""Training and evaluation of classification models."""
from .config import PruneConfig, TrainConfig, list_configs
from .engine import Trainer, train
from .evaluate import evaluate

__all__ = ['PruneConfig', 'TrainConfig', 'Trainer', 'evaluate', 'list_configs', 'train']
