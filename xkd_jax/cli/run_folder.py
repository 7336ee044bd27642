"""The folder of a run: checks it, trains in it, and resumes what it holds."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from xkd_jax import checkpoint, seeds, train
from xkd_jax.analysis import pictures as analysis
from xkd_jax.analysis.finished import load_runs
from xkd_jax.cli import lock
from xkd_jax.config import Config, default_config, used
from xkd_jax.distributed import processes, sharding
from xkd_jax.errors import UserError
from xkd_jax.experiment import Experiment, create_experiment
from xkd_jax.probing import probe
from xkd_jax.reporting import files, model_card, pictures, summary
from xkd_jax.reporting.logger import say
from xkd_jax.reporting.recipe import FREE
from xkd_jax.weights import write_file


def how_to_resume(received: signal.Signals, workdir: Path) -> str:
    """The sentence after a signal."""
    return (
        f"stopped by {received.name}; everything is saved in {workdir}: run the same command "
        "again to resume."
    )


def configure_jax() -> None:
    """Turns 64-bit mode off and the compilation cache on."""
    if jax.config.read("jax_enable_x64"):  # other numbers would be drawn, and float64 weights saved
        say("JAX's 64-bit mode is switched off for this run (JAX_ENABLE_X64).")
        jax.config.update("jax_enable_x64", False)
    # Saves about a minute of compilation when the same networks are trained again.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xkd_jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def draw_pictures(config: Config, folders: Iterable[Path]) -> None:
    """Draws what finished runs have learned, if `config.pictures` says so and they lack pictures.

    Only in a single process: with several, every step would take all of them.
    """
    left = [path for path in folders if not (path / pictures.FOLDER / pictures.CAPTIONS).exists()]
    if not config.pictures or config.probe.pool or processes.several() or not left:
        return
    say("drawing pictures ...")
    try:
        analysis.draw(load_runs(left))
    except (UserError, OSError) as error:  # the runs are complete without them
        say(f"there are no pictures: {error}")


def train_one(
    config: Config,
    folder: Path,
    create: Callable[[Config], Experiment] = create_experiment,
    command: str = "",
) -> signal.Signals | None:
    """Trains and evaluates the run in `folder`, which exists, and resumes it if it was interrupted.

    Args:
      config: the run's.
      folder: the run's.
      create: `create_experiment`, or a function that reuses parts of an earlier experiment.
      command: the command line, for the summary and the model card.

    Returns:
      The signal that stopped it early, if any.

    Raises:
      UserError: any wrong input; or a file can't be read or written, such as on a full disk.
    """
    with _held([folder]):
        _keep_config(config, folder)
        if config.probe.pool:
            job = probe.create_probe(config)
            _check_data(job, folder)
            say(probe.describe(job, folder))
            probe.run(job, folder, command)
            model_card.write(folder)
            return None
        experiment = create(config)
        _check_data(experiment, folder)
        say(summary.headline(experiment, folder))
        state, stopped = train.run(experiment, folder)
        if stopped and int(state.step) < experiment.total_steps:
            return stopped
        _finish(experiment, train.student_variables(state), folder, command)
        return stopped


def train_seeds(
    runs: Sequence[tuple[Config, Path]],
    checkpoints: Path,
    create: Callable[[Config], Experiment],
    command: str,
) -> signal.Signals | None:
    """As `train_one`, for runs that differ in nothing but their seed, side by side.

    Args:
      runs: the config and the folder of each; those that are finished stay as they are.
      checkpoints: the folder of the group's checkpoints, see `checkpoint.place`.
      create: from a config to its experiment, on one device.
      command: the command line, for the summaries and the model cards.
    """
    folders = [folder for _, folder in runs]
    with _held(folders):
        experiments = []
        for config, folder in runs:
            _keep_config(config, folder)
            experiments.append(create(config))
            _check_data(experiments[-1], folder)
        seeds.check(experiments[0])
        text = ", ".join(str(config.seed) for config, _ in runs)
        say(f"seeds {text} side by side: {summary.headline(experiments[0], folders[0].parent)}")
        group, place = seeds.SideBySide(experiments), experiments[0].config.checkpoint_dir
        state, stopped = train.run_group(group, folders, checkpoint.place(checkpoints, place))
        if stopped and int(state.step) < experiments[0].total_steps:
            return stopped
        students = group.students(state)
        for experiment, variables, folder in zip(experiments, students, folders, strict=True):
            if not (folder / files.SUMMARY).exists():
                _finish(experiment, variables, folder, command)
        return stopped


@contextlib.contextmanager
def _held(folders: Sequence[Path]) -> Iterator[None]:
    """Keeps other processes out of the folders.

    Raises:
      UserError: another process trains in one; or a file can't be read or written.
    """
    try:
        with contextlib.ExitStack() as stack:
            for folder in folders if processes.is_first() else ():
                stack.enter_context(lock.hold(folder))
            yield
    except OSError as error:
        raise UserError(
            f"training stopped because a file can't be read or written ({error}); checkpoints "
            "are kept: fix the cause, then run the same command again to resume."
        ) from error


def _keep_config(config: Config, folder: Path) -> None:
    if processes.is_first() and not (folder / files.CONFIG).exists():
        write_file(folder / files.CONFIG, (json.dumps(used(config), indent=2) + "\n").encode())


def _finish(experiment: Experiment, variables: Any, folder: Path, command: str) -> None:
    """Evaluates the student with these variables, and writes the run's results."""
    if experiment.train.num_classes:
        say(f"evaluating on {experiment.config.data.test!r}, the test split ...")
    summary.finish(experiment, sharding.to_host(variables, experiment.mesh), folder, command)
    if processes.is_first():
        model_card.write(folder)


def _check_data(experiment: Experiment | probe.Probe, folder: Path) -> None:
    """Refuses to resume a run with other data than it began with; a moved folder is the same data.

    Raises:
      UserError: names the first thing that differs.
    """
    path, splits = folder / files.DATA, {"train": experiment.train, "eval": experiment.evaluation}
    here = {name: split.identity for name, split in splits.items()}
    if not path.exists():
        if processes.is_first():
            write_file(path, (json.dumps(here, indent=2) + "\n").encode())
        return
    there = files.read_json(path)
    for name, split in here.items():
        difference = _data_difference(there.get(name, {}), split)
        if difference:
            raise UserError(
                f"the run in {folder} began with other data: data.{name}: {difference}; restore "
                "the data, or choose another --workdir."
            )


def _data_difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs between two identities of a split, in words; "" if nothing does."""
    names = there.get("class_names", []), here["class_names"]
    for label, (before, now) in enumerate(itertools.zip_longest(*names)):
        if before != now:
            return f"class {label} was {before!r} and is {now!r} now"
    if there.get("examples") != here["examples"]:
        return f"there were {there.get('examples'):,} images and are {here['examples']:,} now"
    if there.get("digest") != here["digest"]:
        return "the images' names or labels have changed"
    return ""


def check(folder: Path, config: Config) -> Experiment | probe.Probe:
    """Makes the run's folder and builds the run once, to find errors before anything is trained.

    Returns:
      What was built.

    Raises:
      UserError: any wrong input, or another process trains in `folder`.
    """
    if processes.is_first():
        lock.check(folder)
    _make(folder)
    return probe.create_probe(config) if config.probe.pool else create_experiment(config)


def copy_training(source: Path, folder: Path) -> None:
    """Gives the new run in `folder` what the finished one in `source` has trained.

    The new run must differ in nothing that matters to training. Its checkpoints come last: without
    them it would be trained again.

    Raises:
      UserError: a file can't be read or written, such as on a full disk.
    """
    here = checkpoint.place(folder, "")
    part = here.with_name(f".{here.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (files.METRICS, files.BEST):
            if (source / name).exists():
                shutil.copy2(source / name, folder / name)
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(checkpoint.place(source, ""), part)
        shutil.rmtree(here, ignore_errors=True)
        part.rename(here)
    except OSError as error:
        raise UserError(
            f"the chosen run in {source} can't be copied to {folder} ({error}); fix the cause, "
            "then run the same command again."
        ) from error


@contextlib.contextmanager
def removed_if_refused(folders: list[Path]) -> Iterator[None]:
    """Removes the new `folders`, and new ones above them, if the runs are refused."""
    above = {parent for folder in folders for parent in folder.parents if not parent.exists()}
    try:
        yield
    except UserError:
        for folder in sorted({*folders, *above}, key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):  # not made, or not empty
                folder.rmdir()
        raise


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} can't be written ({error.strerror}); choose another --workdir."
        ) from error


def is_complete(config: Config, folder: Path) -> bool:
    """Whether the run in `folder` is finished.

    Raises:
      UserError: the folder contains another run.
    """
    path = folder / files.CONFIG
    if path.exists():
        there, here = files.read_json(path), json.loads(json.dumps(used(config)))
        default = json.loads(json.dumps(default_config().to_dict()))
        differences = list(_differences(there, here, default))
        if differences:
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            raise UserError(
                f"{folder} holds another run: {'; '.join(differences[:3])}{more}; choose another "
                "--workdir."
            )
    return (folder / files.SUMMARY).exists()


def _differences(there: Any, here: Any, default: Any, name: str = ""):
    """Yields a phrase for every field in which two configs differ.

    A field that is missing there, because it is newer than the run, had what is its default now.
    """
    if isinstance(there, dict) and isinstance(here, dict):
        default = default if isinstance(default, dict) else {}
        for field in sorted(there.keys() | here.keys()):
            inner, usual = f"{name}.{field}" if name else field, default.get(field)
            yield from _differences(there.get(field, usual), here.get(field), usual, inner)
    elif there != here and name not in FREE:
        yield f"{name} is {there!r} there and {here!r} here"
