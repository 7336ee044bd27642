"""`python -m xkd_jax.main`: `xkd-jax train`; see cli/train.py."""

import sys

from xkd_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
