"""`python -m xkd_jax`: the command `xkd-jax`; see cli/verbs.py."""

import sys

from xkd_jax.cli.verbs import main

if __name__ == "__main__":
    sys.exit(main())
