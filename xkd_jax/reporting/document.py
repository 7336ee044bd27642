"""A report as blocks, written as Markdown and as an HTML page.

The page is self-contained: its figures are inline SVG or PNG, and it needs neither scripts nor a
network.
"""

import base64
import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from xkd_jax.reporting import figures
from xkd_jax.reporting.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKDOWN = "report.md"
PAGE = "report.html"

Lines = Sequence[Sequence[str]]  # a table of text; the first line is the header
_LONG = 40  # characters of a cell that is wrapped

_STYLE = """
:root { color-scheme: light dark; --line: #d0d4da; --quiet: #5b6470; --head: #f2f4f7; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93em; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; }
th { background: var(--head); vertical-align: bottom; }
td { white-space: nowrap; }
td.long { white-space: normal; text-align: left; min-width: 16rem; }
th:first-child, td:first-child { text-align: left; }
tr.best { font-weight: 600; }
.notes { color: var(--quiet); font-size: .87rem; }
.notes p { margin: .3rem 0; }
figure { margin: 1rem 0; }
figure svg, figure img { max-width: 100%; height: auto; }
figcaption { color: var(--quiet); font-size: .87rem; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d434b; --quiet: #9aa4b1; --head: #23272d; }
  body { background: #16191d; color: #e3e6ea; }
  figure svg { filter: invert(1) hue-rotate(180deg); }
}
""".strip()


class Block(Protocol):
    """A part of a report."""

    def markdown(self) -> str:
        """As Markdown."""
        ...

    def html(self) -> str:
        """As HTML."""
        ...


@dataclasses.dataclass(frozen=True)
class Heading:
    """A section's heading."""

    text: str

    def markdown(self) -> str:
        """As Markdown."""
        return f"## {self.text}"

    def html(self) -> str:
        """As HTML."""
        return f"<h2>{html.escape(self.text)}</h2>"


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """A paragraph."""

    text: str

    def markdown(self) -> str:
        """As Markdown."""
        return self.text

    def html(self) -> str:
        """As HTML."""
        return f"<p>{html.escape(self.text)}</p>"


@dataclasses.dataclass(frozen=True)
class Items:
    """A list; in small print if it explains a table."""

    texts: Sequence[str]
    small: bool = False

    def markdown(self) -> str:
        """As Markdown."""
        return "\n".join(f"- {text}" for text in self.texts)

    def html(self) -> str:
        """As HTML."""
        escaped = [html.escape(text) for text in self.texts]
        if self.small:
            lines = "\n".join(f"<p>{text}</p>" for text in escaped)
            return f'<div class="notes">\n{lines}\n</div>'
        lines = "\n".join(f"<li>{text}</li>" for text in escaped)
        return f"<ul>\n{lines}\n</ul>"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text, with numbers aligned to the right.

    Attributes:
      lines: the header, then the rows.
      best: the row that the page emphasises, counted from 0 below the header.
    """

    lines: Lines
    best: int | None = None

    def markdown(self) -> str:
        """As Markdown."""
        return format_markdown(self.lines)

    def html(self) -> str:
        """As HTML."""

        def row(cells: Sequence[str], tag: str, kind: str = "") -> str:
            return f"<tr{kind}>{''.join(fill(cell, tag) for cell in cells)}</tr>"

        def fill(cell: str, tag: str) -> str:
            long = ' class="long"' if len(cell) > _LONG else ""
            return f"<{tag}{long}>{html.escape(cell)}</{tag}>"

        header, *rows = self.lines
        kinds = (' class="best"' if index == self.best else "" for index in range(len(rows)))
        body = "\n".join(row(cells, "td", kind) for cells, kind in zip(rows, kinds, strict=True))
        return (
            f'<div class="scroll"><table>\n<thead>\n{row(header, "th")}\n</thead>\n'
            f"<tbody>\n{body}\n</tbody>\n</table></div>"
        )


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
      figure: Matplotlib's figure.
      file: name of the PNG file that Markdown shows.
      title: what it shows.
    """

    figure: "Figure"
    file: str
    title: str

    def markdown(self) -> str:
        """As Markdown."""
        return f"![{self.title}]({self.file})"

    def html(self) -> str:
        """As HTML."""
        return f"<figure>\n{figures.to_svg(self.figure, self.title)}\n</figure>"


@dataclasses.dataclass(frozen=True)
class Image:
    """A PNG file, which the page contains.

    Attributes:
      path: of the file.
      file: its path relative to the report, which Markdown shows.
      caption: what it shows.
    """

    path: Path
    file: str
    caption: str

    def markdown(self) -> str:
        """As Markdown."""
        return f"![{self.path.stem}]({self.file})\n\n{self.caption}"

    def html(self) -> str:
        """As HTML."""
        data = base64.b64encode(self.path.read_bytes()).decode()
        return (
            f'<figure>\n<img alt="{html.escape(self.path.stem)}" '
            f'src="data:image/png;base64,{data}">\n'
            f"<figcaption>{html.escape(self.caption)}</figcaption>\n</figure>"
        )


def write_document(folder: Path, title: str, blocks: Sequence[Block]) -> None:
    """Writes report.md, report.html and the PNG files of figures into `folder`."""
    for block in blocks:
        if isinstance(block, Picture):
            write_file(folder / block.file, figures.to_png(block.figure))
    text = "\n\n".join([f"# {title}", *(block.markdown() for block in blocks)])
    write_file(folder / MARKDOWN, f"{text}\n".encode())
    title, body = html.escape(title), "\n".join(block.html() for block in blocks)
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )
    write_file(folder / PAGE, page.encode())


def format_markdown(lines: Lines) -> str:
    """A Markdown table with aligned columns; the first line is the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]

    def row(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return f"| {' | '.join([first, *rest])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([row(lines[0]), row(rule), *map(row, lines[1:])])


def drop_empty(lines: Lines) -> list[list[str]]:
    """A table without the columns that are empty below the header, except for the first one."""
    columns = list(zip(*lines, strict=True))
    kept = [column for index, column in enumerate(columns) if index == 0 or any(column[1:])]
    return [list(line) for line in zip(*kept, strict=True)]
