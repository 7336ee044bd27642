"""The tables and figures of transferability and robustness: Markdown, CSV and PNG."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from xkd_jax.analysis.robustness import CLEAN, NOISY, Accuracy, means
from xkd_jax.analysis.transferability import LINEAR, PROJECTORS, Similarity
from xkd_jax.augment.common_corruptions import CORRUPTIONS, SEVERITIES
from xkd_jax.reporting.document import format_markdown
from xkd_jax.weights import write_file

_COLOURS = dict(zip((LINEAR, *PROJECTORS.values()), ("C0", "C1", "C2"), strict=True))


def write_transferability(rows: list[Similarity], folder: Path) -> str:
    """Writes transferability.md, .csv and .png.

    Args:
      rows: from `transferability.measure`, of all pairs.
      folder: an existing folder.

    Returns:
      The table and the files' paths, as text.
    """
    lines = [["pair", "kind", "features", "map", "cosine", "centred", "mean only", "CKA", "ridge"]]
    for row in rows:
        numbers = [f"{v:.3f}" for v in (row.cosine, row.centred, row.constant, row.cka)]
        strength = "" if row.strength is None else f"{row.strength:g}"
        lines.append([row.name, row.kind, row.features, row.mapping, *numbers, strength])
    table = format_markdown(lines)
    figure = folder / "transferability.png"
    _plot_similarities(rows, figure)
    text = (
        f"# Transferability\n\nMean cosine similarity of mapped student features and teacher "
        f"features on test images.\n\n{table}\n\n![cosine similarities]({figure.name})\n"
    )
    return _write(folder / "transferability", text, Similarity._fields, rows, table)


def write_robustness(rows: list[Accuracy], folder: Path) -> str:
    """Writes robustness.md, .csv and .png.

    Args:
      rows: from `robustness.measure`.
      folder: an existing folder.

    Returns:
      The summary and the files' paths, as text.
    """
    models = list(dict.fromkeys(row.model for row in rows))
    summary = _summary(rows, models)
    parts = [f"# Robustness\n\nTop-1 % on corrupted test images.\n\n{summary}"]
    for model in models:
        lines = [[model, *(f"severity {severity}" for severity in SEVERITIES), "mean"]]
        for corruption, mean in _corrupted(means(rows, model)).items():
            of_model = [row for row in rows if (row.model, row.corruption) == (model, corruption)]
            severities = {row.severity: row.top1 for row in of_model}
            values = [*(severities[severity] for severity in SEVERITIES), mean]
            lines.append([corruption, *(f"{100 * value:.2f}" for value in values)])
        parts.append(format_markdown(lines))
    figure = folder / "robustness.png"
    _plot_accuracies(rows, models, figure)
    text = "\n\n".join([*parts, f"![accuracy by corruption]({figure.name})\n"])
    return _write(folder / "robustness", text, Accuracy._fields, rows, summary)


def _summary(rows: list[Accuracy], models: list[str]) -> str:
    """One line for each model: clean, noisy, the mean of each group of corruptions and of all."""
    lines: list[list[str]] = []
    for model in models:
        of = means(rows, model)
        corrupted = _corrupted(of)
        columns = {CLEAN: of[CLEAN], NOISY: of[NOISY]}
        for group in dict.fromkeys(CORRUPTIONS[name].group for name in corrupted):
            inside = [v for name, v in corrupted.items() if CORRUPTIONS[name].group == group]
            columns[group] = float(np.mean(inside))
        columns["mean"] = float(np.mean(list(corrupted.values())))
        lines = lines or [["", *columns]]
        lines.append([model, *(f"{100 * value:.2f}" for value in columns.values())])
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


def _plot_similarities(rows: list[Similarity], path: Path) -> None:
    """Bars as in Fig. 1(b) and 3(b): a panel for each kind of features, a bar for each map."""
    from matplotlib.figure import Figure

    panels = {"image (pooled)": [row for row in rows if row.features == "pooled"]}
    panels["token"] = [row for row in rows if row.features != "pooled"]
    widest = max(map(len, panels.values()))
    figure = Figure(figsize=(max(6.0, 2 + 0.9 * widest), 8), layout="constrained")
    for axes, (title, shown) in zip(figure.subplots(2, 1), panels.items(), strict=True):
        shown.sort(key=lambda row: row.kind)  # stable: homologous pairs are adjacent
        for place, row in enumerate(shown):
            bars = axes.bar(place, row.cosine, color=_COLOURS[row.mapping])
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
            axes.hlines(row.constant, place - 0.4, place + 0.4, color="black", linestyles="dotted")
        labels = [f"{row.kind}\n{row.name}" for row in shown]
        axes.set_xticks(range(len(shown)), labels, fontsize=7)
        axes.set(title=f"per {title}", ylabel="cosine similarity")
    used = {row.mapping: _COLOURS[row.mapping] for row in rows}
    handles = [figure.axes[1].bar(0, 0, color=colour, label=name) for name, colour in used.items()]
    line = figure.axes[1].plot([], [], "k:", label="the teacher's mean, whatever the image")
    figure.legend(handles=[*handles, *line], loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)


def _plot_accuracies(rows: list[Accuracy], models: list[str], path: Path) -> None:
    """The mean accuracy over the severities: a group of bars for each corruption."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(models)
    names: list[str] = []
    for number, model in enumerate(models):
        of = means(rows, model)
        names = list(of)
        places = np.arange(len(names)) + (number - (len(models) - 1) / 2) * width
        axes.bar(places, [100 * value for value in of.values()], width, label=model)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=7)
    axes.set(ylabel="top-1 %, mean over severities")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)
