"""Prefixes that trainers put before the names of a network's tensors."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from xkd_jax.convert.layouts import find_layout
from xkd_jax.errors import UserError

_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of parallel and compiled modules
# Names of a network, or of the part of it before the head, in trainers of several parts.
_PARTS = ("model", "net", "network", "backbone", "encoder", "trunk", "base_model")
# Pairs of networks in one file: which one is meant can't be known.
_PAIRS = (
    ("student", "teacher"),
    ("encoder_q", "encoder_k"),
    ("base_encoder", "momentum_encoder"),
    ("online_network", "target_network"),
    ("model", "ema_model"),
)
# What stands before a head's own name, such as "head.fc.weight"; or nothing.
_HEADS = re.compile(r"(head|cls_head)\.(?=\w+\.)|(?=(fc|linear|head|classifier)\.)")
_Tensor = TypeVar("_Tensor")


def strip_prefixes(
    name: str, state: Mapping[str, _Tensor], key: str = ""
) -> tuple[dict[str, _Tensor], list[str]]:
    """The state without prefixes that all tensors of the network share, and what was done.

    Args:
      name: the file's, for messages.
      state: by name.
      key: the prefix to choose, without its dot, where the file has several networks.

    Raises:
      UserError: the file holds two networks, or no tensors begin with `key`.
    """
    taken: list[str] = []
    wrapped = {found[0] for found in map(_WRAPPERS.match, state) if found}
    if wrapped:
        taken += sorted(wrapped)
        state = {_WRAPPERS.sub("", key): value for key, value in state.items()}
    else:
        state = dict(state)
    if key:
        state = _under(name, state, key)
        taken.append(f"{key}.")
    while (first := _shared(state)) and find_layout(state) is None:
        state = _without(state, first)
        taken.append(first)
    left: list[str] = []
    if find_layout(state) is None:
        part = _part(name, state)
        if part:
            state, left = _take_part(state, part)
            taken.append(f"{part}.")
    notes = []
    if taken:
        notes.append(f"took the prefix {' and '.join(taken)} off the tensors' names")
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        notes.append(f"left out {left[0]}{more}, not part of {taken[-1].rstrip('.')}")
    return state, notes


def find_prefix(name: str, key: str) -> bool:
    """Whether a tensor's `name` begins with `key` as its first part, after wrappers' prefixes."""
    return _WRAPPERS.sub("", name).startswith(f"{key}.")


def _shared(names: Iterable[str]) -> str:
    """The first part of all `names` with its dot, if they share one that isn't a tensor's name."""
    firsts = {name.partition(".")[0] for name in names}
    first = firsts.pop() if len(firsts) == 1 else ""
    return f"{first}." if first and any("." in name for name in names) else ""


def _without(state: Mapping[str, _Tensor], prefix: str) -> dict[str, _Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _under(name: str, state: Mapping[str, _Tensor], key: str) -> dict[str, _Tensor]:
    chosen = {k.removeprefix(f"{key}."): v for k, v in state.items() if k.startswith(f"{key}.")}
    if not chosen:
        firsts = sorted({tensor.partition(".")[0] for tensor in state})
        raise UserError(
            f"{name} has no tensors under the key {key!r}; their names begin with "
            f"{', '.join(firsts[:8])}."
        )
    return chosen


def _part(name: str, state: Mapping[str, object]) -> str:
    """The first part of the names of the network's tensors, if others don't have it; or ""."""
    firsts = {tensor.partition(".")[0] for tensor in state if "." in tensor}
    for pair in _PAIRS:
        if firsts.issuperset(pair):
            raise UserError(
                f"{name} holds two networks, {pair[0]!r} and {pair[1]!r}; choose one, such as "
                f"--key {pair[0]}."
            )
    alone = [one for pair in _PAIRS for one in pair if one in firsts and one not in _PARTS]
    found = [part for part in (*_PARTS, *alone) if part in firsts]
    return found[0] if len(found) == 1 else ""


def _take_part(state: Mapping[str, _Tensor], part: str) -> tuple[dict[str, _Tensor], list[str]]:
    """The tensors of `part` and of the head next to it, and the names of all others."""
    network: dict[str, _Tensor] = {}
    left = []
    for tensor, value in state.items():
        if tensor.startswith(f"{part}."):
            network[tensor.removeprefix(f"{part}.")] = value
        elif head := _HEADS.match(tensor):
            network[tensor[head.end() :]] = value
        else:
            left.append(tensor)
    return network, left
