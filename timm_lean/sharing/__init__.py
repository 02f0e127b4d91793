"""Conversion of a trained network to shared filter bases, from its own weights.

The convolutions of one shape in one stage are stacked as rows `[layers * out, in * k * k]` (`groups`). The leading
right-singular vectors are an exactly orthonormal basis and the projections on them the coefficients (`convert`;
Eckart-Young: no other basis of that rank keeps more of the weights' squared norm). How many filters each group gets is
given or chosen by its singular values (`ranks`). Unique filters are each layer's leading residual directions. At full
rank the network is the original in training mode too, as nothing is put between basis and coefficients; a batch norm
there is optional (`calibration`).

The idea of the basis: https://arxiv.org/abs/2006.05066 (Kang & Kim, NeurIPS 2021), which trains it from scratch.
"""
from .convert import share
from .fold import FoldReport, fold
from .report import LayerShare, ShareReport

__all__ = ['FoldReport', 'LayerShare', 'ShareReport', 'fold', 'share']
