"""`python -m xkd_jax.report`: see cli/report.py."""

import sys

from xkd_jax.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
