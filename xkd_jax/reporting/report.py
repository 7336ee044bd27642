"""Tables and curves from finished run folders."""

from pathlib import Path
from typing import Any

from xkd_jax.errors import UserError
from xkd_jax.reporting import files
from xkd_jax.reporting.summary import SUMMARY

CURVES = "curves.png"
TABLE = "report.md"
# Columns, each shown if all rows have it.
_SCORES = {"top1": "top-1 %", "top5": "top-5 %", "noisy_top1": "noisy top-1 %", "eer": "EER %"}


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
    table = format_table(summaries)
    (folder / TABLE).write_text(table + "\n")
    plot_curves({name: files.read_metrics(path) for name, path in runs.items()}, folder / CURVES)
    students = ", ".join(str(path / "student.safetensors") for path in runs.values())
    return f"\n{table}\n\ncurves: {folder / CURVES}\nstudents: {students}"


def format_table(summaries: dict[str, dict[str, Any]]) -> str:
    """A Markdown table: a row for the teacher, then one for each run.

    Args:
      summaries: the contents of each run's summary.json, by the run's name.
    """
    rows = []
    teachers = [summary["teacher"] for summary in summaries.values() if "teacher" in summary]
    if teachers:
        rows.append(("teacher", teachers[0]))
    rows += [(f"student, {_label(s['method'])}", s["student"]) for s in summaries.values()]
    scores = {k: v for k, v in _SCORES.items() if all(k in row for _, row in rows)}
    if "eer" in scores:
        del scores["top5"]  # always 100% for two classes
    lines = [["", *scores.values(), "parameters", "MFLOPs"]]
    for name, row in rows:
        cells = [f"{100 * row[score]:.2f}" for score in scores]
        lines.append([name, *cells, f"{row['parameters']:,}", f"{row['flops'] / 1e6:,.1f}"])
    return _markdown(lines)


def _label(method: str) -> str:
    return "cross-entropy alone" if method == "none" else method


def _markdown(lines: list[list[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]

    def row(cells: list[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return f"| {' | '.join([first, *rest])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([row(lines[0]), row(rule), *map(row, lines[1:])])


def plot_curves(metrics: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plots training loss and evaluation accuracy against the step.

    Args:
      metrics: the lines of each run's metrics.jsonl, by the run's name.
      path: path of the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, top1_axes = figure.subplots(1, 2)
    for name, lines in metrics.items():
        for axes, key, scale in (
            (loss_axes, "label_loss", 1),
            (top1_axes, "eval_top1", 100),
        ):
            points = [(line["step"], scale * line[key]) for line in lines if key in line]
            axes.plot(*zip(*points, strict=True), label=_label(name), linewidth=1.5)
    loss_axes.set(xlabel="step", ylabel="cross-entropy (training)", yscale="log")
    top1_axes.set(xlabel="step", ylabel="top-1 % (evaluation split)")
    for axes in (loss_axes, top1_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
