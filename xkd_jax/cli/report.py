"""Writes report.md and curves.png from finished run folders: `xkd-jax report runs/quickstart`."""

from collections.abc import Sequence
from pathlib import Path

from xkd_jax.cli.command import Parser, guard

_EXAMPLES = """\
example:
  xkd-jax report runs/quickstart
"""


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    parser = Parser("report", "Writes report.md and curves.png from finished runs.", _EXAMPLES)
    parser.add_argument("folder", type=Path, help="a run's folder, or one that contains several")
    options = parser.parse_args(argv)
    from xkd_jax.reporting.report import write  # `--help` needs no JAX

    print(write(options.folder))
    return 0
