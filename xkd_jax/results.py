"""What a finished run leaves: the student's file and summary.json."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from xkd_jax import data
from xkd_jax.analysis.flops import count_flops, count_parameters
from xkd_jax.evaluate import create_eval_step, evaluate
from xkd_jax.methods.base import apply
from xkd_jax.task import Network, Task, load_split
from xkd_jax.weights import save_weights

SUMMARY = "summary.json"
STUDENT = "student.safetensors"


def finish(task: Task, student_variables: Any, folder: Path) -> dict[str, Any]:
    """Saves the student, measures it and its teacher on the test split, writes summary.json.

    Args:
      task: what was trained.
      student_variables: `params` and `batch_stats`; nothing of the method is in them.
      folder: the run's.
    """
    config, student = task.config, task.student
    test = load_split(config, config.data.test)
    summary = {
        "method": config.method.name,
        "seed": config.seed,
        "steps": task.total_steps,
        "test": f"{config.data.name} {config.data.test}",
        "student": {"model": config.student.model}
        | describe(student, student_variables, test, task),
    }
    if task.teacher:
        variables = task.teacher.variables
        summary["teacher"] = {"weights": config.teacher.weights} | describe(
            task.teacher, variables, test, task
        )
    metadata = {
        "model": config.student.model,
        "args": config.student.args.to_dict(),
        "num_classes": test.num_classes,
        "class_names": list(test.class_names),
        "image_size": student.image_size,
        "mean": list(student.mean),
        "std": list(student.std),
        "source": f"xkd_jax, method {config.method.name}, trained on {config.data.name}",
        "test_top1": summary["student"]["top1"],
    }
    save_weights(folder / STUDENT, student_variables, metadata)
    # Written last and at once: a run with a summary is complete.
    part = folder / f"{SUMMARY}.part"
    part.write_text(json.dumps(summary, indent=2) + "\n")
    part.replace(folder / SUMMARY)
    return summary


def describe(network: Network, variables: Any, test: data.Split, task: Task) -> dict[str, Any]:
    """Accuracy on `test`, plain and, if the config asks for it, noisy; parameters; FLOPs."""
    scores = evaluate(create_eval_step(network), variables, test, task.mesh)
    if task.config.data.noisy:
        noisy = evaluate(create_eval_step(network, noisy=True), variables, test, task.mesh)
        scores["noisy_top1"] = noisy["top1"]
    image = jax.ShapeDtypeStruct((1, network.image_size, network.image_size, 3), jnp.float32)
    flops = count_flops(lambda v, x: apply(network.module, v, x, train=False)[0], variables, image)
    return scores | {"parameters": count_parameters(variables["params"]), "flops": flops}
