"""The figures of reports, as PNG files and as SVG inside a page."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xkd_jax.reporting.scores import EVALUATED, MAIN
from xkd_jax.reporting.statistics import Difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Mapping[int, float]  # the main score in percent by step

_LOSSES = {"label_loss": "label term", "loss": "loss"}
_COLUMNS = 3  # panels in a row
# Without metadata, whose vocabulary is named by addresses.
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element for HTML, with a transparent background.

    Args:
      figure: any figure.
      title: what it shows, for screen readers.
    """
    import matplotlib

    file = io.StringIO()
    # Text remains text; equal figures have equal identifiers.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # HTML needs no namespaces.
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = text.replace("'DejaVu Sans', 'Bitstream Vera Sans'", "'DejaVu Sans'")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def first_key(lines: Iterable[Mapping[str, Any]], *names: str) -> str:
    """The first of `names` that any line has; the last one if none is there."""
    found = {name for line in lines for name in names if name in line}
    return next((name for name in names if name in found), names[-1])


def plot_runs(metrics: Mapping[str, Sequence[Mapping[str, Any]]], teacher: float | None) -> Figure:
    """Training loss and evaluation score of runs against the step.

    Args:
      metrics: the lines of each run's metrics.jsonl, by the run's label.
      teacher: the teacher's score on the test split, if it has one.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, score_axes = figure.subplots(1, 2, sharex=True)
    every = list(itertools.chain(*metrics.values()))
    loss = first_key(every, "label_loss", "loss")
    score = first_key(every, *EVALUATED)
    for name, lines in metrics.items():
        for axes, key, scale in (
            (loss_axes, loss, 1),
            (score_axes, score, 100),
        ):
            points = [(line["step"], scale * line[key]) for line in lines if key in line]
            # A single evaluation has no line to show.
            marker = "o" if len(points) == 1 else None
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.5, marker=marker)
    if teacher is not None:
        label = "teacher (test split)"
        score_axes.axhline(100 * teacher, color="black", linestyle="--", linewidth=1, label=label)
    loss_axes.set(xlabel="step", ylabel=f"{_LOSSES[loss]} (training)", yscale="log")
    # Plain numbers also between powers of ten, of which the default labels none.
    low, high = loss_axes.get_ylim()
    subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    loss_axes.yaxis.set_major_locator(LogLocator(subs=subs))
    loss_axes.yaxis.set_major_formatter(ScalarFormatter())
    loss_axes.yaxis.set_minor_formatter(NullFormatter())
    named = MAIN[score.removeprefix("eval_")]
    score_axes.set(xlabel="step", ylabel=f"{named} % (evaluation split)")
    for axes in (loss_axes, score_axes):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    return figure


def plot_gains(gains: Mapping[str, Difference], baseline: str, score: str) -> Figure:
    """The paired gain of each cell's `score` over `baseline`, with its 95% interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.3 * len(gains)), layout="constrained")
    axes = figure.subplots()
    rows = range(len(gains))
    means = [gain.mean for gain in gains.values()]
    halves = [0 if math.isnan(gain.high) else gain.high - gain.mean for gain in gains.values()]
    axes.axvline(0, color="black", linewidth=1)
    axes.errorbar(means, rows, xerr=halves, fmt="o", capsize=3, color="C0")
    axes.set_yticks(rows, list(gains))
    axes.set_ylim(len(gains) - 0.5, -0.5)  # the first one on top
    axes.set_xlabel(f"gain over {baseline}, percentage points of {score} (95% interval)")
    axes.grid(alpha=0.3, axis="x")
    return figure


def band(curves: Sequence[Curve]) -> tuple[list[int], list[float], list[float]]:
    """Steps at which all `curves` have a value, the means and the sample deviations there.

    The deviations are 0 for a single curve.
    """
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[curve[step] for curve in curves] for step in steps]
    deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    return steps, [statistics.mean(v) for v in values], deviations


def plot_cells(
    cells: Mapping[str, Sequence[Curve]], baselines: Mapping[str, str], score: str
) -> Figure:
    """Mean learning curves with a band of one deviation over seeds, one panel for each cell.

    Args:
      cells: the curves of each cell's runs, at least one.
      baselines: the cell that each cell's panel shows in grey, if it is among the cells.
      score: what the curves show, in words.
    """
    from matplotlib.figure import Figure

    panels = [name for name in cells if name != baselines[name]] or list(cells)
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(10, 0.5 + 2.4 * rows) if columns > 1 else (6, 4), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for name, axes in itertools.zip_longest(panels, grid):
        if name is None:
            axes.set_visible(False)
            continue
        baseline = baselines[name]
        if baseline in cells and name != baseline:
            _draw_band(axes, cells[baseline], "0.55")
        _draw_band(axes, cells[name], "C0")
        axes.set_title(name, fontsize="medium")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel(f"{score} % (evaluation split)", fontsize="medium")
    return figure


def _draw_band(axes: Axes, curves: Sequence[Curve], color: str) -> None:
    steps, means, deviations = band(curves)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, means, linewidth=1.5, marker=marker, color=color)
    low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
    high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
    axes.fill_between(steps, low, high, alpha=0.25, color=color, linewidth=0)
