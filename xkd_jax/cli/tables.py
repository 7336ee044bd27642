"""Trains the cells of a table: choices on the evaluation split first, then every seed.

A comparison, `config.compare`, is the simplest table: a cell for each method, with one seed.
"""

import contextlib
import copy
import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from xkd_jax import checkpoint, seeds
from xkd_jax.cli import run_folder
from xkd_jax.config import Config, used
from xkd_jax.distributed import processes, sharding
from xkd_jax.errors import UserError
from xkd_jax.experiment import RANDOM, Experiment, create_experiment
from xkd_jax.reporting import report, table_report
from xkd_jax.reporting.files import CONFIG, SUMMARY
from xkd_jax.reporting.logger import say
from xkd_jax.reporting.nan_guard import Diverged
from xkd_jax.table import Cell, Fields, Table, label
from xkd_jax.validation import validate
from xkd_jax.weights import write_file

_GROUP = "seeds_"  # beginning of the folders of checkpoints of several seeds


def comparison(config: Config) -> tuple[Table, Config]:
    """The table of `config.compare` and `config.seeds`, and the config for all of its runs."""
    names = config.compare or (config.method.name,)
    cells = {name: Cell({"method.name": name}) for name in names}
    several = tuple(config.seeds)
    config = copy.deepcopy(config)
    config.compare = config.seeds = ()
    baseline = "none" if "none" in cells else next(iter(cells))
    measured = several or (config.seed,)
    table = Table(cells, baseline, measured, flat=not several, together=bool(several))
    return table, config


def run(
    table: Table,
    config: Config,
    workdir: Path,
    shard: tuple[int, int] = (1, 1),
    command: str = "",
) -> int:
    """Trains what is left of `table` and writes its report.

    Args:
      table: what to train.
      config: the recipe, for all cells.
      workdir: the table's folder.
      shard: (I, N) for every Nth cell, beginning with the Ith.
      command: the command line, for the runs' summaries and model cards.

    Returns:
      The exit code: 0 when done or after SIGTERM, 130 after Ctrl-C, 1 if a run has failed.

    Raises:
      UserError: any wrong input, before the first run starts.
    """
    names = list(table.cells)[shard[0] - 1 :: shard[1]]
    check_fields(table, config, names)
    run_folder.configure_jax()
    _check_runs(table, config, workdir, names)
    if processes.is_first() and not table.flat:
        table_report.describe(table, workdir)
    total = sum(table.count(table.cells[name]) for name in names)
    sweep = _Sweep(table, config, workdir, total, command)
    try:
        for name in names:
            sweep.train_cell(name, table.cells[name])
            if processes.is_first():
                _report(table, config, workdir, is_last=name == names[-1])
    except _Stopped as stop:
        say(run_folder.how_to_resume(stop.signal, workdir))
        return 130 if stop.signal == signal.SIGINT else 0
    return 1 if sweep.has_failed else 0


def _check_runs(table: Table, config: Config, workdir: Path, names: Sequence[str]) -> None:
    """Finds errors in the cells `names` before the first run starts; makes the cells' folders.

    Raises:
      UserError: any wrong input.
    """
    _check_folder(table, workdir)
    left, done = {}, 0
    for name in names:
        cell = table.cells[name]
        folders = {seed: workdir / table.folder(name, seed) for seed in table.seeds}
        if not cell.stages:
            for seed, folder in folders.items():
                run_folder.is_complete(with_fields(config, {**cell.fields, "seed": seed}), folder)
        complete = [folder for folder in folders.values() if (folder / SUMMARY).exists()]
        done += len(complete)
        if len(complete) < len(folders):
            left[workdir / name] = name
    if done:
        say(f"{done} of {len(names) * len(table.seeds)} runs are complete.")
    with run_folder.removed_if_refused([folder for folder in left if not folder.exists()]):
        for folder, name in left.items():
            with _naming(table, name):
                built = run_folder.check(folder, with_fields(config, table.cells[name].fields))
                if table.together:
                    assert isinstance(built, Experiment)
                    seeds.check(built)


def _check_folder(table: Table, workdir: Path) -> None:
    """Refuses a folder that holds something else."""
    if (workdir / CONFIG).exists():
        held = "a single run"
    elif table.flat and (workdir / table_report.CELLS).exists():
        held = "a table"
    elif not table.flat and any((workdir / name / CONFIG).exists() for name in table.cells):
        held = "a comparison"
    else:
        return
    raise UserError(f"{workdir} holds {held}; choose another --workdir.")


def _report(table: Table, config: Config, workdir: Path, is_last: bool) -> None:
    """Writes the report, and prints it: a comparison's only at its end, with its pictures."""
    if not table.flat:
        print(table_report.write(workdir))
        return
    finished = [workdir / name for name in table.cells if (workdir / name / SUMMARY).exists()]
    if finished:
        if is_last:
            run_folder.draw_pictures(config, finished)
        text = report.write(workdir)
        if is_last:
            print(text)


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
        with _naming(table, name):
            if table.baseline_of(name) not in table.cells:
                raise UserError(f"its baseline, {table.baseline_of(name)}, is not in the table.")
            for fields in (cell.fields, *sum(cell.stages, ())):
                validate(with_fields(config, {**cell.fields, **fields}))


@contextlib.contextmanager
def _naming(table: Table, cell: str) -> Iterator[None]:
    """Puts the cell's name before an error's sentence; in a comparison there are only methods."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if table.flat else f"cell {cell}: {error}") from error


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
      command: the command line.
      passed: the number of runs that are finished or not needed.
      trained: the number of runs that were trained, of those.
      begun: when the first of them began.
      has_failed: whether a run has failed, now or earlier.
      experiment: the last run's; other seeds share its networks and its compiled step.
    """

    table: Table
    config: Config
    workdir: Path
    total: int
    command: str
    passed: int = 0
    trained: int = 0
    begun: float = dataclasses.field(default_factory=time.monotonic)
    has_failed: bool = False
    experiment: Experiment | None = None

    def train_cell(self, name: str, cell: Cell) -> None:
        """Chooses the cell's fields and trains it with every seed.

        Raises:
          _Stopped: by a signal.
        """
        fields, scores, chosen = dict(cell.fields), {}, ""
        varied = {"method.name", *(field for choice in sum(cell.stages, ()) for field in choice)}

        def describe(choice: Fields) -> str:
            return label({name: v for name, v in {**fields, **choice}.items() if name in varied})

        for stage in cell.stages:
            tried = {describe(choice): {**fields, **choice} for choice in stage}
            found = {text: self._try(name, text, other) for text, other in tried.items()}
            chosen = max(found, key=lambda text: found[text])
            fields, scores = tried[chosen], scores | found
        if cell.stages and processes.is_first():
            names = sorted(varied - {"method.name"})
            choice = {"fields": fields, "tried": names, "evaluation_top1": scores}
            path = self.workdir / name / table_report.CHOSEN
            write_file(path, (json.dumps(choice, indent=2) + "\n").encode())
            self._take_over(name, chosen)
        runs = []
        for seed in self.table.seeds:
            config = with_fields(self._config(name), {**fields, "seed": seed})
            runs.append((config, self.workdir / self.table.folder(name, seed)))
        if self.table.together:
            self._train_together(name, runs)
        else:
            for run in runs:
                self._train(*run)

    def _take_over(self, name: str, chosen: str) -> None:
        """Copies the chosen runs whose seeds are measured: only their test is left to do."""
        if self.table.together or self.config.checkpoint_dir or processes.several():
            return  # checkpoints are elsewhere, or other processes could miss the copies
        for seed in set(self.table.tuning_seeds) & set(self.table.seeds):
            tuned = self._tuning_folder(name, chosen, seed)
            folder = self.workdir / self.table.folder(name, seed)
            is_kept = (tuned / SUMMARY).exists() and checkpoint.place(tuned, "").exists()
            if is_kept and not (folder / CONFIG).exists():
                run_folder.copy_training(tuned, folder)

    def _tuning_folder(self, name: str, text: str, seed: int) -> Path:
        return self.workdir / name / "tuning" / f"{text},seed={seed}"

    def _try(self, name: str, text: str, fields: Fields) -> float:
        """The mean top-1 of an alternative on the evaluation split; `text` is its label."""
        scores = []
        for seed in self.table.tuning_seeds:
            config = with_fields(self._config(f"{name}/tuning"), {**fields, "seed": seed})
            config.data.test = config.data.eval  # the test split is not for choices
            folder = self._tuning_folder(name, text, seed)
            self._train(config, folder)
            # A run that diverged has no score.
            scores.append(max(0.0, table_report.read_score(folder)))
        return sum(scores) / len(scores)

    def _config(self, name: str) -> Config:
        """The recipe; the checkpoints of different cells go to different folders."""
        config = copy.deepcopy(self.config)
        if config.checkpoint_dir and not self.table.flat:
            config.checkpoint_dir = f"{config.checkpoint_dir}/{name}"
        return config

    def _train(self, config: Config, folder: Path) -> None:
        self.passed += 1
        if self._is_passed(config, folder):
            return
        folder.mkdir(parents=True, exist_ok=True)
        say(f"run {self.passed} of {self.total}: {folder}")
        begun = time.monotonic()
        try:
            stopped = run_folder.train_one(config, folder, self._create, self.command)
        except Diverged as error:
            stopped = None
            self._fail(folder, error)
        if stopped:
            raise _Stopped(stopped)
        self.trained += 1
        took, mean = time.monotonic() - begun, (time.monotonic() - self.begun) / self.trained
        left = time.strftime("%H:%M", time.gmtime(mean * (self.total - self.passed)))
        say(f"  {_result(folder)} after {took:.0f} s; {left} h left at most")

    def _train_together(self, name: str, runs: Sequence[tuple[Config, Path]]) -> None:
        """Trains the runs of a cell that are left side by side; a run that diverges is left out."""
        left = [run for run in runs if not self._is_passed(*run)]
        while left:
            for _, folder in left:
                folder.mkdir(parents=True, exist_ok=True)
            group = self._group(name, runs, left)
            numbers = "_".join(str(config.seed) for config, _ in group)
            place = self.workdir / name / f"{_GROUP}{numbers}"
            begun = time.monotonic()
            try:
                stopped = run_folder.train_seeds(group, place, self._create_alone, self.command)
            except Diverged as error:
                failed = [folder for _, folder in group if error.folder in (None, folder)]
                for folder in failed:
                    self._fail(folder, error)
                left = [run for run in left if run[1] not in failed]
                continue
            if stopped:
                raise _Stopped(stopped)
            for _, folder in left:
                say(f"  {folder}: {_result(folder)} after {time.monotonic() - begun:.0f} s")
            return

    def _group(
        self, name: str, runs: Sequence[tuple[Config, Path]], left: Sequence[tuple[Config, Path]]
    ) -> Sequence[tuple[Config, Path]]:
        """The runs that an interrupted group of `left` had; otherwise `left`."""
        above, config = self.workdir / name, runs[0][0]
        place = checkpoint.place(above / _GROUP, config.checkpoint_dir)
        place = place.parent if config.checkpoint_dir else place.parent.parent
        wanted = {config.seed for config, _ in left}
        able = {c.seed for c, folder in runs if not (folder / table_report.FAILED).exists()}
        for path in sorted(place.glob(f"{_GROUP}*")) if place.exists() else ():
            found = {int(number) for number in path.name.removeprefix(_GROUP).split("_")}
            if wanted <= found <= able:
                return [run for run in runs if run[0].seed in found]
        return left

    def _is_passed(self, config: Config, folder: Path) -> bool:
        """Whether a run is complete, or has failed, which is said."""
        if run_folder.is_complete(config, folder):
            return True
        failed = folder / table_report.FAILED
        if failed.exists():
            self.has_failed = True
            say(f"{folder} has failed before; remove {failed} to train it again.")
        return failed.exists()

    def _fail(self, folder: Path, error: Diverged) -> None:
        self.has_failed = True
        say(f"{folder}: {error}")
        if processes.is_first():
            write_file(folder / table_report.FAILED, f"{error}\n".encode())

    def _create_alone(self, config: Config) -> Experiment:
        """As `_create`, on one device: the devices share the seeds out, not the batch."""
        return self._create(config, sharding.create_mesh(jax.devices()[:1]))

    def _create(self, config: Config, mesh: Mesh | None = None) -> Experiment:
        """The run's experiment. The last one is kept for runs that differ only in their seed."""
        if self.experiment is None or _seedless(config) != _seedless(self.experiment.config):
            self.experiment = None  # frees the memory of its networks first
            self.experiment = create_experiment(config, mesh)
        self.experiment = self.experiment.with_seed(config)
        return self.experiment


def _result(folder: Path) -> str:
    score = table_report.read_score(folder)
    return "no score" if math.isnan(score) else f"{100 * score:.2f}%"


def _seedless(config: Config) -> Config:
    """The fields that matter to a run; without the seed, unless a random teacher depends on it."""
    fields = used(config)
    return fields if config.teacher.weights == RANDOM else fields | {"seed": None}


class _Stopped(Exception):
    """A signal has stopped a run, whose state is saved."""

    def __init__(self, received: signal.Signals):
        super().__init__(received)
        self.signal = received
