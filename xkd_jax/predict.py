"""`python -m xkd_jax.predict`: see cli/predict.py."""

import sys

from xkd_jax.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())
