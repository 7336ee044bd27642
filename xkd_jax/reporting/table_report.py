"""The report of a table: mean, deviation and paired gain of each cell over its seeds."""

import csv
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

from xkd_jax.errors import UserError
from xkd_jax.reporting.files import read_json
from xkd_jax.reporting.report import TABLE, format_markdown
from xkd_jax.reporting.summary import SUMMARY
from xkd_jax.table import Table, label
from xkd_jax.weights import write_file

CELLS = "table.json"  # the names of the cells, the baseline and the seeds
CHOSEN = "chosen.json"  # the fields that a cell has chosen on the evaluation split
FAILED = "failed.txt"  # why a run has no summary


def describe(table: Table, folder: Path) -> None:
    """Writes what `write` needs to know about the table."""
    facts = {
        "cells": {name: dict(cell.fields) for name, cell in table.cells.items()},
        "paper": {name: cell.paper for name, cell in table.cells.items() if cell.paper is not None},
        "baseline": table.baseline,
        "baselines": {name: table.baseline_of(name) for name in table.cells},
        "seeds": list(table.seeds),
    }
    write_file(folder / CELLS, (json.dumps(facts, indent=2) + "\n").encode())


def read_top1(folder: Path) -> float:
    """A run's top-1 on its test split, in [0, 1]; without labels its probe's; NaN without both."""
    path = folder / SUMMARY
    student = read_json(path)["student"] if path.exists() else {}
    return student.get("top1", student.get("probe_top1", math.nan))


def write(folder: Path) -> str:
    """Writes report.md and table.csv of the table in `folder`; returns the Markdown table.

    Raises:
      UserError: there is no table.
    """
    if not (folder / CELLS).exists():
        raise UserError(f"{folder} holds no table; python -m xkd_jax.sweep makes one.")
    facts = read_json(folder / CELLS)
    lines = [["", "runs", "top-1 %", "deviation", "gain", "95% interval", "chosen"]]
    baseline = _scores(folder / facts["baseline"], facts["seeds"])
    for name, fields in facts["cells"].items():
        scores, is_base = _scores(folder / name, facts["seeds"]), name == facts["baseline"]
        chosen, new = folder / name / CHOSEN, {}
        if chosen.exists():
            new = {k: v for k, v in read_json(chosen)["fields"].items() if k not in fields}
        lines.append([name, *_row(scores, baseline, len(facts["seeds"]), is_base), label(new)])
    table = format_markdown(lines)
    write_file(folder / TABLE, f"# {folder.absolute().name}\n\n{table}\n".encode())
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    write_file(folder / "table.csv", text.getvalue().encode())
    return table


def _scores(folder: Path, seeds: list[int]) -> dict[int, float]:
    """The top-1 of each finished run by seed, in percent."""
    scores = {seed: 100 * read_top1(folder / f"seed{seed}") for seed in seeds}
    return {seed: score for seed, score in scores.items() if not math.isnan(score)}


def _row(scores: dict[int, float], baseline: dict[int, float], seeds: int, is_base: bool) -> Any:
    """Runs, mean, deviation, gain and its interval, as text."""
    if not scores:
        return [f"0 of {seeds}", "", "", "", ""]
    values = list(scores.values())
    deviation = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    row = [f"{len(values)} of {seeds}", f"{statistics.mean(values):.2f}", deviation]
    gains = [score - baseline[seed] for seed, score in scores.items() if seed in baseline]
    if is_base or not gains:
        return [*row, "", ""]
    gain = statistics.mean(gains)
    return [*row, f"{gain:+.2f}", _interval(gains)]


def _interval(gains: list[float]) -> str:
    """The 95% interval of the mean of paired differences, by Student's t."""
    if len(gains) < 2:
        return ""
    from scipy.stats import t  # takes half a second to import

    half = t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / len(gains) ** 0.5
    mean = statistics.mean(gains)
    return f"{mean - half:+.2f} to {mean + half:+.2f}"
