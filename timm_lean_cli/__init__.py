"""The `timm-lean` command line.

It stands beside the package because importing `timm_lean` imports torch: help and usage errors answer at once.
"""
from .arguments import build_parser, main

__all__ = ['build_parser', 'main']
