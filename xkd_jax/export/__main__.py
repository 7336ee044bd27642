"""`python -m xkd_jax.export`: see cli/export.py."""

import sys

from xkd_jax.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
