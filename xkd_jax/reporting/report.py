"""Tables and curves from finished run folders."""

import itertools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xkd_jax.errors import UserError
from xkd_jax.reporting import files
from xkd_jax.reporting.summary import BEST, STUDENT, SUMMARY, TEACHER

CURVES = "curves.png"
TABLE = "report.md"
# Columns, each shown if all rows have it; short, so that the table fits into 80 columns.
_SCORES = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "noisy_top1": "noisy top-1",
    "eer": "EER %",
    "probe_top1": "linear probe %",
    "knn_top1": "k-NN %",
}
_LOSSES = {"label_loss": "cross-entropy", "loss": "loss"}


def find_runs(folder: Path) -> dict[str, Path]:
    """The finished runs by name: `folder` itself, or its subfolders, the first started first.

    Raises:
      UserError: there is no finished run.
    """
    if (folder / SUMMARY).exists():
        return {folder.name: folder}
    finished = [path.parent for path in folder.glob(f"*/{SUMMARY}")]
    if not finished:
        raise UserError(
            f"{folder} holds no finished run; give the folder of a run or of a comparison."
        )
    # A run's config is only written when it first starts.
    finished.sort(key=lambda run: (run / files.CONFIG).stat().st_mtime_ns)
    return {run.name: run for run in finished}


def write(folder: Path) -> str:
    """Writes report.md and curves.png of the finished runs in `folder` into it.

    Returns:
      The table and the files' paths, as text.

    Raises:
      UserError: there is no finished run.
    """
    runs = find_runs(folder)
    summaries = {name: files.read_json(path / SUMMARY) for name, path in runs.items()}
    table, metrics = format_table(summaries), {n: files.read_metrics(p) for n, p in runs.items()}
    heading = f"# {folder.absolute().name}\n\n{describe(summaries, runs)}"
    if not any(metrics.values()):  # a probe, which isn't trained step by step
        (folder / TABLE).write_text(f"{heading}\n\n{table}\n")
        teachers = "".join(f"\n  {path / TEACHER}" for path in runs.values())
        return f"\n{table}\n\nreport: {folder / TABLE}\nteacher: {teachers}"
    # In the file, a list, and relative paths: they stay right in a copy of the folder.
    listed = "".join(
        f"- {_best(name, metrics[name], (path / BEST).relative_to(folder))}\n"
        for name, path in runs.items()
    )
    (folder / TABLE).write_text(f"{heading}\n\n{table}\n\n{listed}\n![learning curves]({CURVES})\n")
    plot_curves(summaries, metrics, folder / CURVES)
    best = "\n".join(_best(name, metrics[name], path / BEST) for name, path in runs.items())
    students = "".join(f"\n  {path / STUDENT}" for path in runs.values())
    return (
        f"\n{table}\n\n{best}\ncurves: {folder / CURVES}\nreport: {folder / TABLE}\n"
        f"students: {students}"
    )


def _first(lines: Iterable[dict[str, Any]], *names: str) -> str:
    """The first of `names` that any line has; the last one if none is there."""
    found = {name for line in lines for name in names if name in line}
    return next((name for name in names if name in found), names[-1])


def describe(summaries: dict[str, dict[str, Any]], runs: dict[str, Path]) -> str:
    """What was trained and measured: data, seeds, teacher and date, in a paragraph."""

    def values(*keys: str) -> str:
        found = dict.fromkeys(str(_get(summary, *keys)) for summary in summaries.values())
        return ", ".join(name for name in found if name != "None")

    finished = max((path / SUMMARY).stat().st_mtime for path in runs.values())
    date = time.strftime("%Y-%m-%d", time.localtime(finished))
    teacher = values("teacher", "model")
    taught = f" Teacher: {teacher}, {values('teacher', 'weights')}." if teacher else ""
    network = "Network" if values("method") == "probe" else "Student"
    return (
        f"Trained on {values('train')}, measured on {values('test')}. {network}: "
        f"{values('student', 'model')}.{taught} Seed {values('seed')}. Finished on {date}."
    )


def _get(summary: dict[str, Any], *keys: str) -> Any:
    value: Any = summary
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _best(name: str, lines: list[dict[str, Any]], path: Path) -> str:
    """The best evaluation of a run, whose student is in the file `path`."""
    score = _first(lines, "eval_top1", "eval_probe_top1")
    best = max(
        (line for line in lines if score in line),
        key=lambda line: (line[score], -line["step"]),
        default=None,
    )
    if best is None:
        return f"{name}: no evaluation"
    top1 = f"{100 * best[score]:.2f}"
    return f"{name}: best evaluation {top1}% at step {best['step']}, in {path}"


def format_table(summaries: dict[str, dict[str, Any]]) -> str:
    """A Markdown table: a row for the teacher, then one for each run.

    Args:
      summaries: the contents of each run's summary.json, by the run's name.
    """
    rows = []
    teachers = [summary["teacher"] for summary in summaries.values() if "teacher" in summary]
    if teachers:
        rows.append(("teacher", teachers[0]))
    if not teachers and len(summaries) == 1:  # a teacher or a baseline of its own
        (alone,) = summaries.values()
        rows.append((_get(alone, "student", "model") or "student", alone["student"]))
    else:
        rows += [(_label(s["method"]), s["student"]) for s in summaries.values()]
    # A teacher without a classifier, or of other classes, has no scores.
    scored = [row for _, row in rows if _SCORES.keys() & row.keys()]
    scores = {k: v for k, v in _SCORES.items() if scored and all(k in row for row in scored)}
    if "eer" in scores:
        scores.pop("top5", None)  # always 100% for two classes
    lines = [["", *scores.values(), "parameters", "MFLOPs"]]
    for name, row in rows:
        cells = [f"{100 * row[score]:.2f}" if score in row else "" for score in scores]
        mflops = row["flops"] / 1e6
        cells += [f"{row['parameters']:,}", f"{mflops:,.{1 if mflops < 1000 else 0}f}"]
        lines.append([name, *cells])
    return format_markdown(lines)


def _label(method: str) -> str:
    return "cross-entropy alone" if method == "none" else method


def format_markdown(lines: list[list[str]]) -> str:
    """A Markdown table with aligned columns; the first line is the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]

    def row(cells: list[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return f"| {' | '.join([first, *rest])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([row(lines[0]), row(rule), *map(row, lines[1:])])


def plot_curves(
    summaries: dict[str, dict[str, Any]], metrics: dict[str, list[dict[str, Any]]], path: Path
) -> None:
    """Plots training loss and evaluation accuracy against the step.

    Args:
      summaries: the contents of each run's summary.json, by the run's name.
      metrics: the lines of each run's metrics.jsonl, by the run's name.
      path: path of the figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, top1_axes = figure.subplots(1, 2, sharex=True)
    every = list(itertools.chain(*metrics.values()))
    loss, top1 = _first(every, "label_loss", "loss"), _first(every, "eval_top1", "eval_probe_top1")
    for name, lines in metrics.items():
        for axes, key, scale in (
            (loss_axes, loss, 1),
            (top1_axes, top1, 100),
        ):
            points = [(line["step"], scale * line[key]) for line in lines if key in line]
            # A single evaluation has no line to show.
            marker = "o" if len(points) == 1 else None
            axes.plot(*zip(*points, strict=True), label=_label(name), linewidth=1.5, marker=marker)
    teachers = [s["teacher"]["top1"] for s in summaries.values() if "top1" in s.get("teacher", {})]
    if teachers:
        label = "teacher (test split)"
        top1_axes.axhline(
            100 * teachers[0], color="black", linestyle="--", linewidth=1, label=label
        )
    loss_axes.set(xlabel="step", ylabel=f"{_LOSSES[loss]} (training)", yscale="log")
    # Plain numbers also between powers of ten, of which the default labels none.
    low, high = loss_axes.get_ylim()
    subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    loss_axes.yaxis.set_major_locator(LogLocator(subs=subs))
    loss_axes.yaxis.set_major_formatter(ScalarFormatter())
    loss_axes.yaxis.set_minor_formatter(NullFormatter())
    top1_axes.set(xlabel="step", ylabel="top-1 % (evaluation split)")
    for axes in (loss_axes, top1_axes):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)
