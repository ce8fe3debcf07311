r"""The command `python -m ddpm.evaluation`."""

import sys

from ddpm.evaluation.parts import cli, main

sys.exit(cli.exit_code(main))
