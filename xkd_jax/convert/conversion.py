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

from xkd_jax.convert.files import Checkpoint
from xkd_jax.convert.hub import DEFAULT_TAGS, download, full_name
from xkd_jax.convert.networks import Place, fit, get_places, recognize
from xkd_jax.convert.resize import resize
from xkd_jax.convert.rules import Family, family_of, find_layout, from_torch, rename, torch_shape
from xkd_jax.errors import UserError, unknown
from xkd_jax.models import MODELS
from xkd_jax.weights import save_weights

_ENOUGH = 0.5  # share of tensors in common below which a checkpoint matches no network
_SURE = 0.9  # share of tensors in common above which no other network is considered
_NAMED = 5  # tensors that the message names when another network fits better


@dataclasses.dataclass(frozen=True)
class Converted:
    """A network's variables, ready for `save_weights`.

    Attributes:
      variables: nested dict of float32 arrays.
      metadata: model, args, num_classes, image_size, mean, std, source ...
      changes: everything that was done beyond renaming, a sentence each.
    """

    variables: dict[str, Any]
    metadata: dict[str, Any]
    changes: list[str]


def convert(
    checkpoint: Checkpoint,
    model: str = "",
    *,
    num_classes: int = 0,
    image_size: int = 0,
    args: Mapping[str, Any] | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Converted:
    """Turns a checkpoint into a network's variables; arguments default to the checkpoint's own.

    Where the network's image or patch size differs, position embeddings, bias tables and patch
    projections are resized as in timm. With another number of classes, the head is set to zero
    (as in arXiv:2010.11929, section 3.2).

    Args:
      checkpoint: from `read_checkpoint` or `download`.
      model: a key of `MODELS`; recognised from the tensors if the checkpoint doesn't name it.
      num_classes: the number of classes.
      image_size: the side of the images, pixels.
      args: all fields of the network's module that differ from the variant's.
      mean: the mean per channel of images in [0, 1] that the network expects.
      std: the standard deviation per channel, in the same units.

    Raises:
      UserError: a tensor is missing, unexpected or has another shape (the message names all of
        them); the network is unknown or can't be recognised; or the arguments contradict each
        other.
    """
    state, changes = _normalize(checkpoint.state)
    known = dict(checkpoint.metadata)
    model = model or known.get("model") or _recognized(checkpoint.name, state, changes)
    if model not in MODELS:
        raise unknown("network", model, MODELS)
    if model != known.get("model", model):
        # The checkpoint's sizes are those of its own network.
        known = {key: value for key, value in known.items() if key not in ("args", "image_size")}
    args, image_size = _arguments(model, state, known, args, image_size)
    places = get_places(model, args)
    old_classes = _count_classes(state, places)
    classes = num_classes or old_classes
    flat, done, wrong = _put(state, places, family_of(model), classes, classes != old_classes)
    if wrong:
        raise _misfit(checkpoint.name, model, state, places, wrong)
    if not classes:
        raise UserError(
            f"{checkpoint.name} has no classifier; python -m xkd_jax.convert --num_classes N "
            "adds an untrained one."
        )
    changes += done
    if classes != old_classes:
        known.pop("class_names", None)
    metadata = {"source": checkpoint.name, **_record(known, changes), "model": model, "args": args}
    metadata |= {"num_classes": classes, "image_size": image_size}
    for field, given in (("mean", mean), ("std", std)):
        metadata[field] = list(given or known.get(field, getattr(MODELS[model], field)))
    return Converted(traverse_util.unflatten_dict(flat, sep="/"), metadata, changes)


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


def _normalize(state: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The state with timm's names in float32, and a sentence for each change."""
    changes = []
    layout = find_layout(state)
    if layout:
        state = {rename(name, layout): array for name, array in state.items()}
        changes.append(f"renamed the tensors from {layout.source} names")
    floats = {array.dtype.name for array in state.values() if array.dtype.kind not in "biu"}
    if floats - {"float32"}:
        changes.append(f"converted {' and '.join(sorted(floats - {'float32'}))} to float32")
    return {name: np.asarray(array, np.float32) for name, array in state.items()}, changes


def _recognized(name: str, state: Mapping[str, np.ndarray], changes: list[str]) -> str:
    """Recognises the network from its tensors, and adds a sentence about it to `changes`.

    Raises:
      UserError: no network matches, or several do.
    """
    alike, score = recognize(_shapes(state))
    if score < _ENOUGH:
        some = ", ".join(list(state)[:3])
        raise UserError(
            f"{name} does not match any known network (its first tensors are {some}); if it is "
            "one, name it with --model."
        )
    published = [model for model in alike if model in DEFAULT_TAGS]
    if len(alike) > 1 and len(published) != 1:
        raise UserError(
            f"{name} fits {', '.join(alike)} equally well; choose one with --model, because they "
            "may expect differently prepared images."
        )
    model = published[0] if published else alike[0]
    others = [other for other in alike if other != model]
    changes.append(f"recognised {model}" + (f", not {', '.join(others)}" if others else ""))
    return model


def _arguments(
    model: str,
    state: Mapping[str, np.ndarray],
    known: Mapping[str, Any],
    args: Mapping[str, Any] | None,
    image_size: int,
) -> tuple[dict[str, Any], int]:
    """The network's arguments for the checkpoint and the image size, and that size."""
    args = dict(known.get("args", {}) if args is None else args)
    for pattern, arg in family_of(model).optional:
        if arg not in args and not any(re.fullmatch(pattern, name) for name in state):
            args[arg] = False
    variant = MODELS[model]
    size = image_size or args.get("img_size") or known.get("image_size") or variant.image_size
    args.pop("img_size", None)
    if size != variant.args.get("img_size", size):
        args["img_size"] = size
    return args, size


def _count_classes(state: Mapping[str, np.ndarray], places: Mapping[str, Place]) -> int:
    """The number of classes of the checkpoint's head; 0 without one."""
    for name, place in places.items():
        if place.in_head and name in state and place.takes(state[name].shape):
            return state[name].shape[place.torch_shape.index(-1)]
    return 0


def _put(
    state: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
    family: Family,
    classes: int,
    new_head: bool,
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Puts each tensor of a checkpoint in its place.

    Returns:
      the tensors by our path, the changes made to them, and a phrase for each that doesn't fit.
    """
    flat, wrong, reset = {}, [], []
    resized: Counter[str] = Counter()
    for name, place in places.items():
        array = state.get(name)
        shape = tuple(classes if side == -1 else side for side in place.shape)
        want = torch_shape(place.path, shape)
        if place.in_head and new_head and (array is None or place.takes(array.shape)):
            flat[place.path] = np.zeros(shape, np.float32)
            reset.append(name)
        elif array is None:
            if classes or not place.in_head:
                wrong.append(f"{name} {list(want)} is missing ({place.path})")
        elif array.shape == want:
            flat[place.path] = np.asarray(from_torch(place.path, array), order="C")
        elif fitted := resize(name, from_torch(place.path, array), shape):
            flat[place.path], change = fitted
            resized[f"{name.rpartition('attn.')[2]} {change}"] += 1
        else:
            wrong.append(
                f"{name} has the shape {list(array.shape)} instead of {list(want)} ({place.path})"
            )
    extra = [name for name in state if name not in places]
    skipped = [name for name in extra if re.fullmatch(family.skipped, name)]
    wrong += [
        f"unexpected tensor {name} {list(state[name].shape)}"
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


def _misfit(
    name: str,
    model: str,
    state: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
    wrong: list[str],
) -> UserError:
    """The error that lists all tensors that don't fit, or names a network that fits better."""
    shapes = _shapes(state)
    own = fit(shapes, places)
    if own < _SURE:
        alike, score = recognize(shapes)
        if score > max(own, _ENOUGH):
            more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            return UserError(
                f"{name} is not {model} but looks like {' or '.join(alike)}; choose that model "
                f"instead ({'; '.join(wrong[:_NAMED])}{more})."
            )
    lines = ";\n  ".join(wrong)
    return UserError(f"{name} does not fit {model} in {len(wrong)} of its tensors:\n  {lines}.")


def _shapes(state: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in state.items()}
