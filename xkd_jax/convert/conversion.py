"""From a checkpoint to a network's variables."""

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

_ENOUGH = 0.5  # of the tensors in common: below, a checkpoint looks like nothing here
_SURE = 0.9  # of the tensors in common: above, no other network is looked for
_NAMED = 5  # tensors that are named when another network fits better


@dataclasses.dataclass(frozen=True)
class Converted:
    """A network's variables, ready for `save_weights`.

    Attributes:
      variables: nested dict of float32 arrays.
      metadata: model, args, num_classes, image_size, mean, std, source ...
      changes: what was done beyond renaming, a sentence each.
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
    """Turns a checkpoint into a network's variables; what isn't given is the checkpoint's own.

    Where the network's image or patch size differs, position embeddings, bias tables and patch
    projections are resized as timm does. A head for other classes starts at zero (as in
    arXiv:2010.11929, section 3.2).

    Args:
      checkpoint: of `read_checkpoint` or `download`.
      model: a key of `MODELS`; if neither this nor the checkpoint says it, it is recognised.
      num_classes: how many.
      image_size: the side, pixels.
      args: fields of the network's module, all that differ from the name's.
      mean: per channel, of images in [0, 1].
      std: likewise.

    Raises:
      UserError: any tensor is missing, extra or misshapen, all of which are named at once; the
        network is unknown or can't be told; or the arguments contradict each other.
    """
    state, changes = _normalize(checkpoint.state)
    known = dict(checkpoint.metadata)
    model = model or known.get("model") or _recognized(checkpoint.name, state, changes)
    if model not in MODELS:
        raise unknown("network", model, MODELS)
    if model != known.get("model", model):
        # Another network than the checkpoint's has sizes of its own.
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
            "gives it one that is still to be trained."
        )
    changes += done
    if classes != old_classes:
        known.pop("class_names", None)
    if changes:
        known.pop("test_top1", None)
        known["changes"] = [*known.get("changes", ()), *changes]
    metadata = {"source": checkpoint.name, **known, "model": model, "args": args}
    metadata |= {"num_classes": classes, "image_size": image_size}
    for field, given in (("mean", mean), ("std", std)):
        metadata[field] = list(given or known.get(field, getattr(MODELS[model], field)))
    return Converted(traverse_util.unflatten_dict(flat, sep="/"), metadata, changes)


def fetch(name: str) -> Path:
    """The converted file of timm's weights, which is downloaded and converted only once.

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
    """The state with timm's names, in float32, and what that took."""
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
    """The network whose tensors these are; adds a sentence about it to `changes`.

    Raises:
      UserError: none is, or several are.
    """
    alike, score = recognize(_shapes(state))
    if score < _ENOUGH:
        some = ", ".join(list(state)[:3])
        raise UserError(
            f"{name} looks like none of the networks here (it begins with {some}); if it is one, "
            "name it with --model."
        )
    published = [model for model in alike if model in DEFAULT_TAGS]
    if len(alike) > 1 and len(published) != 1:
        raise UserError(
            f"{name} fits {', '.join(alike)} alike; name the right one with --model, because "
            "their images may be prepared differently."
        )
    model = published[0] if published else alike[0]
    others = [other for other in alike if other != model]
    changes.append(f"took it for {model}" + (f", and not {', '.join(others)}" if others else ""))
    return model


def _arguments(
    model: str,
    state: Mapping[str, np.ndarray],
    known: Mapping[str, Any],
    args: Mapping[str, Any] | None,
    image_size: int,
) -> tuple[dict[str, Any], int]:
    """The network's arguments that fit the checkpoint and the images, and the images' size."""
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
    """How many classes the checkpoint's head tells apart; 0 without one."""
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
      the tensors by our path, what was done to them, and which ones don't fit.
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
                f"{name} is {list(array.shape)} where {list(want)} is needed ({place.path})"
            )
    extra = [name for name in state if name not in places]
    skipped = [name for name in extra if re.fullmatch(family.skipped, name)]
    wrong += [
        f"{name} {list(state[name].shape)} has no place" for name in extra if name not in skipped
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
    """The error about tensors that don't fit: all of them, unless another network fits better."""
    shapes = _shapes(state)
    own = fit(shapes, places)
    if own < _SURE:
        alike, score = recognize(shapes)
        if score > max(own, _ENOUGH):
            more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
            return UserError(
                f"{name} is no {model}, it looks like {' or '.join(alike)}; name that as the model "
                f"({'; '.join(wrong[:_NAMED])}{more})."
            )
    lines = ";\n  ".join(wrong)
    return UserError(f"{name} does not fit {model} in {len(wrong)} of its tensors:\n  {lines}.")


def _shapes(state: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in state.items()}
