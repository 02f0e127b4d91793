"""`compress`: the search for a target over all techniques."""
from .search import compress, reachable
from .report import Candidate, CompressReport
from .target import TargetError

__all__ = ['Candidate', 'CompressReport', 'TargetError', 'compress', 'reachable']
