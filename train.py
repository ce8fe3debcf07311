r"""`python train.py` trains a model; what it does is in ddpm/training/__main__.py, for `python -m ddpm.training`."""

import sys

from ddpm.tools.command import exit_code
from ddpm.training.__main__ import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
