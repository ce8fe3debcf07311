r"""`python sample.py PROMPT` draws pictures; what it does is in ddpm/__main__.py, for `python -m ddpm`."""

import sys

from ddpm.__main__ import main
from ddpm.tools.command import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main))
