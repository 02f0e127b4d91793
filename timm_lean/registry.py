"""MMEngine's door to this package: for a type `timm_lean.NAME` it imports `timm_lean.registry` and looks there.

Nothing else imports this file; it needs the extra `mmdet`.
"""
from .mmdet.scope import DATASETS, HOOKS, MODELS

__all__ = ['DATASETS', 'HOOKS', 'MODELS']
