"""Forms of a trained model for use: folded, ONNX, torch.export, half precision.

Only folding is imported here; `forms` and `auto` load what they need when they run.
"""
from .fold import FoldReport, fold

__all__ = ['FoldReport', 'fold']
