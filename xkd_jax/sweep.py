"""`python -m xkd_jax.sweep`: see cli/sweep.py."""

import sys

from xkd_jax.cli.sweep import main

if __name__ == "__main__":
    sys.exit(main())
