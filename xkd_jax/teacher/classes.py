"""The teacher's classes and the data's: which logits mean the same, and who can do without."""

import dataclasses
import unicodedata
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import traverse_util

from xkd_jax.data import Split
from xkd_jax.errors import UserError
from xkd_jax.methods import check_pair
from xkd_jax.methods.base import Method
from xkd_jax.methods.reads import needs_logits
from xkd_jax.model import Model

CURE = "fit a classifier to it with configs/probe_teacher.py, or fine-tune it"


@dataclasses.dataclass(frozen=True)
class Names:
    """What messages call a run's parts.

    Attributes:
      method: the method's name.
      teacher: the teacher's file.
      data: the data set.
    """

    method: str
    teacher: str
    data: str


def fit_teacher(
    teacher: Model,
    student: Model,
    method: Method,
    train: Split,
    names: Names,
    say: Callable[[str], None],
) -> Model:
    """The teacher with its logits in the order of the data's classes, or without a classifier.

    A classifier for other classes is left out, and methods that read features only don't need it.

    Args:
      teacher: as its file describes it.
      student: the student.
      method: the method.
      train: the split to train on, perhaps without labels.
      names: for messages.
      say: called with a line for the user.

    Raises:
      UserError: the method doesn't support this pair; or it reads logits, and the teacher has none
        for the data's classes.
    """
    check_pair(method, teacher.output_shapes, student.output_shapes)
    if student.num_classes and not train.num_classes:
        return teacher  # its classes are the student's: see `taught_by`
    reason, order = match_classes(teacher, train, names, say)
    if not reason:
        return dataclasses.replace(teacher, class_order=order)
    headless = without_classifier(teacher)
    if needs_logits(method, headless.output_shapes, student.output_shapes):
        where = "this data set first"
        if not train.num_classes:
            where = "labelled images, or take a method that reads features, such as ofd"
        raise UserError(
            f"method {names.method} reads the teacher's logits, but {reason}; {CURE} on {where}."
        )
    if teacher.num_classes and train.num_classes:
        say(f"{reason}: its classifier is not used.")
    return headless


def taught_by(teacher: Model, student: Model, method: Method) -> bool:
    """Whether a student of data without labels gets the teacher's classes.

    It does if the method reads the teacher's logits, and the teacher has a classifier.

    Args:
      teacher: as its file describes it.
      student: without a classifier.
      method: the method.

    Raises:
      UserError: the method doesn't support this pair.
    """
    outs = teacher.output_shapes, student.output_shapes
    check_pair(method, *outs)
    return teacher.num_classes > 0 and needs_logits(method, *outs)


def without_labels(method: Method, name: str, data_name: str, say: Callable[[str], None]) -> Method:
    """The method without its label term, for data without labels.

    Args:
      method: with its options.
      name: its name.
      data_name: the data set's name.
      say: called with a line for the user.

    Raises:
      UserError: the method needs labels.
    """
    reason = ""
    if not method.needs_teacher:
        reason = "learns from labels only"
    elif method.hard_labels:
        reason = "contrasts images by their class"
    elif method.first_phase and not any(jax.tree.leaves(method.moves(jnp.zeros(()))["method"])):
        reason = "learns from the teacher in its first phase only, and from labels after it"
    if reason:
        raise UserError(
            f"{data_name} has no labels, but method {name} {reason}; take a method that reads "
            "features, such as ofd."
        )
    if method.label_weight:
        say(f"{data_name} has no labels: the label term is left out (label_weight=0).")
    return dataclasses.replace(method, label_weight=0.0)


def without_classifier(model: Model) -> Model:
    """The model with `num_classes=0`: its `out` has features only."""
    module = model.module.clone(num_classes=0)
    headless = dataclasses.replace(model, module=module, class_names=(), variables=None)
    kept = traverse_util.flatten_dict(headless.shapes).keys()
    flat = traverse_util.flatten_dict(model.variables)
    variables = traverse_util.unflatten_dict({k: v for k, v in flat.items() if k in kept})
    return dataclasses.replace(headless, variables=variables)


class Classifier(Protocol):
    """A network or data with named classes."""

    @property
    def num_classes(self) -> int:
        """Their number; 0 without a classifier or labels."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label; empty if unknown."""
        ...


def match_classes(
    teacher: Classifier, train: Classifier, names: Names, say: Callable[[str], None]
) -> tuple[str, tuple[int, ...]]:
    """Whether a network's logits are those of the data's classes, compared by name.

    Args:
      teacher: the network.
      train: the data, perhaps without labels.
      names: for messages.
      say: called with a line for the user.

    Returns:
      Why they are not, or "", and `Model.class_order` for the data's order of classes.
    """
    file, count = names.teacher, teacher.num_classes
    if not count:
        return f"{file} has no classifier", ()
    if not train.num_classes:
        return f"{names.data} has no labels, so that the student has none", ()
    if count != train.num_classes:
        return f"{file} has {count} classes but {names.data} has {train.num_classes}", ()
    theirs = [_normal(name) for name in teacher.class_names]
    ours = [_normal(name) for name in train.class_names]
    unnamed = [str(label) for label in range(count)]
    if not theirs or theirs == unnamed or ours == unnamed:
        say(f"{file} or {names.data} doesn't name its classes: their order is trusted.")
        return "", ()
    if theirs == ours:
        return "", ()
    if sorted(theirs) == sorted(ours):
        say(
            f"{file} has the classes of {names.data} in another order: its logits are "
            "reordered by name."
        )
        return "", tuple(map(theirs.index, ours))
    label = next(i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
    return (
        f"{file} was trained on other classes than those of {names.data} (class {label} is "
        f"{theirs[label]!r} there and {ours[label]!r} here)"
    ), ()


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)
