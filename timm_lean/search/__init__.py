"""`compress`: the search for a target over all techniques."""
from .report import Candidate, CompressReport
from .search import compress, reachable
from .target import TargetError

__all__ = ['Candidate', 'CompressReport', 'TargetError', 'compress', 'reachable']
