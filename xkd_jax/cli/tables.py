"""Trains the cells of a table: choices on the evaluation split first, then every seed."""

import contextlib
import copy
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from xkd_jax.cli import runs
from xkd_jax.config import Config, used, validate
from xkd_jax.errors import UserError
from xkd_jax.experiment import RANDOM, Experiment, create_experiment
from xkd_jax.reporting import table_report
from xkd_jax.reporting.files import SUMMARY
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
    check_fields(table, config, names)
    runs.configure_jax()
    for name in names:
        if not all((workdir / name / f"seed{seed}" / SUMMARY).exists() for seed in table.seeds):
            with _naming(name):
                create_experiment(with_fields(config, table.cells[name].fields))
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


def check_fields(table: Table, config: Config, names: Sequence[str]) -> None:
    """Checks everything about the cells `names` that can be checked without data and weights.

    Raises:
      UserError: names the first cell that can't work.
    """
    if config.compare:
        raise UserError(
            f"compare={config.compare} has no effect in a table, whose cells name their methods; "
            "set compare=()."
        )
    for name in names:
        cell = table.cells[name]
        with _naming(name):
            if table.baseline_of(name) not in table.cells:
                raise UserError(f"its baseline, {table.baseline_of(name)}, is not in the table.")
            for fields in (cell.fields, *sum(cell.stages, ())):
                validate(with_fields(config, {**cell.fields, **fields}))


@contextlib.contextmanager
def _naming(cell: str) -> Iterator[None]:
    """Puts the cell's name before an error's sentence."""
    try:
        yield
    except UserError as error:
        raise UserError(f"cell {cell}: {error}") from error


def with_fields(config: Config, fields: Fields) -> Config:
    """A copy of the config with other values of some fields.

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
      experiment: the last run's; other seeds share its networks and its compiled step.
    """

    table: Table
    config: Config
    workdir: Path
    total: int
    passed: int = 0
    trained: int = 0
    begun: float = dataclasses.field(default_factory=time.monotonic)
    experiment: Experiment | None = None

    def train_cell(self, name: str, cell: Cell) -> None:
        """Chooses the cell's fields and trains it with every seed.

        Raises:
          _Stopped: by a signal.
        """
        fields, scores = dict(cell.fields), {}
        varied = {"method.name", *(field for choice in sum(cell.stages, ()) for field in choice)}

        def describe(choice: Fields) -> str:
            return label({name: v for name, v in {**fields, **choice}.items() if name in varied})

        for stage in cell.stages:
            tried = {describe(choice): {**fields, **choice} for choice in stage}
            found = {text: self._try(name, text, other) for text, other in tried.items()}
            fields, scores = tried[max(found, key=lambda text: found[text])], scores | found
        chosen = {"fields": fields, "evaluation_top1": scores}
        path = self.workdir / name / table_report.CHOSEN
        write_file(path, (json.dumps(chosen, indent=2) + "\n").encode())
        for seed in self.table.seeds:
            config = with_fields(self.config, {**fields, "seed": seed})
            self._train(config, self.workdir / name / f"seed{seed}")

    def _try(self, name: str, text: str, fields: Fields) -> float:
        """The mean top-1 of an alternative on the evaluation split; `text` is its label."""
        scores = []
        for seed in self.table.tuning_seeds:
            config = with_fields(self.config, {**fields, "seed": seed})
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
            stopped = runs.train_one(config, folder, self._create)
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

    def _create(self, config: Config) -> Experiment:
        """The run's experiment. The last one is kept for runs that differ only in their seed."""
        if self.experiment is None or _seedless(config) != _seedless(self.experiment.config):
            self.experiment = None  # frees the memory of its networks first
            self.experiment = create_experiment(config)
        self.experiment = self.experiment.with_seed(config)
        return self.experiment


def _seedless(config: Config) -> Config:
    """The fields that matter to a run; without the seed, unless a random teacher depends on it."""
    fields = used(config)
    return fields if config.teacher.weights == RANDOM else fields | {"seed": None}


class _Stopped(Exception):
    """A signal has stopped a run, whose state is saved."""

    def __init__(self, received: signal.Signals):
        super().__init__(received)
        self.signal = received
