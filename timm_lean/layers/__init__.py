from .filter_basis import FilterBasis, SharedCoefficients, init_orthonormal
from .shared_basis import SharedBasisConv2d, SharedBasisLinear

__all__ = ['FilterBasis', 'SharedBasisConv2d', 'SharedBasisLinear', 'SharedCoefficients', 'init_orthonormal']
