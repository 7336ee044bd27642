"""Finished runs, loaded again: networks, data, and what the method has learned."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from xkd_jax.checkpoint import Checkpoints, place
from xkd_jax.config import Config, default_config, has_field
from xkd_jax.data import Split
from xkd_jax.errors import UserError
from xkd_jax.experiment import (
    Experiment,
    create_experiment,
    create_teacher,
    load_split,
    load_teacher_file,
)
from xkd_jax.methods.base import Method
from xkd_jax.methods.cakd import CAKD
from xkd_jax.methods.combine import Sum
from xkd_jax.model import Model, load
from xkd_jax.models import DETECTORS
from xkd_jax.reporting import files
from xkd_jax.reporting.files import STUDENT
from xkd_jax.reporting.report import find_runs
from xkd_jax.validation import validate


@dataclasses.dataclass(frozen=True, eq=False)
class Finished:
    """A finished run.

    Attributes:
      name: for tables: the folder's name, after that of its comparison.
      folder: the run's folder.
      experiment: what its config builds; its own student has no trained weights.
      student: the student, from student.safetensors.
      teacher: the config's teacher, even if the method doesn't use one; None if it names none.
      test: the test split.
    """

    name: str
    folder: Path
    experiment: Experiment
    student: Model
    teacher: Model | None
    test: Split


def load_runs(folders: list[Path], data_dir: str = "") -> list[Finished]:
    """The finished runs in these folders: runs, comparisons, or cells of a table.

    Args:
      folders: of runs or comparisons.
      data_dir: where the data are now, if not where they were; see `config.data.dir`.

    Raises:
      UserError: a folder has no finished run, or something that a run needs is missing or damaged.
    """
    found = {path: name for folder in folders for name, path in _named(folder)}
    return [_load(path, name, data_dir) for path, name in found.items()]


def _named(folder: Path) -> list[tuple[str, Path]]:
    runs, whole = find_runs(folder), folder.absolute().name
    return [(whole if path == folder else f"{whole}/{name}", path) for name, path in runs.items()]


def _load(folder: Path, name: str, data_dir: str) -> Finished:
    config = read_config(folder / files.CONFIG)
    if config.probe.pool:
        raise UserError(f"{folder} is a probe, which has no student; give a run that trained one.")
    if config.student.model in DETECTORS:
        raise UserError(f"{folder} trained a detector; give runs that trained classifiers.")
    with config.unlocked():
        config.data.dir = data_dir or config.data.dir
        config.teacher.cache = ""  # the cache is of training images
    validate(config)
    experiment = create_experiment(config)
    teacher = experiment.distiller.teacher
    if teacher is None and (config.teacher.weights or config.teacher.model):
        teacher = create_teacher(config, experiment.train, load_teacher_file(config))
    test = load_split(config, config.data.test) if experiment.train.num_classes else None
    return Finished(
        name, folder, experiment, load(folder / STUDENT), teacher, test or experiment.evaluation
    )


def read_config(path: Path) -> Config:
    """The config of a run, from its config.json.

    Raises:
      UserError: the file is missing, damaged, or from another version.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; give the folder of a finished run.")
    saved, config = files.read_json(path), default_config()
    fields = list(_flat(saved)) if isinstance(saved, dict) else []
    strange = [name for name in fields if not has_field(config, name)]
    if strange or not fields:
        raise UserError(
            f"{path} is from another version of xkd_jax ({(strange or ['no fields'])[0]}); "
            "analyse the run with the version that trained it."
        )
    try:
        with config.unlocked():
            config.update(saved)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} has a value of the wrong type ({error}); restore the file."
        ) from error
    return config


def _flat(fields: dict[str, Any], prefix: str = ""):
    """The names "a.b" of the nested fields, down to a network's arguments."""
    for name, value in fields.items():
        if isinstance(value, dict) and name != "args":
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def cakd_part(run: Finished) -> tuple[CAKD, Any] | None:
    """The run's cakd and its trained parameters; None if it has none, or no checkpoint is left.

    Raises:
      UserError: the checkpoint is damaged or belongs to another teacher.
    """
    method = run.experiment.distiller.method
    part = find_cakd(method)
    if part is None:
        return None
    params = _method_params(run)
    if params is None:
        return None
    return part, params["cakd"] if isinstance(method, Sum) else params


def find_cakd(method: Method) -> CAKD | None:
    """The cakd that a method is, or that is one of its parts."""
    parts = [part for _, part in method.parts] if isinstance(method, Sum) else [method]
    return next((part for part in parts if isinstance(part, CAKD)), None)


def _method_params(run: Finished) -> Any | None:
    """The method's parameters in the run's last checkpoint, if there is one."""
    config, distiller = run.experiment.config, run.experiment.distiller
    folder = place(run.folder, config.checkpoint_dir)
    if not folder.exists():
        return None
    fingerprint = distiller.teacher.fingerprint if distiller.teacher else ""
    checkpoints = Checkpoints(folder, config.keep_checkpoints, fingerprint)
    try:
        state = checkpoints.restore(distiller.state_shapes)
    finally:
        checkpoints.close()
    return None if state is None else state.params["method"]


def spread(split: Split, count: int) -> Split:
    """At most `count` images of a split, the same share of every class; 0: all of them."""
    if not 0 < count < len(split):
        return split
    return _take(split, np.sort(_rows_by_class(split, count)))


def by_class(split: Split, count: int) -> Split:
    """At most `count` images of a split, the same share of every class, in the classes' order."""
    return _take(split, _rows_by_class(split, min(count, len(split))))


def _rows_by_class(split: Split, count: int) -> np.ndarray:
    """`count` rows, evenly spaced after sorting by class.

    In the split's own order, where classes may take turns, even spacing would miss some of them.
    """
    order = np.argsort(np.asarray(split.labels), kind="stable")
    return order[np.arange(count) * len(split) // count]


def _take(split: Split, rows: np.ndarray) -> Split:
    labels = np.asarray(split.labels)[rows]
    return dataclasses.replace(split, images=split.images[rows], labels=labels)
