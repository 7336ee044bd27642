"""Chooses a checkpoint's network: the user's, the one that it states, or that its tensors fit."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from xkd_jax.convert.files import Checkpoint
from xkd_jax.convert.hub import DEFAULT_TAGS
from xkd_jax.convert.layouts import Layout, name_unread
from xkd_jax.convert.messages import Misfit, describe
from xkd_jax.convert.networks import Place, equal_networks, fit, recognize
from xkd_jax.errors import UserError, unknown
from xkd_jax.models import MODELS, NETWORKS, create_model

_ENOUGH = 0.5  # share of tensors in common below which a checkpoint matches no network
_SURE = 0.9  # share of tensors in common above which no other network is considered
_NEAR = 0.6  # similarity of names, from 0 to 1, above which one is suggested


def choose_model(
    checkpoint: Checkpoint,
    model: str,
    state: Mapping[str, np.ndarray],
    layout: Layout | None,
    changes: list[str],
) -> str:
    """The name of the checkpoint's network; adds a sentence to `changes` unless it is stated.

    A name that the checkpoint states is never overridden by tensors that fit another network.

    Args:
      checkpoint: the tensors as they were read, and the metadata.
      model: the network that the user chose, or "".
      state: the tensors by timm's name.
      layout: of the checkpoint's own names.
      changes: sentences about the conversion.

    Raises:
      UserError: the network is not among `NETWORKS`, no network matches, or several do.
    """
    known = checkpoint.metadata
    stated = known.get("architecture") or known.get("model", "")
    if model:
        if model not in NETWORKS:
            raise unknown("network", model, NETWORKS)
        if stated and stated != model:
            changes.append(
                f"warning: the checkpoint states {stated} and is read as {model}; networks with "
                "equal tensors can differ in padding, epsilon, activation or heads"
            )
        return model
    if "architecture" in known:
        raise _not_here(checkpoint.name, stated, state)
    if stated and stated not in NETWORKS:
        raise unknown("network", stated, NETWORKS)
    return stated or _recognized(checkpoint, state, layout, changes)


def misfit_error(
    checkpoint: Checkpoint,
    model: str,
    state: Mapping[str, np.ndarray],
    places: Mapping[str, Place],
    wrong: list[Misfit],
) -> UserError:
    """The error for tensors that don't fit `model`; names a network that fits better."""
    name, shapes, own = checkpoint.name, shapes_of(state), fit(shapes_of(state), places)
    phrases = describe(wrong)
    if own < _SURE:
        alike, score = recognize(shapes)
        if score > max(own, _ENOUGH):
            return UserError(
                f"{name} is not {model} but looks like {' or '.join(alike)}; choose that model "
                f"instead ({'; '.join(phrases)})."
            )
        if other := name_unread(checkpoint.state):
            return _unread(name, other)
    lines = ";\n  ".join(phrases)
    return UserError(f"{name} does not fit {model} in {len(wrong)} of its tensors:\n  {lines}.")


def shapes_of(state: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: array.shape for name, array in state.items()}


def _not_here(name: str, stated: str, state: Mapping[str, np.ndarray]) -> UserError:
    """The error for a network that is not among `MODELS`."""
    alike, score = recognize(shapes_of(state))
    base = stated.rpartition("/")[2].partition(".")[0]
    near = difflib.get_close_matches(base, MODELS, n=1, cutoff=_NEAR)
    if score >= _SURE:
        chosen = near[0] if near and near[0] in alike else alike[0]
        return UserError(
            f"{name} states that it is {stated}, which is not among the networks here; its tensors "
            f"fit {chosen} as well, and --model {chosen} forces that, but padding, epsilon, "
            "activation or heads may differ."
        )
    hint = f"the nearest name is {near[0]}" if near else "python -m xkd_jax.models lists them"
    return UserError(
        f"{name} states that it is {stated}, which is not among the networks here; {hint}, and "
        "--model NAME overrides what the file states."
    )


def _recognized(
    checkpoint: Checkpoint,
    state: Mapping[str, np.ndarray],
    layout: Layout | None,
    changes: list[str],
) -> str:
    """Recognises the network from its tensors, and adds a sentence about it to `changes`.

    Raises:
      UserError: no network matches, or several do.
    """
    name = checkpoint.name
    alike, score = recognize(shapes_of(state))
    if score < _ENOUGH:
        if other := name_unread(checkpoint.state):
            raise _unread(name, other)
        some = ", ".join(list(state)[:3])
        raise UserError(
            f"{name} does not match any known network (its first tensors are {some}); if it is "
            "one, name it with --model."
        )
    likely = [model for model in alike if layout and re.match(layout.prefix, model)]
    args = checkpoint.metadata.get("args", {})
    likely = [model for model in likely or alike if _has(model, args)] or likely or alike
    published = [model for model in likely if model in DEFAULT_TAGS]
    stated = {"mean", "std"} <= checkpoint.metadata.keys()
    if len(published) > 1 and stated and equal_networks(published):
        # They only differ in the images that they expect, and those are known.
        published = published[:1]
    if len(alike) > 1 and len(published) != 1:
        raise UserError(
            f"{name} fits {', '.join(alike)} equally well; choose one with --model, because they "
            "may expect differently prepared images or have another activation."
        )
    model = published[0] if published else alike[0]
    others = [other for other in alike if other != model]
    changes.append(f"recognised {model}" + (f", not {', '.join(others)}" if others else ""))
    return model


def _has(model: str, args: Mapping[str, Any]) -> bool:
    """Whether these are the arguments of `model` already."""
    return create_model(model, num_classes=1, **args) == create_model(model, num_classes=1)


def _unread(name: str, network: str) -> UserError:
    return UserError(
        f"{name} looks like {network}, which is not read; use timm's weights of a network that is "
        "here, --timm NAME (python -m xkd_jax.models lists them)."
    )
