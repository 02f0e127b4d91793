"""`python -m timm_lean.mmdet`: a door to `timm_lean_cli.detectors`, which it runs as a program; no room uses a command.

Worker processes started by spawn import this file too, and with it the plugin.
"""
import runpy

import timm_lean.mmdet  # noqa: F401

if __name__ == '__main__':
    runpy.run_module('timm_lean_cli.detectors', run_name='__main__')
