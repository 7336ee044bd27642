"""`python -m xkd_jax.bench`: see cli/bench.py."""

import sys

from xkd_jax.cli.bench import main

if __name__ == "__main__":
    sys.exit(main())
