"""Conversion of a trained network to shared filter bases, from its own weights.

Layers of one shape in one stage (`groups`, `kinds`) share a factor of their weights. By rows their weights are stacked
as rows `[layers * out, d]`: the leading right-singular vectors are an exactly orthonormal basis and the projections on
them the coefficients (Eckart-Young: no other basis of that rank keeps more of the weights' squared norm). By columns
the coefficients are shared and each layer has its own filters. What a rank keeps (`spectra`) is of the weights or, with
images, of the layers' outputs; how much each group gets is given or chosen by it (`ranks`). Unique filters are each
layer's leading residual directions. At full rank the network is the original in training mode too, as nothing is put
between basis and coefficients; a batch norm there is optional (`calibration`).

The idea of the basis: https://arxiv.org/abs/2006.05066 (Kang & Kim, NeurIPS 2021), which trains it from scratch.
"""
from .convert import share, shareable_range
from .fold import FoldReport, fold
from .report import LayerShare, ShareReport

__all__ = ['FoldReport', 'LayerShare', 'ShareReport', 'fold', 'share', 'shareable_range']
