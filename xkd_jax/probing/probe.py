"""A linear classifier on a frozen teacher's features: `configs/probe_teacher.py`.

Any network becomes a teacher of the data's classes this way, without training it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from xkd_jax import data
from xkd_jax.config import Config
from xkd_jax.data.encoded import crop_share
from xkd_jax.distributed import processes, sharding
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_teacher, load_split, load_teacher_file
from xkd_jax.model import Model
from xkd_jax.models.vit import VisionTransformer
from xkd_jax.probing.features import compute_to_file, create_feature_step
from xkd_jax.probing.linear import Linear, accuracy, choose_strength, fit_linear, knn_accuracy
from xkd_jax.reporting import files
from xkd_jax.reporting.files import SUMMARY, TEACHER
from xkd_jax.reporting.logger import say
from xkd_jax.reporting.summary import cost, list_versions
from xkd_jax.teacher.classes import without_classifier
from xkd_jax.weights import write_file

FEATURES = "features"  # folder of a run's features
_POOLS = {"cls": "token", "mean": "avg", "both": "token_avg"}  # as `VisionTransformer` calls them


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """Everything that a config describes.

    Attributes:
      teacher: the frozen network, without a classifier, pooled as `config.probe.pool` says.
      train: the split that the classifier is fitted to.
      evaluation: the test split.
      mesh: the devices.
      config: the config.
    """

    teacher: Model
    train: data.Split
    evaluation: data.Split
    mesh: Mesh
    config: Config


def create_probe(config: Config) -> Probe:
    """Loads everything that `config` names and checks that it fits together.

    Raises:
      UserError: something is missing, damaged or incompatible.
    """
    if processes.several():
        raise UserError("a probe runs in one process; start it with --num_processes=1.")
    file = load_teacher_file(config)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.image_size = config.image_size or file[1].get("image_size", 0)
    train, test = (load_split(config, split) for split in (config.data.train, config.data.test))
    _check_labels(config, train)
    teacher = with_pool(without_classifier(create_teacher(config, train, file)), config.probe.pool)
    return Probe(teacher, train, test, sharding.create_mesh(), config)


def with_pool(model: Model, pool: str) -> Model:
    """The model with another `pooled`; its weights stay the same.

    Args:
      model: a network.
      pool: "cls", the class token; "mean", the mean of the patch tokens; "both", one after the
        other; or "pooled", the network's own.

    Raises:
      UserError: the network has no such tokens.
    """
    if pool == "pooled":
        return model
    module: Any = model.module
    has = isinstance(module, VisionTransformer) and not module.distilled
    if not has or not (module.class_token or pool == "mean"):
        raise UserError(
            f"probe.pool={pool} needs a ViT with {'' if pool == 'mean' else 'a class token and '}"
            f"one head, but the teacher is a {model.name}; take probe.pool=pooled."
        )
    if "fc_norm" in model.shapes["params"]:
        raise UserError(
            f"probe.pool={pool} needs normalised tokens, but this teacher normalises after its own "
            "pooling; take probe.pool=pooled."
        )
    args = {"global_pool": _POOLS[pool], "fc_norm": False}
    variables = model.variables
    if variables is not None:  # without SigLIP's pooling
        params = {k: v for k, v in variables["params"].items() if k != "attn_pool"}
        variables = {**variables, "params": params}
    return dataclasses.replace(
        model, module=module.clone(**args), args=model.args | args, variables=variables
    )


def with_classifier(model: Model, linear: Linear, class_names: tuple[str, ...]) -> Model:
    """The model with a linear classifier of its pooled features, exactly.

    A distilled network's two heads are the same: their mean is that of the two tokens.

    Args:
      model: from `without_classifier`.
      linear: kernel [D, K] and bias [K].
      class_names: by label.
    """
    args: dict[str, Any] = {"num_classes": len(linear.bias)}
    if hasattr(model.module, "aux_logits"):
        args["aux_logits"] = False  # Inception's second classifier reads another layer
    whole = dataclasses.replace(
        model,
        module=model.module.clone(**args),
        args=model.args | {k: v for k, v in args.items() if k != "num_classes"},
        class_names=class_names,
        variables=None,
    )
    flat: dict[Any, Any] = traverse_util.flatten_dict(model.variables)
    for path in traverse_util.flatten_dict(whole.shapes).keys() - flat.keys():
        flat[path] = linear.kernel if path[-1] == "kernel" else linear.bias
    return dataclasses.replace(whole, variables=traverse_util.unflatten_dict(flat))


def describe(job: Probe, folder: Path) -> str:
    """What is about to be done, in a few lines for the terminal."""
    config, train = job.config, job.train
    return (
        f"probe: {job.teacher.name} ({config.teacher.weights}), pool {config.probe.pool}\n"
        f"  data: {config.data.name} {config.data.train}, {len(train):,} images, "
        f"{train.num_classes} classes; tested on {config.data.test}\n"
        f"  folder: {folder}"
    )


def run(job: Probe, folder: Path, command: str) -> dict[str, Any]:
    """Fits the classifier and writes teacher.safetensors and summary.json.

    Features that an earlier, interrupted call has computed are used.

    Args:
      job: from `create_probe`.
      folder: the run's folder.
      command: the command line, to be recorded.

    Raises:
      UserError: the folder has features of another teacher.
      OSError: a file can't be written.
    """
    config, classes = job.config, job.train.num_classes
    train, test = _features(job, folder)
    labels, test_labels = (np.asarray(split.labels) for split in (job.train, job.evaluation))
    say("fitting the classifier ...")
    strength, scores = choose_strength(train, labels, classes, tuple(config.probe.l2), config.seed)
    strengths = sorted((value for value in config.probe.l2 if value >= strength), reverse=True)
    *_, linear = fit_linear(train, labels, classes, strengths)
    result = accuracy(linear(test), test_labels)
    result["knn_top1"] = knn_accuracy((train, labels), (test, test_labels), classes)
    teacher = with_classifier(job.teacher, linear, job.train.class_names)
    teacher.save(
        folder / TEACHER,
        test_top1=result["top1"],
        source=f"xkd_jax, linear probe of {config.teacher.weights} on {config.data.name}",
    )
    summary = {
        "method": "probe",
        "seed": config.seed,
        "train": f"{config.data.name} {config.data.train}",
        "test": f"{config.data.name} {config.data.test}",
        "test_images": len(job.evaluation),
        "crop_pct": crop_share(job.evaluation),
        "student": {"model": teacher.name, "image_size": teacher.image_size}
        | result
        | cost(teacher, teacher.variables),
        "probe": {
            "weights": config.teacher.weights,
            "pool": config.probe.pool,
            "l2": strength,
            "validation_top1": {f"{value:g}": score for value, score in scores.items()},
        },
        "sources": list(teacher.sources),
        "command": command,
        "versions": list_versions(),
    }
    # Written last and atomically: a run with a summary is complete.
    write_file(folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def _features(job: Probe, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The features of both splits, from the run's folder as far as they are there.

    Raises:
      UserError: they are another teacher's.
    """
    path = folder / FEATURES / "teacher.json"
    key = {"fingerprint": job.teacher.fingerprint}
    if not path.exists():
        write_file(path, json.dumps(key).encode())
    elif files.read_json(path) != key:
        raise UserError(
            f"{path.parent} holds the features of another teacher than {job.config.teacher.weights}"
            " is now; restore that file, or choose another --workdir."
        )
    found = []
    for name, split in (("train", job.train), ("test", job.evaluation)):
        step = create_feature_step(job.teacher, split.crop_pct)
        file = folder / FEATURES / f"{name}.npy"
        found.append(compute_to_file(file, step, job.teacher.variables, split, job.mesh))
    return found[0], found[1]


def _check_labels(config: Config, train: data.Split) -> None:
    """Checks that every class has an image to fit and one to choose the L2 strength on.

    Raises:
      UserError: a class has fewer.
    """
    where = f"{config.data.name} {config.data.train}"
    if not train.num_classes:
        raise UserError(f"{where} has no labels, and a probe needs them; take a labelled data set.")
    counts = np.bincount(np.asarray(train.labels), minlength=train.num_classes)
    label, count = int(np.argmin(counts)), int(counts.min())
    if count < 2:
        raise UserError(
            f"{where} has {count} image{'s' * (count != 1)} of the class "
            f"{train.class_names[label]!r}, but a probe needs at least 2 of every class; take more "
            "images."
        )
