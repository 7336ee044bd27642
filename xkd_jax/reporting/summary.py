"""What a finished run leaves: the student's file and summary.json."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from xkd_jax import data
from xkd_jax.analysis.flops import count_flops, count_parameters
from xkd_jax.distributed import processes, sharding
from xkd_jax.evaluate import create_eval_step, evaluate
from xkd_jax.experiment import Experiment, load_split
from xkd_jax.methods.base import apply
from xkd_jax.model import Model
from xkd_jax.weights import load_weights, save_weights, write_file

SUMMARY = "summary.json"
STUDENT = "student.safetensors"
BEST = "best.safetensors"


def finish(experiment: Experiment, student_variables: Any, folder: Path) -> dict[str, Any]:
    """Saves the student, measures it and its teacher on the test split, writes summary.json.

    All processes measure, and the first one writes.

    Args:
      experiment: what was trained.
      student_variables: `params` and `batch_stats`; nothing of the method is in them.
      folder: the run's.
    """
    config = experiment.config
    test = load_split(config, config.data.test)
    summary = {
        "method": config.method.name,
        "seed": config.seed,
        "steps": experiment.total_steps,
        "test": f"{config.data.name} {config.data.test}",
        "student": {"model": config.student.model}
        | describe(experiment.distiller.student, student_variables, test, experiment),
    }
    if experiment.distiller.teacher:
        variables = experiment.distiller.teacher.variables
        summary["teacher"] = {"weights": config.teacher.weights} | describe(
            experiment.distiller.teacher, variables, test, experiment
        )
    scores = {"test_top1": summary["student"]["top1"]}
    if processes.is_first():
        save_student(experiment, student_variables, folder / STUDENT, scores)
        # Written last and at once: a run with a summary is complete.
        write_file(folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def save_student(
    experiment: Experiment, variables: Any, path: Path, scores: dict[str, Any]
) -> None:
    """Writes the student with all that is needed to use it.

    Args:
      experiment: what is trained.
      variables: `params` and `batch_stats`, on the host.
      path: of the file.
      scores: what was measured; goes into the file's metadata.
    """
    config, student = experiment.config, experiment.distiller.student
    metadata = {
        "model": config.student.model,
        "args": config.student.args.to_dict(),
        "num_classes": experiment.train.num_classes,
        "class_names": list(experiment.train.class_names),
        "image_size": student.image_size,
        "mean": list(student.mean),
        "std": list(student.std),
        "source": f"xkd_jax, method {config.method.name}, trained on {config.data.name}",
    }
    save_weights(path, variables, metadata | scores)


class Best:
    """Keeps the student of the best evaluation so far, by its top-1, in `best.safetensors`.

    Args:
      experiment: what is trained.
      folder: the run's; a file of an earlier call there is only replaced by a better student.
    """

    def __init__(self, experiment: Experiment, folder: Path):
        self._experiment, self._path = experiment, folder / BEST
        top1 = load_weights(self._path)[1]["eval_top1"] if self._path.exists() else -1.0
        # The folder may be the first process's own. All have to agree on what is better.
        self._top1 = float(multihost_utils.broadcast_one_to_all(np.float32(top1)))

    def update(self, step: int, variables: Any, scores: dict[str, float]) -> None:
        """Writes the student if `scores` are better, and of equals the first.

        Args:
          step: after which it was measured.
          variables: `params` and `batch_stats`, on the devices.
          scores: of the evaluation split.
        """
        top1 = float(np.float32(scores["top1"]))
        if top1 <= self._top1:
            return
        self._top1 = top1
        host = sharding.to_host(variables, self._experiment.mesh)
        if processes.is_first():
            measured = {"step": step, "eval_top1": scores["top1"]}
            save_student(self._experiment, host, self._path, measured)


def describe(
    model: Model, variables: Any, test: data.Split, experiment: Experiment
) -> dict[str, Any]:
    """Accuracy on `test`, plain and, if the config asks for it, noisy; parameters; FLOPs."""
    scores = evaluate(create_eval_step(model, test.crop_pct), variables, test, experiment.mesh)
    if experiment.config.data.noisy:
        noisy_step = create_eval_step(model, test.crop_pct, noisy=True)
        noisy = evaluate(noisy_step, variables, test, experiment.mesh)
        scores["noisy_top1"] = noisy["top1"]
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    flops = count_flops(lambda v, x: apply(model.module, v, x, train=False)[0], variables, image)
    return scores | {"parameters": count_parameters(variables["params"]), "flops": flops}
