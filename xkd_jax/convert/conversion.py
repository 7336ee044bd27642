"""Turns a checkpoint into a network's variables."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from xkd_jax.augment.normalization import CIFAR10_MEAN, CIFAR10_STD, CIFAR100_MEAN
from xkd_jax.convert.choice import choose_model, misfit_error
from xkd_jax.convert.files import Checkpoint
from xkd_jax.convert.hub import download, full_name
from xkd_jax.convert.layouts import (
    Layout,
    add_shortcuts,
    find_layout,
    fold_class_position,
    lacks_shortcuts,
    reads_mean_token,
    translate,
)
from xkd_jax.convert.layouts_detection import (
    COCO_CATEGORIES,
    DETECTOR,
    cancel_epsilon,
    is_published,
    recognize_detector,
)
from xkd_jax.convert.messages import Misfit, describe_assumptions, describe_not_finite
from xkd_jax.convert.networks import Place, background, get_places
from xkd_jax.convert.resize import resize
from xkd_jax.convert.rules import family_of, from_torch, torch_shape
from xkd_jax.errors import UserError
from xkd_jax.models import NETWORKS, create_model
from xkd_jax.weights import locate, save_weights

TIMM = "timm:"  # prefix of a name: timm's weights, downloaded from the hub and converted once
_CIFAR10_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Converted:
    """A network's variables, ready for `save_weights`.

    Attributes:
      variables: nested dict of float32 arrays.
      metadata: model, args, num_classes, image_size, mean, std, source ...
      changes: everything that was done beyond renaming, a sentence each.
      assumed: what neither the tensors nor the checkpoint's metadata tell, with the command line's
        options that change it; "" if nothing.
    """

    variables: dict[str, Any]
    metadata: dict[str, Any]
    changes: list[str]
    assumed: str = ""


def convert(
    checkpoint: Checkpoint,
    model: str = "",
    *,
    num_classes: int | None = None,
    image_size: int = 0,
    args: Mapping[str, Any] | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    antialias: bool = True,
    allow_not_finite: bool = False,
) -> Converted:
    """Turns a checkpoint into a network's variables; arguments default to the checkpoint's own.

    For another image or patch size, position embeddings, bias tables and patch projections are
    resized as in timm. For other classes the head is zero (arXiv:2010.11929, section 3.2).

    Args:
      checkpoint: from `read_checkpoint` or `download`.
      model: a key of `NETWORKS`, which overrides the name that the checkpoint states; recognised
        from the tensors if there is neither.
      num_classes: the number of classes; 0: no head; a checkpoint without one stays without.
      image_size: the side of the images, pixels.
      args: all fields of the network's module that differ from the variant's.
      mean: the mean per channel of images in [0, 1] that the network expects.
      std: the standard deviation per channel, in the same units.
      antialias: of resized position embeddings, as in timm; DINOv2 without registers has none.
      allow_not_finite: whether tensors may hold NaN or infinite values.

    Raises:
      UserError: a tensor is missing, unexpected, not finite or has another shape; the network is
        unknown or can't be recognised; or the arguments contradict each other.
    """
    layout = find_layout(checkpoint.state)
    state, changes = _normalize(checkpoint.state, layout)
    model, args = _choose(checkpoint, model, args, state, layout, changes)
    given = {"mean": list(mean), "std": list(std), "image_size": image_size}
    known = _known(checkpoint, model, layout) | {k: v for k, v in given.items() if v}
    if layout and layout.args:
        args = {**layout.args, **(known.get("args", {}) if args is None else args)}
    stated = {*known, *known.get("args", {}), *(args or {})}
    args, image_size = _arguments(model, state, known, args, image_size)
    places = get_places(model, args)
    old_classes = _count_classes(state, places) - background(model)
    classes = old_classes if num_classes is None else num_classes
    if not classes:
        state, places = _without_head(model, args, state, places, changes)
    new_head = classes != old_classes
    flat, done, wrong = _put(state, places, model, classes, new_head, antialias)
    if wrong:
        raise misfit_error(checkpoint, model, state, places, wrong)
    used = {k: state[k] for k, p in places.items() if not (p.in_head and new_head)}
    changes += done + _check_finite(checkpoint.name, used, allow_not_finite)
    if new_head:
        known.pop("class_names", None)
    metadata = {"source": checkpoint.name, **_statistics(model, old_classes)}
    metadata |= _record(known, changes)
    metadata |= {"model": model, "args": args, "num_classes": classes, "image_size": image_size}
    variables = traverse_util.unflatten_dict(flat, sep="/")
    return Converted(variables, metadata, changes, describe_assumptions(metadata, stated))


def _choose(
    checkpoint: Checkpoint,
    model: str,
    args: Mapping[str, Any] | None,
    state: Mapping[str, np.ndarray],
    layout: Layout | None,
    changes: list[str],
) -> tuple[str, Mapping[str, Any] | None]:
    """The network's name, by `choose_model` or from a detector's tensors, and its arguments."""
    stated = model or checkpoint.metadata.keys() & {"model", "architecture"}
    if layout is DETECTOR and not stated:
        model, found = recognize_detector(checkpoint.name, state, changes)
        args = {**found, **(args or {})}
    return choose_model(checkpoint, model, state, layout, changes), args


def _without_head(
    model: str,
    args: Mapping[str, Any],
    state: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
    changes: list[str],
) -> tuple[dict[str, np.ndarray], dict[str, Place]]:
    """The state and the places without the classifier's; a removed one is added to `changes`."""
    heads = places.keys() - get_places(model, args, 0).keys()
    if found := sorted(heads & state.keys()):
        changes.append(f"left out {' and '.join(found)}, the classifier")
    return (
        {name: array for name, array in state.items() if name not in heads},
        {name: place for name, place in places.items() if name not in heads},
    )


def _known(checkpoint: Checkpoint, model: str, layout: Layout | None) -> dict[str, Any]:
    """The metadata that the checkpoint, or the library that its names are from, states."""
    known = dict(checkpoint.metadata)
    if "architecture" in known:
        known = {k: v for k, v in known.items() if k not in ("architecture", "args")}
    elif model != known.get("model", model):
        # The checkpoint's sizes are those of its own network.
        known = {k: v for k, v in known.items() if k not in ("model", "args", "image_size")}
    if is_published(checkpoint.state):
        known = {"class_names": COCO_CATEGORIES, **known}
    if layout and layout.mean and layout.std:
        known = {"mean": list(layout.mean), "std": list(layout.std), **known}
    return known


def _statistics(model: str, classes: int) -> dict[str, list[float]]:
    """Mean and standard deviation that a network of `classes` was probably trained with."""
    mean, std = NETWORKS[model].mean, NETWORKS[model].std
    if mean == CIFAR100_MEAN and classes == _CIFAR10_CLASSES:
        mean, std = CIFAR10_MEAN, CIFAR10_STD
    return {"mean": list(mean), "std": list(std)}


def _check_finite(name: str, state: Mapping[str, np.ndarray], allowed: bool) -> list[str]:
    """A sentence about tensors that are not finite, if they are allowed.

    Raises:
      UserError: they are not allowed.
    """
    wrong = describe_not_finite(state)
    if wrong and not allowed:
        raise UserError(
            f"{name} holds NaN or infinite values in {wrong}; give an earlier checkpoint, or "
            "convert it unchanged with --allow_not_finite."
        )
    return [f"warning: NaN or infinite values in {wrong}"] if wrong else []


def _record(metadata: Mapping[str, Any], changes: list[str]) -> dict[str, Any]:
    """The metadata with `changes` added; any change invalidates its test score."""
    if not changes:
        return dict(metadata)
    kept = {key: value for key, value in metadata.items() if key != "test_top1"}
    return {**kept, "changes": [*kept.get("changes", ()), *changes]}


def fetch(name: str) -> Path:
    """Downloads and converts timm's weights, unless they are cached; returns the file's path.

    Args:
      name: timm's, "resnet18" or "resnet18.a1_in1k".

    Raises:
      UserError: as `download` and `convert` do.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    path = cache / "xkd_jax" / "weights" / f"{full_name(name)}.safetensors"
    if not path.exists():
        converted = convert(download(name))
        save_weights(path, converted.variables, converted.metadata)
    return path


def find_weights(name: str) -> Path:
    """The file of `student.weights` or `teacher.weights`: a path, packaged:NAME or timm:NAME.

    Raises:
      UserError: as `fetch` and `weights.locate` do.
    """
    return fetch(name.removeprefix(TIMM)) if name.startswith(TIMM) else locate(name)


def _normalize(
    state: Mapping[str, np.ndarray], layout: Layout | None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The state with timm's names in float32, and a sentence for each change."""
    changes = []
    if layout:
        old, state = state, translate(state, layout)
        if state.keys() - old.keys():
            changes.append(f"renamed the tensors from {layout.source} names")
        if state.keys() >= {"reg_token", "cls_token", "pos_embed"}:
            state = fold_class_position(state)
            changes.append("added the class token's position embedding to the token, as in timm")
        if is_published(old):
            state = cancel_epsilon(state)
            changes.append("lowered the running variances by BatchNorm's epsilon, not used there")
    if lacks_shortcuts(state):
        state = add_shortcuts(state)
        changes.append("wrote the shortcuts of option A, which have no weights, as convolutions")
    floats = {array.dtype.name for array in state.values() if array.dtype.kind not in "biu"}
    if floats - {"float32"}:
        changes.append(f"converted {' and '.join(sorted(floats - {'float32'}))} to float32")
    return {name: np.asarray(array, np.float32) for name, array in state.items()}, changes


def _arguments(
    model: str,
    state: Mapping[str, np.ndarray],
    known: Mapping[str, Any],
    args: Mapping[str, Any] | None,
    image_size: int,
) -> tuple[dict[str, Any], int]:
    """The network's arguments for the checkpoint and the image size, and that size."""
    args = dict(known.get("args", {}) if args is None else args)
    if reads_mean_token(state):
        args.setdefault("global_pool", "token_avg")
    for pattern, arg in family_of(model).optional:
        found = any(re.fullmatch(pattern, name) for name in state)
        if arg not in args and found != getattr(create_model(model, num_classes=1), arg):
            args[arg] = found
    variant = NETWORKS[model]
    size = image_size or args.get("img_size") or known.get("image_size") or variant.image_size
    args.pop("img_size", None)
    if size != variant.args.get("img_size", size):
        args["img_size"] = size
    return args, size


def _count_classes(state: Mapping[str, np.ndarray], places: Mapping[str, Place]) -> int:
    """The number of classes of the checkpoint's head; 0 without one."""
    for name, place in places.items():
        if place.in_head and name in state and place.takes(state[name].shape):
            return place.count_classes(state[name].shape)
    return 0


def _put(
    state: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
    model: str,
    classes: int,
    new_head: bool,
    antialias: bool,
) -> tuple[dict[str, np.ndarray], list[str], list[Misfit]]:
    """Puts each tensor of a checkpoint in its place.

    Returns:
      the tensors by our path, the changes made to them, and the tensors that don't fit.
    """
    flat, wrong, reset = {}, [], []
    family, outputs = family_of(model), classes + background(model)
    resized: Counter[str] = Counter()
    for name, place in places.items():
        array = state.get(name)
        shape = place.shape_for(outputs)
        want = torch_shape(place.path, shape)
        if place.in_head and new_head and (array is None or place.takes(array.shape)):
            flat[place.path] = np.zeros(shape, np.float32)
            reset.append(name)
        elif array is None:
            after = f" {list(want)} is missing"
            wrong.append(Misfit(name, "missing", after, path=place.path))
        elif array.shape == want or (not place.in_head and place.takes(array.shape)):
            array = array.reshape(want)
            flat[place.path] = np.asarray(from_torch(place.path, array), order="C")
        elif fitted := resize(name, from_torch(place.path, array), shape, antialias):
            flat[place.path], change = fitted
            resized[f"{name.rpartition('attn.')[2]} {change}"] += 1
        else:
            after = f" has the shape {list(array.shape)} instead of {list(want)}"
            wrong.append(Misfit(name, "shape", after, path=place.path))
    extra = [name for name in state if name not in places]
    skipped = [name for name in extra if re.fullmatch(family.skipped, name)]
    wrong += [
        Misfit(name, "unexpected", f" {list(state[name].shape)}", before="unexpected tensor ")
        for name in extra
        if name not in skipped
    ]
    changes = [
        f"{change}, {count} times" if count > 1 else change for change, count in resized.items()
    ]
    if reset:
        changes.append(f"set {' and '.join(reset)} to zero, for {classes} classes")
    if skipped:
        more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        changes.append(f"left out {skipped[0]}{more}")
    return flat, changes, wrong
