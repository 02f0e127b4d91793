"""`compress`: the search for a target over all techniques."""
from .outlook import Outlook
from .report import Candidate, CompressReport
from .search import compress, reachable
from .target import TargetError

__all__ = ['Candidate', 'CompressReport', 'Outlook', 'TargetError', 'compress', 'reachable']
