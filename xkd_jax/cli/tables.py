"""Trains the cells of a table: choices on the evaluation split first, then every seed."""

import copy
import dataclasses
import json
import signal
import sys
import time
from pathlib import Path

from xkd_jax.cli import runs
from xkd_jax.config import Config, validate
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.reporting import table_report
from xkd_jax.reporting.nan_guard import Diverged
from xkd_jax.table import Cell, Fields, Table, label
from xkd_jax.weights import write_file


def run(table: Table, config: Config, workdir: Path, shard: tuple[int, int] = (1, 1)) -> int:
    """Trains what is left of `table` and writes its report.

    Args:
      table: what to train.
      config: the recipe, for all cells.
      workdir: the table's folder.
      shard: (I, N) for every Nth cell, beginning with the Ith.

    Returns:
      The exit code: 0 when done or after SIGTERM, 130 after Ctrl-C.

    Raises:
      UserError: any wrong input, before the first run starts.
    """
    names = list(table.cells)[shard[0] - 1 :: shard[1]]
    for name in names:
        for fields in (table.cells[name].fields, *sum(table.cells[name].stages, ())):
            validate(_with(config, {**table.cells[name].fields, **fields}))
    runs.configure_jax()
    for name in names:
        create_experiment(_with(config, table.cells[name].fields))
    workdir.mkdir(parents=True, exist_ok=True)
    table_report.describe(table, workdir)
    sweep = _Sweep(table, config, workdir, sum(table.count(table.cells[name]) for name in names))
    try:
        for name in names:
            sweep.train_cell(name, table.cells[name])
            print(table_report.write(workdir))
    except _Stopped as stop:
        print(f"stopped by {stop.signal.name}; run the same command again to resume.")
        return 130 if stop.signal == signal.SIGINT else 0
    return 0


def _with(config: Config, fields: Fields) -> Config:
    """The config with other values of some fields.

    Raises:
      UserError: there is no such field, or a value has another type.
    """
    config = copy.deepcopy(config)
    try:
        config.update_from_flattened_dict(dict(fields))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the table's fields {dict(fields)} don't fit the config: {error}") from (
            error
        )
    return config


@dataclasses.dataclass
class _Sweep:
    """A sweep that is under way.

    Attributes:
      table: what is trained.
      config: the recipe.
      workdir: the table's folder.
      total: the number of runs, at most.
      passed: the number of runs that are finished or not needed.
      trained: the number of runs that were trained, of those.
      begun: when the first of them began.
    """

    table: Table
    config: Config
    workdir: Path
    total: int
    passed: int = 0
    trained: int = 0
    begun: float = dataclasses.field(default_factory=time.monotonic)

    def train_cell(self, name: str, cell: Cell) -> None:
        """Chooses the cell's fields and trains it with every seed.

        Raises:
          _Stopped: by a signal.
        """
        fields, scores = dict(cell.fields), {}
        for stage in cell.stages:
            tried = {label({**fields, **choice}): {**fields, **choice} for choice in stage}
            found = {text: self._try(name, text, other) for text, other in tried.items()}
            fields, scores = tried[max(found, key=lambda text: found[text])], scores | found
        chosen = {"fields": fields, "evaluation_top1": scores}
        path = self.workdir / name / table_report.CHOSEN
        write_file(path, (json.dumps(chosen, indent=2) + "\n").encode())
        for seed in self.table.seeds:
            config = _with(self.config, {**fields, "seed": seed})
            self._train(config, self.workdir / name / f"seed{seed}")

    def _try(self, name: str, text: str, fields: Fields) -> float:
        """The mean top-1 of an alternative on the evaluation split; `text` is its label."""
        scores = []
        for seed in self.table.tuning_seeds:
            config = _with(self.config, {**fields, "seed": seed})
            config.data.test = config.data.eval  # the test split is not for choices
            folder = self.workdir / name / "tuning" / f"{text},seed={seed}"
            self._train(config, folder)
            # A run that diverged has no score.
            scores.append(max(0.0, table_report.read_top1(folder)))
        return sum(scores) / len(scores)

    def _train(self, config: Config, folder: Path) -> None:
        self.passed += 1
        if runs.is_complete(config, folder) or (folder / table_report.FAILED).exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        print(f"run {self.passed} of {self.total}: {folder}", file=sys.stderr)
        begun = time.monotonic()
        try:
            stopped = runs.train_one(config, folder)
        except Diverged as error:
            stopped = None
            write_file(folder / table_report.FAILED, f"{error}\n".encode())
        if stopped:
            raise _Stopped(stopped)
        self.trained += 1
        took, mean = time.monotonic() - begun, (time.monotonic() - self.begun) / self.trained
        left = time.strftime("%H:%M", time.gmtime(mean * (self.total - self.passed)))
        top1 = f"{100 * table_report.read_top1(folder):.2f}%"
        print(f"  top-1 {top1} after {took:.0f} s; {left} h left at most", file=sys.stderr)


class _Stopped(Exception):
    """A signal has stopped a run, whose state is saved."""

    def __init__(self, received: signal.Signals):
        super().__init__(received)
        self.signal = received
