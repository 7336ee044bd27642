"""What the config of a detector's training builds: splits, the student's weights, the teacher."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xkd_jax import models, weights
from xkd_jax.config import Config
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import Checkpoint, read_checkpoint
from xkd_jax.data import coco
from xkd_jax.data.detection_split import DetectionSplit
from xkd_jax.data.frame import Frame
from xkd_jax.errors import UserError
from xkd_jax.methods.base import Method
from xkd_jax.methods.reads import needs_logits
from xkd_jax.model import Model
from xkd_jax.models.resnet import ResNet
from xkd_jax.tasks.base import Task
from xkd_jax.tasks.classification import Classification
from xkd_jax.tasks.detection import Detection
from xkd_jax.teacher.classes import Names, match_classes, without_classifier

_BODY = "backbone.body."  # the beginning of a detector's tensors' names, torchvision's


def create_task(config: Config, labelled: bool) -> Task:
    """The task that the config names by its student; for classification, with or without labels.

    Raises:
      UserError: stages that `freeze` counts don't exist.
    """
    if config.student.model not in models.DETECTORS:
        return Classification(labelled)
    name, _ = _backbone(config)
    if config.freeze and (models.MODELS[name].network is not ResNet or config.freeze > 4):
        raise UserError(
            f"freeze={config.freeze} counts the four stages of a ResNet or ResNeXt, but the "
            f"backbone is {name}; set it to at most 4 for a ResNet, and to 0 for others."
        )
    return Detection(config.freeze, _has_masks(config))


def open_split(config: Config, split: str, training: bool) -> DetectionSplit:
    """One split of the config's data set, cached for the other runs of a comparison.

    Args:
      config: of a detector.
      split: as in `data.train`.
      training: whether to leave out images without objects.

    Raises:
      UserError: as for `coco.open_split`.
    """
    options, masks = config.data, _has_masks(config)
    frame = Frame(options.min_size, options.max_size)
    return _cached_open(options.name, split, frame, training, masks, options.on_error)


@functools.lru_cache(maxsize=6)
def _cached_open(
    name: str, split: str, frame: Frame, training: bool, masks: bool, on_error: str
) -> DetectionSplit:
    return coco.open_split(name, split, frame, training=training, masks=masks, on_error=on_error)


def _has_masks(config: Config) -> bool:
    return _arguments(config)["mask"]


def _arguments(config: Config) -> dict[str, Any]:
    """Those of the student that its name and the config give."""
    return models.DETECTORS[config.student.model].args | config.student.args.to_dict()


def _backbone(config: Config) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of the student's backbone."""
    args = _arguments(config)
    return args["backbone"], dict(args.get("backbone_args", {}))


def with_batch_norm(model: Model, args: Mapping[str, Any]) -> Model:
    """A detector without weights, whose batch normalisation uses the batch's statistics.

    As in torchvision's references, unless its arguments say otherwise.
    """
    if "frozen_norm" in args:
        return model
    backbone = model.module.backbone.clone(frozen_norm=False)
    return dataclasses.replace(model, module=model.module.clone(backbone=backbone))


def is_backbone(checkpoint: Checkpoint) -> bool:
    """Whether these are weights of a detector's backbone at most, not of a detector."""
    return not any(name.startswith(_BODY) for name in checkpoint.state)


def with_backbone(
    config: Config, model: Model, checkpoint: Checkpoint, say: Callable[[str], None]
) -> Model:
    """The student with `student.weights` in its backbone; the rest stays random.

    Args:
      config: of a detector.
      model: the student, without weights.
      checkpoint: of a classifier or feature extractor.
      say: called with a line for the user.

    Raises:
      UserError: they are weights of another network.
    """
    file, (name, args) = config.student.weights, _backbone(config)
    theirs = checkpoint.metadata.get("model", name)
    if theirs != name:
        raise UserError(
            f"{file} holds a {theirs}, but the backbone of {config.student.model} is a {name}; "
            "give weights of that network or of a whole detector."
        )
    converted = convert(checkpoint, name, num_classes=0, args=args)
    for note in (*checkpoint.notes, *converted.changes):
        say(f"student.weights {file}: {note}")
    shapes = {kind: tree["backbone"]["body"] for kind, tree in model.shapes.items()}
    weights.check_weights(file, converted.variables, shapes, name)
    variables = {kind: {"backbone": {"body": tree}} for kind, tree in converted.variables.items()}
    mean, std = (tuple(converted.metadata[name]) for name in ("mean", "std"))
    sources = weights.list_sources(file, converted.metadata)
    return dataclasses.replace(model, variables=variables, mean=mean, std=std, sources=sources)


def resize_teacher(config: Config, path: Path, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The variables and the metadata of the teacher's file, for images of another size.

    Args:
      config: of a detector.
      path: of the file.
      size: side of the teacher's input, in pixels: position embeddings are resized to it.

    Raises:
      UserError: the file is damaged, or the network can't take this size.
    """
    converted = convert(read_checkpoint(path, config.teacher.weights), image_size=size)
    return converted.variables, converted.metadata


def fit_teacher(
    teacher: Model, student: Model, method: Method, train: DetectionSplit, names: Names
) -> Model:
    """The teacher for a detector: a Transformer without classifier, or a detector.

    A detector gets the student's images, at their size.

    Raises:
      UserError: the method doesn't support this pair; or it reads class scores, and the teacher has
        other classes.
    """
    task = Detection()
    if not teacher.is_detector:
        headless = without_classifier(teacher) if teacher.num_classes else teacher
        task.check(method, headless, student)
        return headless
    task.check(method, teacher, student)
    if needs_logits(method, teacher.output_shapes, student.output_shapes):
        reason, order = match_classes(teacher, train, names, lambda line: None)
        if order:
            reason = f"{names.teacher} has the classes of {names.data} in another order"
        if reason:
            raise UserError(
                f"method {names.method} compares class scores, but {reason}; take a teacher "
                "trained on this data set, or a method that reads features."
            )
    return dataclasses.replace(teacher, image_size=student.image_size)
