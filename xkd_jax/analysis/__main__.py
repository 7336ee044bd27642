"""`python -m xkd_jax.analysis`: see cli/analysis.py."""

import sys

from xkd_jax.cli.analysis import main

if __name__ == "__main__":
    sys.exit(main())
