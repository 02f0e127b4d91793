"""The `timm-lean` command line: a file per command, with its arguments and what it runs.

It stands beside the package because importing `timm_lean` imports torch, which is done when a command runs: help and
usage errors answer at once.
"""
from .app import build_parser, main

__all__ = ['build_parser', 'main']
