"""`python -m xkd_jax.models`: see cli/models.py."""

import sys

from xkd_jax.cli.models import main

if __name__ == "__main__":
    sys.exit(main())
