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
from xkd_jax.experiment import Network, Task, load_split
from xkd_jax.methods.base import apply
from xkd_jax.weights import load_weights, save_weights, write_file

SUMMARY = "summary.json"
STUDENT = "student.safetensors"
BEST = "best.safetensors"


def finish(task: Task, student_variables: Any, folder: Path) -> dict[str, Any]:
    """Saves the student, measures it and its teacher on the test split, writes summary.json.

    All processes measure, and the first one writes.

    Args:
      task: what was trained.
      student_variables: `params` and `batch_stats`; nothing of the method is in them.
      folder: the run's.
    """
    config = task.config
    test = load_split(config, config.data.test)
    summary = {
        "method": config.method.name,
        "seed": config.seed,
        "steps": task.total_steps,
        "test": f"{config.data.name} {config.data.test}",
        "student": {"model": config.student.model}
        | describe(task.student, student_variables, test, task),
    }
    if task.teacher:
        variables = task.teacher.variables
        summary["teacher"] = {"weights": config.teacher.weights} | describe(
            task.teacher, variables, test, task
        )
    scores = {"test_top1": summary["student"]["top1"]}
    if processes.is_first():
        save_student(task, student_variables, folder / STUDENT, scores)
        # Written last and at once: a run with a summary is complete.
        write_file(folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def save_student(task: Task, variables: Any, path: Path, scores: dict[str, Any]) -> None:
    """Writes the student with all that is needed to use it.

    Args:
      task: what is trained.
      variables: `params` and `batch_stats`, on the host.
      path: of the file.
      scores: what was measured; goes into the file's metadata.
    """
    config, student = task.config, task.student
    metadata = {
        "model": config.student.model,
        "args": config.student.args.to_dict(),
        "num_classes": task.train.num_classes,
        "class_names": list(task.train.class_names),
        "image_size": student.image_size,
        "mean": list(student.mean),
        "std": list(student.std),
        "source": f"xkd_jax, method {config.method.name}, trained on {config.data.name}",
    }
    save_weights(path, variables, metadata | scores)


class Best:
    """Keeps the student of the best evaluation so far, by its top-1, in `best.safetensors`.

    Args:
      task: what is trained.
      folder: the run's; a file of an earlier call there is only replaced by a better student.
    """

    def __init__(self, task: Task, folder: Path):
        self._task, self._path = task, folder / BEST
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
        host = sharding.to_host(variables, self._task.mesh)
        if processes.is_first():
            measured = {"step": step, "eval_top1": scores["top1"]}
            save_student(self._task, host, self._path, measured)


def describe(network: Network, variables: Any, test: data.Split, task: Task) -> dict[str, Any]:
    """Accuracy on `test`, plain and, if the config asks for it, noisy; parameters; FLOPs."""
    scores = evaluate(create_eval_step(network, test.crop_pct), variables, test, task.mesh)
    if task.config.data.noisy:
        noisy_step = create_eval_step(network, test.crop_pct, noisy=True)
        noisy = evaluate(noisy_step, variables, test, task.mesh)
        scores["noisy_top1"] = noisy["top1"]
    image = jax.ShapeDtypeStruct((1, network.image_size, network.image_size, 3), jnp.float32)
    flops = count_flops(lambda v, x: apply(network.module, v, x, train=False)[0], variables, image)
    return scores | {"parameters": count_parameters(variables["params"]), "flops": flops}
