"""`python -m xkd_jax.prepare`: see cli/prepare.py."""

import sys

from xkd_jax.cli.prepare import main

if __name__ == "__main__":
    sys.exit(main())
