"""Calibration: a compressed network's weights chosen anew from a few hundred unlabelled images, nothing trained.

Front to back, each layer gets the weights with which, on the *compressed* network's inputs, it comes nearest to what
the *original's* layer gives (`calibrate`). That is least squares on second moments (`moments`, `solver`); the basis
that layers share is fitted to all of them (`groups`, `shared`); the last layer of a residual branch aims at the sum
that the branch ends in (`walk`). Batch norm statistics are measured anew where that helps (`batchnorm`).
"""
from .batchnorm import insert_norms
from .calibrate import calibrate
from .groups import LARGEST
from .inputs import group_covariances, input_covariances, output_scores
from .outputs import output_errors
from .report import CalibrationReport, LayerFit
from .settings import Calibration
from .shared import whitened

__all__ = [
    'LARGEST', 'Calibration', 'CalibrationReport', 'LayerFit', 'calibrate', 'group_covariances', 'input_covariances',
    'insert_norms', 'output_errors', 'output_scores', 'whitened']
