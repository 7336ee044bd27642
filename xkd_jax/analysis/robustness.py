"""Accuracy on corrupted test images: the noisy protocol of Fig. 3(a), and common corruptions."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from xkd_jax.analysis.finished import Finished, spread
from xkd_jax.augment.common_corruptions import CORRUPTIONS, SEVERITIES, corrupt
from xkd_jax.data import Split
from xkd_jax.data.progress import Progress
from xkd_jax.errors import UserError, unknown
from xkd_jax.evaluate import create_eval_step, evaluate
from xkd_jax.model import Model

CLEAN, NOISY = "clean", "noisy"


class Accuracy(NamedTuple):
    """The accuracy of one network on one version of the test images.

    Attributes:
      model: a run's name, "teacher", or, if there are several, "teacher of" a run.
      corruption: `CLEAN`, `NOISY` or a key of `CORRUPTIONS`.
      severity: 1 to 5; 0 for the first two.
      top1: in [0, 1].
    """

    model: str
    corruption: str
    severity: int
    top1: float


def measure(
    runs: list[Finished], mesh: Mesh, images: int = 0, corruptions: Sequence[str] = ()
) -> list[Accuracy]:
    """The accuracy of all runs' students and teachers under every corruption and severity.

    All networks with the same test split see the same corrupted images, rounded to uint8.

    Args:
      runs: the finished runs.
      mesh: the devices.
      images: test images, at most; 0: all.
      corruptions: keys of `CORRUPTIONS`; none: all.

    Raises:
      UserError: the data have no labels, or there is no such corruption.
    """
    for name in corruptions:
        if name not in CORRUPTIONS:
            raise unknown("corruption", name, CORRUPTIONS)
    for run in runs:
        if not run.experiment.train.num_classes:
            raise UserError(f"{run.name} was trained without labels, so it has no accuracy.")
    groups: dict[int, list[Finished]] = {}  # by test split; equal ones are the same object
    for run in runs:
        groups.setdefault(id(run.test), []).append(run)
    versions = [(CLEAN, 0), (NOISY, 0)]
    versions += [(name, severity) for name in corruptions or CORRUPTIONS for severity in SEVERITIES]
    models = {number: _models(group) for number, group in groups.items()}
    found: list[Accuracy] = []
    total = len(versions) * sum(map(len, models.values()))
    with Progress("evaluations", total, "evaluations") as progress:
        for number, group in groups.items():
            test = spread(group[0].test, images)
            for row in _evaluate_all(models[number], test, versions, mesh):
                found.append(row)
                progress.update(1)
    return found


def _models(runs: list[Finished]) -> dict[str, Model]:
    """The students by the name of their run, after the teachers that have a classifier for them."""
    teachers: dict[tuple, str] = {}
    models: dict[str, Model] = {}
    for run in runs:
        teacher = run.experiment.distiller.teacher  # its classes are in the student's order
        if teacher is not None and teacher.num_classes == run.student.num_classes:
            name = teachers.setdefault((teacher.fingerprint, teacher.class_order), run.name)
            models[f"teacher of {name}"] = teacher
    if len(models) == 1:
        models = {"teacher": models.popitem()[1]}
    return models | {run.name: run.student for run in runs}


def _evaluate_all(
    models: dict[str, Model], test: Split, versions: list[tuple[str, int]], mesh: Mesh
) -> Iterator[Accuracy]:
    steps = {name: create_eval_step(model, test.crop_pct) for name, model in models.items()}
    for corruption, severity in versions:
        split = _version(test, corruption, severity)
        for name, model in models.items():
            noisy = corruption == NOISY
            step = create_eval_step(model, test.crop_pct, noisy=True) if noisy else steps[name]
            top1 = evaluate(step, model.variables, split, mesh)["top1"]
            yield Accuracy(name, corruption, severity, top1)


def _version(test: Split, corruption: str, severity: int) -> Split:
    if corruption in (CLEAN, NOISY):
        return test
    return dataclasses.replace(test, images=corrupt(corruption, severity, test.images))


def means(rows: list[Accuracy], model: str) -> dict[str, float]:
    """A model's mean over the severities of each corruption; one value for the first two."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.model == model:
            found.setdefault(row.corruption, []).append(row.top1)
    return {name: float(np.mean(values)) for name, values in found.items()}
