from .shared_basis import FilterBasis, SharedBasisConv2d, init_orthonormal

__all__ = ['FilterBasis', 'SharedBasisConv2d', 'init_orthonormal']
