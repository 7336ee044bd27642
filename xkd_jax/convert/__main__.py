"""`python -m xkd_jax.convert`: see cli/convert.py."""

import sys

from xkd_jax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
