"""Writes report.md and curves.png from finished run folders.

python -m xkd_jax.report runs/quickstart
"""

import argparse
import sys
from pathlib import Path

from xkd_jax.errors import UserError
from xkd_jax.reporting.report import write


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m xkd_jax.report",
        description="Writes report.md and curves.png from finished run folders.",
        epilog="example: python -m xkd_jax.report runs/quickstart",
    )
    parser.add_argument("folder", type=Path, help="a run's folder, or one that holds several")
    try:
        print(write(parser.parse_args().folder))
    except UserError as error:
        print(f"xkd_jax: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
