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
    parser.add_argument("folder", type=Path, help="the folder of a run, a comparison or a table")
    options = parser.parse_args(argv)
    from xkd_jax.reporting import report, table_report  # `--help` needs no JAX

    is_table = (options.folder / table_report.CELLS).exists()
    print(table_report.write(options.folder) if is_table else report.write(options.folder))
    return 0
