"""Training and evaluation of classification models."""
from .config import TrainConfig, list_recipes
from .engine import Trainer, train
from .evaluate import evaluate

__all__ = ['TrainConfig', 'Trainer', 'evaluate', 'list_recipes', 'train']
