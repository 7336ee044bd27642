"""Reads a table's runs: results to average, and why some runs are left out."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xkd_jax.errors import UserError
from xkd_jax.reporting import files
from xkd_jax.reporting.cost import Cost, read_cost
from xkd_jax.reporting.recipe import Recipe, find_differences, read_recipe
from xkd_jax.reporting.scores import EVALUATED, MAIN, main_score
from xkd_jax.table import label

CELLS = "table.json"  # the names of the cells, the baseline and the seeds
CHOSEN = "chosen.json"  # the fields that a cell has chosen on the evaluation split
FAILED = "failed.txt"  # why a run has no summary
TUNING = "tuning"  # a cell's folder of runs on the evaluation split, and its state meanwhile
DONE = "done"


@dataclasses.dataclass
class Run:
    """One seed of a cell.

    Attributes:
      state: `DONE`, or why the run is left out: "missing", "tuning", "unfinished", "failed",
        "damaged", "not evaluated" or "other recipe".
      reason: more about the state; may be empty.
      summary: summary.json; empty unless the run is finished.
      curve: top-1 on the evaluation split in percent, by step.
      cost: what it cost.
      notes: what is damaged or unknown in a run that is included.
    """

    state: str
    reason: str = ""
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    curve: dict[int, float] = dataclasses.field(default_factory=dict)
    cost: Cost = dataclasses.field(default_factory=Cost)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def score(self) -> float:
        """The main score, see `scores.MAIN`, on the test split after the last epoch, in percent."""
        return 100 * get_score(self.summary)

    @property
    def noisy_top1(self) -> float | None:
        """The same on the noisy test split, in percent, if it was measured."""
        top1 = self.summary.get("student", {}).get("noisy_top1")
        return 100 * top1 if isinstance(top1, float | int) else None


@dataclasses.dataclass
class CellRuns:
    """The runs of a cell.

    Attributes:
      runs: by seed.
      fields: the values that the cell sets, before and after its choices.
      baseline: the cell that this one is compared with; its own name if it is a baseline.
      chosen: the label of what was chosen on the evaluation split.
      paper: the published top-1 in percent, if there is one.
    """

    runs: dict[int, Run]
    fields: dict[str, Any]
    baseline: str = ""
    chosen: str = ""
    paper: float | None = None

    @property
    def done(self) -> dict[int, Run]:
        """The runs that are included, by seed."""
        return {seed: run for seed, run in self.runs.items() if run.state == DONE}

    @property
    def scores(self) -> dict[int, float]:
        """The top-1 of each included run, in percent."""
        return {seed: run.score for seed, run in self.done.items()}


@dataclasses.dataclass
class TableRuns:
    """All runs of a table.

    Attributes:
      cells: by name.
      notes: sentences about what the table leaves out.
    """

    cells: dict[str, CellRuns]
    notes: list[str]

    @property
    def baselines(self) -> dict[str, str]:
        """The cell that each cell is compared with."""
        return {name: cell.baseline for name, cell in self.cells.items()}

    @property
    def score(self) -> str:
        """What the runs' main score is called; "AP" for detectors with and without masks."""
        runs = [run for cell in self.cells.values() for run in cell.done.values()]
        names = {MAIN[main_score(run.summary["student"])] for run in runs}
        return names.pop() if len(names) == 1 else "AP" if names else MAIN["top1"]


def get_score(summary: Mapping[str, Any]) -> float:
    """The main score on the test split, in [0, 1], see `scores.MAIN`; NaN without any."""
    student = summary.get("student", {})
    score = student.get(main_score(student))
    return score if isinstance(score, float | int) else math.nan


def read_table(folder: Path) -> TableRuns:
    """Reads everything that is sound in a table's folder.

    Raises:
      UserError: there is no table, its table.json is damaged, or it has no run yet.
    """
    if not (folder / CELLS).exists():
        raise UserError(f"{folder} holds no table; python -m xkd_jax.sweep makes one.")
    facts = files.read_json(folder / CELLS)
    if not (isinstance(facts, dict) and {"cells", "baseline", "seeds"} <= facts.keys()):
        raise UserError(
            f"{folder / CELLS} was written by another version of xkd_jax; run the sweep again, "
            "which rewrites it and keeps the finished runs."
        )
    table = TableRuns({}, [])
    recipes: dict[tuple[str, int], Recipe] = {}
    for name, fields in facts["cells"].items():
        cell, found = _read_cell(folder / name, fields, facts["seeds"])
        cell.paper = facts.get("paper", {}).get(name)
        cell.baseline = facts.get("baselines", {}).get(name, facts["baseline"])
        table.cells[name] = cell
        recipes |= {(name, seed): recipe for seed, recipe in found.items()}
    if all(run.state == "missing" for cell in table.cells.values() for run in cell.runs.values()):
        raise UserError(f"{folder} has no runs yet; python -m xkd_jax.sweep trains them.")
    differences = find_differences(list(recipes.values()))
    for (name, seed), difference in zip(recipes, differences, strict=True):
        if difference:
            run = table.cells[name].runs[seed]
            run.state, run.reason = "other recipe", difference
    table.notes = [*_notes(table), *_unlisted(folder, table)]
    return table


def _read_cell(
    folder: Path, fields: dict[str, Any], seeds: list[int]
) -> tuple[CellRuns, dict[int, Recipe]]:
    """Reads a cell's runs, and the recipe of each finished one by seed."""
    cell, recipes, damage = CellRuns({}, dict(fields)), {}, ""
    if (folder / CHOSEN).exists():
        try:
            saved = files.read_json(folder / CHOSEN)
            chosen = saved["fields"]
            # Earlier versions didn't say which fields were tried.
            tried = saved.get("tried", [name for name in chosen if name not in fields])
            cell.chosen = label({name: chosen[name] for name in tried})
            cell.fields |= chosen
        except (UserError, TypeError, KeyError, AttributeError):
            damage = f"{CHOSEN} is damaged, so the run's recipe can't be checked"
    for seed in seeds:
        try:
            recipe = read_recipe(folder / f"seed{seed}", cell.fields | {"seed": seed})
            run = _read_run(folder / f"seed{seed}", recipe.found)
        except UserError as error:
            cell.runs[seed] = Run("damaged", str(error))
            continue
        if run.state == DONE and damage:
            run.state, run.reason = "damaged", damage
        if run.state == "missing" and (folder / TUNING).exists() and not (folder / CHOSEN).exists():
            run.state = TUNING
        if run.state == DONE:
            recipes[seed] = recipe
        cell.runs[seed] = run
    return cell, recipes


def _read_run(folder: Path, config: Mapping[str, Any]) -> Run:
    """Reads a run, whatever its recipe.

    Args:
      folder: the run's folder.
      config: every field of its config, "a.b.c"; empty without a config.

    Raises:
      UserError: summary.json is damaged.
    """
    lines, damaged = files.read_sound_metrics(folder)
    if not (folder / files.SUMMARY).exists():
        if (folder / FAILED).exists():
            reason = (folder / FAILED).read_text(errors="replace").strip()
            return Run("failed", reason.splitlines()[0] if reason else "")
        if not (folder / files.CONFIG).exists():
            return Run("missing")
        step = max((line["step"] for line in lines), default=0)
        return Run("unfinished", f"at step {step}")
    summary = files.read_summary(folder)
    run = Run(DONE, summary=summary, curve=_get_curve(lines))
    run.cost = read_cost(summary, lines, config.get("batch_size"))
    if math.isnan(run.score):
        run.state, run.reason = "not evaluated", f"{files.SUMMARY} has no score"
    if damaged:
        run.notes.append(f"damaged lines of {files.METRICS} left out: {damaged}")
    if not config:
        run.notes.append(f"there is no {files.CONFIG}, so its recipe wasn't checked")
    return run


def _get_curve(lines: list[dict[str, Any]]) -> dict[int, float]:
    """The main score on the evaluation split in percent, by step."""
    curve = {}
    for line in lines:
        score = next((line[name] for name in EVALUATED if name in line), None)
        if isinstance(score, float | int) and math.isfinite(score):
            curve[line["step"]] = 100 * score
    return curve


def _notes(table: TableRuns) -> list[str]:
    """A sentence for each run that is left out or damaged, unless it hasn't started."""
    notes = []
    for name, cell in table.cells.items():
        for seed, run in cell.runs.items():
            if run.state not in (DONE, "missing", TUNING):
                reason = f": {run.reason}" if run.reason else ""
                notes.append(f"{name}, seed {seed}: {run.state}{reason}".rstrip(".") + ".")
            notes += [f"{name}, seed {seed}: {note}." for note in run.notes]
    return notes


def _unlisted(folder: Path, table: TableRuns) -> list[str]:
    """A sentence for each finished run that isn't in the table."""
    notes = []
    for path in sorted(folder.glob(f"*/seed*/{files.SUMMARY}")):
        cell, seed = path.parts[-3], path.parent.name.removeprefix("seed")
        runs = table.cells[cell].runs if cell in table.cells else {}
        if seed not in map(str, runs):
            notes.append(f"{cell}, seed {seed}: left out, because it isn't in {CELLS}.")
    return notes
