"""Writes the report of runs, a comparison or a table: `xkd-jax report runs/quickstart`."""

from collections.abc import Sequence
from pathlib import Path

from xkd_jax.cli.command import Parser, guard

_EXAMPLES = """\
Writes report.md and report.html, a page that needs no network, with curves.png and the pictures of
xkd-jax analysis pictures; for a table also table.csv and gains.png. Runs that are unfinished,
damaged or of another recipe are named.

examples:
  xkd-jax report runs/quickstart
  xkd-jax report runs/few25
"""


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    parser = Parser("report", "Reports finished runs as Markdown and as an HTML page.", _EXAMPLES)
    parser.add_argument("folder", type=Path, help="the folder of a run, a comparison or a table")
    folder = parser.parse_args(argv).folder
    from xkd_jax.reporting import document, report, table_report  # `--help` needs no Matplotlib

    if not (folder / table_report.CELLS).exists():
        print(report.write(folder))
        return 0
    print(f"\n{table_report.write(folder)}\n\nreport: {folder / document.MARKDOWN}")
    print(f"page: {folder / document.PAGE}\ntable: {folder / table_report.CSV}")
    return 0
