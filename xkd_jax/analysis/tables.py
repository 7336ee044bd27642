"""The tables and figures of transferability and robustness: Markdown, CSV and PNG."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xkd_jax.analysis.robustness import CLEAN, NOISY, Accuracy, means
from xkd_jax.analysis.transferability import LINEAR, PROJECTORS, Similarity
from xkd_jax.augment.common_corruptions import CORRUPTIONS, SEVERITIES
from xkd_jax.reporting.document import format_markdown
from xkd_jax.weights import write_file

_DEVIATION = "; of several seeds, mean ± standard deviation"
_COLOURS = dict(zip((LINEAR, *PROJECTORS.values()), ("C0", "C1", "C2"), strict=True))


def write_transferability(rows: list[Similarity], folder: Path) -> str:
    """Writes transferability.md, .csv and .png.

    Args:
      rows: from `transferability.measure`, of all pairs.
      folder: an existing folder.

    Returns:
      The table and the files' paths, as text.
    """
    cells: dict[tuple[str, ...], list[Similarity]] = {}
    for row in rows:
        cells.setdefault((_cell(row.name), row.kind, row.features, row.mapping), []).append(row)
    columns = "pair", "runs", "kind", "features", "map", "cosine", "centred", "mean only", "CKA"
    lines = [[*columns, "ridge"]]
    for (name, *of), runs in cells.items():
        numbers = np.array([(run.cosine, run.centred, run.constant, run.cka) for run in runs]).T
        strengths = [run.strength for run in runs if run.strength is not None]
        ends = sorted({min(strengths), max(strengths)}) if strengths else []
        ridge = " to ".join(f"{end:g}" for end in ends)
        lines.append([name, str(len(runs)), *of, *(_over_runs(each, 3) for each in numbers), ridge])
    table = format_markdown(lines)
    figure = folder / "transferability.png"
    _plot_similarities(list(cells.values()), figure)
    text = (
        f"# Transferability\n\nMean cosine similarity of mapped student features and teacher "
        f"features on test images{_DEVIATION}.\n\n{table}\n\n"
        f"![cosine similarities]({figure.name})\n"
    )
    return _write(folder / "transferability", text, Similarity._fields, rows, table)


def _cell(name: str) -> str:
    """The name of a run without its seed, if it is one of a table's cell."""
    return re.sub(r"/seed\d+$", "", name)


def _over_runs(values: Sequence[float], digits: int) -> str:
    """The mean, and the sample standard deviation if there are several values."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def write_robustness(rows: list[Accuracy], folder: Path) -> str:
    """Writes robustness.md, .csv and .png.

    Args:
      rows: from `robustness.measure`.
      folder: an existing folder.

    Returns:
      The summary and the files' paths, as text.
    """
    cells: dict[str, list[str]] = {}
    for model in dict.fromkeys(row.model for row in rows):
        cells.setdefault(_cell(model), []).append(model)
    top1 = {(row.model, row.corruption, row.severity): 100 * row.top1 for row in rows}
    summary = _summary(rows, cells)
    parts = [f"# Robustness\n\nTop-1 % on corrupted test images{_DEVIATION}.\n\n{summary}"]
    for cell, models in cells.items():
        lines = [[cell, *(f"severity {severity}" for severity in SEVERITIES), "mean"]]
        for corruption in _corrupted(means(rows, models[0])):
            table = np.array([[top1[m, corruption, s] for s in SEVERITIES] for m in models])
            columns = (*table.T, table.mean(axis=1))
            lines.append([corruption, *(_over_runs(values, 2) for values in columns)])
        parts.append(format_markdown(lines))
    figure = folder / "robustness.png"
    _plot_accuracies(rows, cells, figure)
    text = "\n\n".join([*parts, f"![accuracy by corruption]({figure.name})\n"])
    return _write(folder / "robustness", text, Accuracy._fields, rows, summary)


def _summary(rows: list[Accuracy], cells: dict[str, list[str]]) -> str:
    """One line for each cell: clean, noisy, the mean of each group of corruptions and of all."""
    lines: list[list[str]] = []
    for cell, models in cells.items():
        columns: dict[str, list[float]] = {}
        for model in models:
            of = means(rows, model)
            corrupted = _corrupted(of)
            groups = {CLEAN: [of[CLEAN]], NOISY: [of[NOISY]]}
            for name, value in corrupted.items():
                groups.setdefault(CORRUPTIONS[name].group, []).append(value)
            groups["mean"] = list(corrupted.values())
            for name, values in groups.items():
                columns.setdefault(name, []).append(100 * float(np.mean(values)))
        lines = lines or [["", "runs", *columns]]
        numbers = (_over_runs(values, 2) for values in columns.values())
        lines.append([cell, str(len(models)), *numbers])
    return format_markdown(lines)


def _corrupted(of: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in of.items() if name in CORRUPTIONS}


def _write(
    path: Path, text: str, header: Iterable[str], rows: Iterable[Iterable[Any]], shown: str
) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([header, *rows])
    write_file(path.with_suffix(".csv"), file.getvalue().encode())
    write_file(path.with_suffix(".md"), text.encode())
    return f"\n{shown}\n\nreport: {path.with_suffix('.md')}\nfigure: {path.with_suffix('.png')}"


def _plot_similarities(cells: list[list[Similarity]], path: Path) -> None:
    """Bars as in Fig. 1(b) and 3(b): a panel for each kind of features, a bar for each map.

    Args:
      cells: the rows of the same measurement, one for each seed.
      path: of the picture.
    """
    from matplotlib.figure import Figure

    panels = {"image (pooled)": [cell for cell in cells if cell[0].features == "pooled"]}
    panels["token"] = [cell for cell in cells if cell[0].features != "pooled"]
    widest = max(map(len, panels.values()))
    figure = Figure(figsize=(max(6.0, 2 + 0.9 * widest), 8), layout="constrained")
    for axes, (title, shown) in zip(figure.subplots(2, 1), panels.items(), strict=True):
        shown.sort(key=lambda cell: cell[0].kind)  # stable: homologous pairs are adjacent
        for place, cell in enumerate(shown):
            values = [row.cosine for row in cell]
            error = np.std(values, ddof=1) if len(values) > 1 else None
            bars = axes.bar(place, np.mean(values), yerr=error, color=_COLOURS[cell[0].mapping])
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
            mean = np.mean([row.constant for row in cell])
            axes.hlines(mean, place - 0.4, place + 0.4, color="black", linestyles="dotted")
        labels = [f"{cell[0].kind}\n{_cell(cell[0].name)}" for cell in shown]
        axes.set_xticks(range(len(shown)), labels, fontsize=7)
        axes.set(title=f"per {title}", ylabel="cosine similarity")
    used = {cell[0].mapping: _COLOURS[cell[0].mapping] for cell in cells}
    handles = [figure.axes[1].bar(0, 0, color=colour, label=name) for name, colour in used.items()]
    line = figure.axes[1].plot([], [], "k:", label="the teacher's mean, whatever the image")
    figure.legend(handles=[*handles, *line], loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def _plot_accuracies(rows: list[Accuracy], cells: dict[str, list[str]], path: Path) -> None:
    """The mean accuracy over severities and seeds: a group of bars for each corruption."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(cells)
    names: list[str] = []
    for number, (cell, models) in enumerate(cells.items()):
        of_models = [means(rows, model) for model in models]
        names = list(of_models[0])
        places = np.arange(len(names)) + (number - (len(cells) - 1) / 2) * width
        values = [100 * np.mean([of[name] for of in of_models]) for name in names]
        axes.bar(places, values, width, label=cell)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=7)
    axes.set(ylabel="top-1 %, mean over severities")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)
