"""`python -m timm_lean_cli`."""
import sys

from . import main

sys.exit(main())
