"""The report of a table: statistics of each cell over its seeds, figures and cost."""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from xkd_jax.reporting import cost, figures, report
from xkd_jax.reporting.document import (
    Block,
    Heading,
    Items,
    Paragraph,
    Picture,
    Table,
    drop_empty,
    write_document,
)
from xkd_jax.reporting.files import SUMMARY, read_json, write_file
from xkd_jax.reporting.statistics import Difference, Rival, compare_with_best, subtract
from xkd_jax.reporting.table_runs import (
    CELLS,
    CHOSEN,
    DONE,
    FAILED,
    TUNING,
    CellRuns,
    TableRuns,
    get_score,
    read_table,
)
from xkd_jax.table import Table as TableRecipe

__all__ = ["CELLS", "CHOSEN", "FAILED", "describe", "read_score", "write"]

CSV = "table.csv"
GAINS, CURVES = "gains.png", "curves.png"
_NOTES = {
    "{score} %": "{score}: test split, after the last epoch; the mean over seeds, and the sample "
    "standard deviation.",
    "best eval %": "best eval: for comparison, each run's highest {score} on the evaluation split "
    "over all epochs, averaged over seeds; this maximum is optimistic.",
    "noisy %": "noisy: top-1 on the noisy test split after the last epoch, averaged over seeds.",
    "published %": "published: the {score} that the publication reports.",
    "gain": "gain: mean difference from {baseline} over shared seeds, in percentage points, with "
    "its 95% interval (Student's t on paired differences).",
    "vs best": "vs best: mean difference from the best other cell of the same baseline over shared "
    "seeds. "
    "* p < 0.05 in a two-sided paired t-test, after Holm's correction over the cells.",
}
_COST_FIELDS = ("speed", "hours", "parameters", "extra", "flops", "devices")


def describe(table: TableRecipe, folder: Path) -> None:
    """Writes what `write` needs to know about the table."""
    facts = {
        "cells": {name: dict(cell.fields) for name, cell in table.cells.items()},
        "paper": {name: cell.paper for name, cell in table.cells.items() if cell.paper is not None},
        "baseline": table.baseline,
        "baselines": {name: table.baseline_of(name) for name in table.cells},
        "seeds": list(table.seeds),
    }
    write_file(folder / CELLS, (json.dumps(facts, indent=2) + "\n").encode())


def read_score(folder: Path) -> float:
    """A run's top-1 on its test split, in [0, 1]; without labels its probe's; NaN without both."""
    path = folder / SUMMARY
    return get_score(read_json(path)) if path.exists() else math.nan


def write(folder: Path) -> str:
    """Writes report.md, report.html, table.csv and the figures of the table in `folder`.

    Returns:
      The table of results as Markdown.

    Raises:
      UserError: there is no table, or it has no runs yet.
    """
    table = read_table(folder)
    scores = {name: cell.scores for name, cell in table.cells.items()}
    rivals = compare_with_best(scores, table.baselines)
    gains = _gains(table)
    results = Table(list_results(table, gains, rivals), _best_row(table))
    write_file(folder / CSV, _format_csv(table, gains, rivals).encode())
    notes = [
        note.format(baseline=_name_baseline(table), score=table.score)
        for title, note in _NOTES.items()
        if title.format(score=table.score) in results.lines[0]
    ]
    blocks: list[Block] = [Paragraph(_summarise(folder, table)), results, Items(notes, small=True)]
    if gains:
        picture = figures.plot_gains(gains, _name_baseline(table), table.score)
        blocks += [Heading("Gains"), Picture(picture, GAINS, "gains over the baseline")]
    blocks += _draw_curves(table)
    costs = {name: [run.cost for run in cell.done.values()] for name, cell in table.cells.items()}
    lines = cost.list_costs({name: runs for name, runs in costs.items() if runs}, _COST_FIELDS)
    if len(lines[0]) > 1:
        blocks += [Heading("Cost of a run"), Table(lines), Items(cost.explain(lines), small=True)]
    blocks += [Heading("Runs"), Table(_list_runs(table))]
    if table.notes:
        blocks.append(Items(table.notes))
    write_document(folder, folder.absolute().name, blocks)
    return results.markdown()


def list_results(
    table: TableRuns, gains: Mapping[str, Difference], rivals: Mapping[str, Rival]
) -> list[list[str]]:
    """The table of results as text, without columns that are empty.

    Args:
      table: the runs.
      gains: the gain of each cell over the baseline.
      rivals: the comparison of each cell with the best other one.
    """
    lines = [["", "runs", *(title.format(score=table.score) for title in _NOTES)]]
    lines[0].insert(3, "deviation")
    lines[0].insert(lines[0].index("vs best"), "95% interval")
    lines[0] += ["chosen", "left out"]
    for name, cell in table.cells.items():
        gain, rival = gains.get(name), rivals.get(name)
        has_interval = gain is not None and not math.isnan(gain.low)
        lines.append(
            [
                name,
                f"{len(cell.done)} of {len(cell.runs)}",
                *_format_scores(cell),
                _percent(cell.paper),
                "" if gain is None else f"{gain.mean:+.2f}",
                f"{gain.low:+.2f} to {gain.high:+.2f}" if gain and has_interval else "",
                _format_rival(rival),
                cell.chosen.replace(",", ", "),
                _left_out(cell),
            ]
        )
    return drop_empty(lines)


def _draw_curves(table: TableRuns) -> list[Block]:
    """The learning curves, if there was more than one evaluation."""
    curves = {
        name: [run.curve for run in cell.done.values() if run.curve]
        for name, cell in table.cells.items()
    }
    curves = {name: runs for name, runs in curves.items() if runs}
    if max((len(curve) for runs in curves.values() for curve in runs), default=0) < 2:
        return []
    text = (
        f"Mean {table.score} on the evaluation split, with a band of one standard deviation over "
        f"seeds; grey: {_name_baseline(table)}."
    )
    picture = figures.plot_cells(curves, table.baselines, table.score)
    return [
        Heading("Learning curves"),
        Paragraph(text),
        Picture(picture, CURVES, "learning curves"),
    ]


def _name_baseline(table: TableRuns) -> str:
    """The name of the cell that all others are compared with, or a description of several."""
    names = set(table.baselines.values())
    return names.pop() if len(names) == 1 else "the same student without distillation"


def _gains(table: TableRuns) -> dict[str, Difference]:
    """The paired gain of every cell that shares seeds with its baseline."""
    found = {
        name: subtract(cell.scores, table.cells[cell.baseline].scores)
        for name, cell in table.cells.items()
        if name != cell.baseline and cell.baseline in table.cells
    }
    return {name: gain for name, gain in found.items() if gain is not None}


def _best_evaluation(cell: CellRuns) -> float | None:
    """The mean over seeds of the best evaluation of each run, in percent."""
    best = [max(run.curve.values()) for run in cell.done.values() if run.curve]
    return statistics.mean(best) if best else None


def _noisy(cell: CellRuns) -> float | None:
    """The mean top-1 over seeds on the noisy test split, in percent."""
    found = [run.noisy_top1 for run in cell.done.values() if run.noisy_top1 is not None]
    return statistics.mean(found) if found else None


def _mean(cell: CellRuns) -> float | None:
    return statistics.mean(cell.scores.values()) if cell.scores else None


def _deviation(cell: CellRuns) -> float | None:
    return statistics.stdev(cell.scores.values()) if len(cell.scores) > 1 else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _format_scores(cell: CellRuns) -> list[str]:
    scores = _mean(cell), _deviation(cell), _best_evaluation(cell), _noisy(cell)
    return [_percent(value) for value in scores]


def _format_rival(rival: Rival | None) -> str:
    if rival is None:
        return ""
    return f"{rival.difference.mean:+.2f}{' *' if rival.is_significant else ''}"


def _left_out(cell: CellRuns) -> str:
    """The states of the runs that are left out, such as "1 failed, 2 missing"."""
    states = [run.state for run in cell.runs.values() if run.state != DONE]
    counts = {state: states.count(state) for state in states}
    # Tuning is the whole cell's.
    return ", ".join(s if s == TUNING else f"{count} {s}" for s, count in counts.items())


def _best_row(table: TableRuns) -> int | None:
    """The row with the highest mean, among those with the most runs."""
    ranks = [(len(cell.scores), _mean(cell) or 0.0) for cell in table.cells.values()]
    best = max(ranks)
    return ranks.index(best) if best[0] else None


def _summarise(folder: Path, table: TableRuns) -> str:
    """What was trained and measured, and how much of the table is there."""
    paths, summaries = {}, {}
    for name, cell in table.cells.items():
        for seed, run in cell.done.items():
            key = f"{name}/seed{seed}"
            paths[key], summaries[key] = folder / key, run.summary
    total = sum(len(cell.runs) for cell in table.cells.values())
    text = f"{len(paths)} of {total} runs are complete and included."
    if not paths:
        return text
    tops = {summary.get("teacher", {}).get("top1") for summary in summaries.values()} - {None}
    if tops:
        text = (
            f"The teacher's top-1 is {', '.join(f'{100 * t:.2f}%' for t in sorted(tops))}. {text}"
        )
    return f"{report.describe(summaries, paths)} {text}"


def _list_runs(table: TableRuns) -> list[list[str]]:
    """The top-1 of every run, or its state; a column for each seed."""
    seeds = next(iter(table.cells.values())).runs
    lines = [["", *(f"seed {seed}" for seed in seeds)]]
    for name, cell in table.cells.items():
        runs = cell.runs.values()
        shown = (_percent(run.score) if run.state == DONE else run.state for run in runs)
        lines.append([name, *shown])
    return lines


def _format_csv(
    table: TableRuns, gains: Mapping[str, Difference], rivals: Mapping[str, Rival]
) -> str:
    """Everything about the cells, a line each."""
    columns = ["cell", "runs", f"{table.score} %", "deviation", "best evaluation %", "noisy %"]
    columns += ["published %", "gain", "low", "high", "best other", "difference", "p (Holm)"]
    columns.append("significant")
    columns += ["images/s", "hours", "parameters", "extra parameters", "FLOPs", "devices"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*columns, "chosen", "left out"])
    for name, cell in table.cells.items():
        gain, rival = gains.get(name), rivals.get(name)
        row = [name, f"{len(cell.done)} of {len(cell.runs)}", *_format_scores(cell)]
        row.append(_percent(cell.paper))
        row += _numbers(gain.mean, gain.low, gain.high) if gain else [""] * 3
        if rival:
            row += [rival.name, *_numbers(rival.difference.mean, rival.p)]
            row.append("yes" if rival.is_significant else "no")
        else:
            row += [""] * 4
        row += _format_costs([run.cost for run in cell.done.values()])
        writer.writerow([*row, cell.chosen, _left_out(cell)])
    return text.getvalue()


def _format_costs(costs: list[cost.Cost]) -> list[str]:
    """The means of a cell's costs, in full."""
    row = []
    for field in _COST_FIELDS:
        mean = cost.mean_cost(costs, field)
        if field in ("speed", "hours") and mean is not None:
            row += _numbers(mean)
        else:
            row.append("" if mean is None else str(mean))
    return row


def _numbers(*values: float) -> list[str]:
    """Numbers with four significant digits; NaN is empty."""
    return ["" if math.isnan(value) else f"{value:.4g}" for value in values]
