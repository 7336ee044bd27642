"""The results of a finished run: the student's file and summary.json."""

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from xkd_jax import __version__
from xkd_jax.analysis.flops import count_flops, count_parameters
from xkd_jax.distributed import processes, sharding
from xkd_jax.experiment import Experiment, load_split
from xkd_jax.inputs import AnySplit
from xkd_jax.methods.base import apply
from xkd_jax.model import Model, merge_sources
from xkd_jax.probing.monitor import create_monitor
from xkd_jax.reporting.files import BEST, STUDENT, SUMMARY, read_json, write_file
from xkd_jax.reporting.scores import EVALUATED, MAIN, main_score
from xkd_jax.weights import load_weights, save_weights

_teachers: dict[Any, dict[str, Any]] = {}  # scores, by everything that they depend on


def finish(
    experiment: Experiment, student_variables: Any, folder: Path, command: str
) -> dict[str, Any]:
    """Saves the student, evaluates it and its teacher on the test split, and writes summary.json.

    All processes evaluate; only the first one writes.

    Args:
      experiment: the finished experiment.
      student_variables: the student's `params` and `batch_stats`, without the method's parameters.
      folder: the run's folder.
      command: the command line that trained it, to be recorded.
    """
    config, student = experiment.config, experiment.distiller.student
    task = experiment.distiller.task
    labelled = experiment.train.num_classes > 0
    test = load_split(config, config.data.test) if labelled else experiment.evaluation
    measured = config.monitor if config.monitor.name and not labelled else config.data
    summary = {
        "method": config.method.name,
        "seed": config.seed,
        "steps": experiment.total_steps,
        "train": f"{config.data.name} {config.data.train}",
        "test": f"{measured.name} {measured.test}",
        "devices": f"{len(jax.devices())} {jax.devices()[0].device_kind}",
        "extra_parameters": count_extra(experiment),
        "student": {"model": config.student.model, "image_size": student.image_size}
        | describe(student, student_variables, test, experiment)
        | create_monitor(experiment)(student_variables),
        "sources": list(merge_sources(student, experiment.distiller.teacher)),
        "command": command,
        "versions": list_versions(),
    }
    if labelled:
        summary |= {"test_images": len(test), **task.describe_split(experiment.evaluation)}
    if not (labelled or config.monitor.name):
        summary["test"] = "nothing, for lack of labels"
    if experiment.distiller.teacher:
        named = {"model": experiment.distiller.teacher.name, "weights": config.teacher.weights}
        summary["teacher"] = named | describe_teacher(experiment, test)
    names = [name for name in (*MAIN, "knn_top1") if name in summary["student"]]
    scores = {f"test_{name}": summary["student"][name] for name in names}
    if processes.is_first():
        save_student(experiment, student_variables, folder / STUDENT, scores)
        # Written last and atomically: a run with a summary is complete.
        write_file(folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def list_versions() -> dict[str, str]:
    """The versions of everything that a run's numbers depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    here = {"xkd_jax": __version__, "Python": platform.python_version()}
    return here | {name: importlib.metadata.version(name) for name in names}


def count_extra(experiment: Experiment) -> int:
    """The number of parameters that only training needs: the method's, such as projectors."""
    params = experiment.distiller.state_shapes.params
    return sum(count_parameters(tree) for part, tree in params.items() if part != "student")


def describe_teacher(experiment: Experiment, test: AnySplit) -> dict[str, Any]:
    """As `describe`, for the teacher: once for all runs of a comparison or a table.

    With `teacher.cache` the scores are kept in its folder, for all runs that share it.
    """
    config, teacher = experiment.config, experiment.distiller.teacher
    assert teacher is not None
    measured = (
        teacher.fingerprint, teacher.class_order, teacher.num_classes, config.dtype,
        config.data.noisy, json.dumps(experiment.distiller.task.describe_split(test)),
        test.images.shape, json.dumps(test.identity),
    )  # fmt: skip
    if measured not in _teachers:
        path = _scores_path(config.teacher.cache, measured)
        kept = read_json(path) if path and path.exists() else {}
        _teachers[measured] = kept or describe(teacher, teacher.variables, test, experiment)
        if path and not kept:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, (json.dumps(_teachers[measured], indent=2) + "\n").encode())
    return _teachers[measured]


def _scores_path(cache: str, measured: tuple[Any, ...]) -> Path | None:
    """Where the teacher's scores are kept, if they are.

    Several processes must all evaluate or all not, and may see different files.
    """
    if not cache or jax.process_count() > 1:
        return None
    key = hashlib.sha256(repr((measured, list_versions())).encode()).hexdigest()
    return Path(cache) / f"scores_{key[:16]}.json"


def headline(experiment: Experiment, folder: Path) -> str:
    """What is about to be trained, in a few lines for the terminal."""
    config, distiller, train = experiment.config, experiment.distiller, experiment.train
    parameters = count_parameters(distiller.student.shapes["params"])
    taught = about = ""
    if distiller.teacher:
        taught = f", taught by {distiller.teacher.name} ({config.teacher.weights})"
        outs = distiller.teacher.output_shapes, distiller.student.output_shapes
        about = distiller.method.describe(*outs)
    devices = jax.devices()
    labels = f"{train.num_classes} classes; evaluated on {config.data.eval}"
    if not train.num_classes:
        watched = f"{config.monitor.name} {config.monitor.test}" if config.monitor.name else ""
        labels = f"no labels; {f'monitored on {watched}' if watched else 'not evaluated'}"
    return (
        f"{config.method.name}: {config.student.model} ({parameters:,} parameters){taught}\n"
        f"  data: {config.data.name} {config.data.train}, {len(train):,} images, {labels}\n"
        f"  {config.epochs} epochs of {distiller.steps_per_epoch} steps, batch "
        f"{config.batch_size}, on {len(devices)} {devices[0].device_kind}\n"
        f"  folder: {folder}" + (f"\n  {about}" if about else "")
    )


def save_student(
    experiment: Experiment, variables: Any, path: Path, scores: dict[str, Any]
) -> None:
    """Writes the student with the metadata needed to use it.

    Args:
      experiment: the experiment being trained.
      variables: `params` and `batch_stats`, on the host.
      path: path of the file.
      scores: scores to record in the file's metadata.
    """
    config, student = experiment.config, experiment.distiller.student
    # Without labels, the student's classes are the teacher's, if it has any.
    labels = experiment.train if experiment.train.num_classes else student
    metadata = {
        "model": config.student.model,
        "args": config.student.args.to_dict(),
        "num_classes": labels.num_classes,
        "class_names": list(labels.class_names),
        "image_size": student.image_size,
        "mean": list(student.mean),
        "std": list(student.std),
        "source": f"xkd_jax, method {config.method.name}, trained on {config.data.name}",
        "sources": list(merge_sources(student, experiment.distiller.teacher)),
    }
    metadata |= experiment.distiller.task.describe_split(experiment.evaluation)
    save_weights(path, variables, metadata | scores)


class Best:
    """Keeps the student with the best evaluation score so far in `best.safetensors`.

    The score is the main one of `scores.MAIN`: without labels the top-1 of the monitor's linear
    probe; without a monitor the last student counts as the best one.

    Args:
      experiment: the experiment being trained.
      folder: the run's folder; a resumed run only replaces an existing file by a better student.
    """

    def __init__(self, experiment: Experiment, folder: Path):
        self._experiment, self._path = experiment, folder / BEST
        metadata = load_weights(self._path)[1] if self._path.exists() else {}
        score = next((metadata[name] for name in EVALUATED if name in metadata), -1.0)
        # Only the first process may be able to see the folder, but all must agree on the best.
        self._score = float(multihost_utils.broadcast_one_to_all(np.float32(score)))

    def update(self, step: int, variables: Any, scores: dict[str, float]) -> None:
        """Writes the student if its score is higher; ties keep the earlier one.

        Args:
          step: the step after which it was evaluated.
          variables: `params` and `batch_stats`, on the devices.
          scores: scores on the evaluation split.
        """
        name = main_score(scores)
        if name:
            score = float(np.float32(scores[name]))
            if score <= self._score:
                return
            self._score = score
        host = sharding.to_host(variables, self._experiment.mesh)
        if processes.is_first():
            measured = {"step": step} | ({f"eval_{name}": scores[name]} if name else {})
            save_student(self._experiment, host, self._path, measured)


def describe(
    model: Model, variables: Any, test: AnySplit, experiment: Experiment
) -> dict[str, Any]:
    """The task's scores on `test` and, with `data.noisy`, noisy accuracy; parameters and FLOPs.

    There are no scores without labels or without a classifier.
    """
    scores, task = {}, experiment.distiller.task
    classifies = model.num_classes and experiment.train.num_classes
    if classifies:
        scores = task.evaluate(model, variables, test, experiment.mesh)
    if classifies and experiment.config.data.noisy:
        noisy = task.evaluate(model, variables, test, experiment.mesh, noisy=True)
        scores["noisy_top1"] = noisy["top1"]
    return scores | cost(model, variables)


def cost(model: Model, variables: Any) -> dict[str, int]:
    """The number of parameters, and FLOPs of a forward pass over one image."""
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)

    def forward(variables: Any, images: jax.Array) -> jax.Array:
        logits, out = apply(model.module, variables, images, train=False)
        return out["pooled"] if logits is None else logits

    flops = count_flops(forward, variables, image)
    return {"parameters": count_parameters(variables["params"]), "flops": flops}
