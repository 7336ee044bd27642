"""What is measured during training: the task's scores, and what a labelled set says of features."""

from collections.abc import Callable
from typing import Any

import numpy as np

from xkd_jax.experiment import Experiment, load_monitor
from xkd_jax.probing.features import compute, create_feature_step
from xkd_jax.probing.linear import accuracy, fit_linear, knn_accuracy

STRENGTH = 1e-3  # L2 of the monitor's probe, which is not tuned: it only has to be comparable

Evaluator = Callable[[Any], dict[str, float]]


def create_evaluator(experiment: Experiment) -> Evaluator:
    """A function from the student's variables to its scores for the learning curves.

    With labels, those of the task on `data.eval`; with `config.monitor`, `create_monitor`'s too.
    """
    student, task = experiment.distiller.student, experiment.distiller.task
    monitor = create_monitor(experiment)

    def evaluator(variables: Any) -> dict[str, float]:
        scores = {}
        if experiment.train.num_classes:
            scores = task.evaluate(student, variables, experiment.evaluation, experiment.mesh)
        return scores | monitor(variables)

    return evaluator


def create_monitor(experiment: Experiment) -> Evaluator:
    """A function from the student's variables to scores of its pooled features.

    `probe_top1`, of a linear probe, and `knn_top1`, in [0, 1]: fitted to `config.monitor.train`,
    measured on `config.monitor.test`. Without a monitor there are none.
    """
    splits, student = load_monitor(experiment.config), experiment.distiller.student
    if splits is None:
        return lambda variables: {}
    steps = [create_feature_step(student, split.crop_pct) for split in splits]

    def monitor(variables: Any) -> dict[str, float]:
        train, test = (
            (compute(step, variables, split, experiment.mesh), np.asarray(split.labels))
            for step, split in zip(steps, splits, strict=True)
        )
        classes = splits[0].num_classes
        (linear,) = fit_linear(*train, classes, [STRENGTH])
        return {
            "probe_top1": accuracy(linear(test[0]), test[1])["top1"],
            "knn_top1": knn_accuracy(train, test, classes),
        }

    return monitor
