"""`python -m timm_lean`: the same as the console script `timm-lean`."""
import sys

from timm_lean_cli import main

sys.exit(main())
