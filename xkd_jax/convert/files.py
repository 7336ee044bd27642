"""Checkpoint files: safetensors, PyTorch's, and this library's."""

import dataclasses
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import save

from xkd_jax.convert.configs import read_config, state_network
from xkd_jax.convert.formats import PYTORCH, find_format
from xkd_jax.convert.prefixes import strip_prefixes
from xkd_jax.convert.pytorch import import_torch, read_torch
from xkd_jax.convert.rules import family_of, timm_name, to_torch
from xkd_jax.errors import UserError, unknown
from xkd_jax.models import NETWORKS
from xkd_jax.weights import (
    METADATA_KEY,
    parse_metadata,
    read_safetensors,
    write_file,
)

_EXPORTED_KEY = "xkd_jax_exported"  # metadata key of state dicts written here
_COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm: the same in every layer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A state dict and its metadata.

    Attributes:
      name: its origin, for messages.
      state: tensors by name, in PyTorch's layout, without BatchNorm's counters.
      metadata: model, args, image_size, mean, std, class_names, source ..., where known;
        `architecture` is the name of a network that is not among `NETWORKS`.
      notes: a sentence for each thing that was chosen, ignored or renamed while reading.
    """

    name: str
    state: dict[str, np.ndarray]
    metadata: dict[str, Any]
    notes: list[str] = dataclasses.field(default_factory=list)


def read_checkpoint(path: str | os.PathLike, name: str = "", key: str = "") -> Checkpoint:
    """Reads a checkpoint: timm's, a similar one, or this library's.

    A `config.json` in the folder of a state dict is read as timm's or Hugging Face's.

    Args:
      path: a .safetensors file, or one written by `torch.save`; recognised by its content.
      name: its name in messages; by default the path.
      key: the state dict to read, where the file has several, such as "teacher".

    Raises:
      UserError: the file is missing, damaged, truncated, of another format or not a checkpoint.
    """
    path = Path(path)
    name = name or str(path)
    if find_format(path) == PYTORCH:
        file = read_torch(path, key)
        stated = state_network(file.network) if file.network else {}
        return _checkpoint(name, path, file.tensors, stated, file.notes, file.key)
    tensors, texts = read_safetensors(path)
    if METADATA_KEY in texts:
        metadata = parse_metadata(path, texts[METADATA_KEY])
        model = metadata.get("model", "")
        if model not in NETWORKS:
            raise unknown("network", model, NETWORKS)
        return Checkpoint(name, to_state(tensors, model), metadata)
    if _EXPORTED_KEY in texts:
        metadata = parse_metadata(path, texts[_EXPORTED_KEY])
        state, counter = _split_counter(tensors)
        return Checkpoint(name, state, metadata | counter)
    return _checkpoint(name, path, tensors, _stated(texts), [], key)


def _stated(texts: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata of a foreign .safetensors file states: its network, source and license."""
    kept = {field: texts[field] for field in ("source", "license") if texts.get(field)}
    return kept | (state_network(texts["architecture"]) if texts.get("architecture") else {})


def to_state(variables: Mapping[str, Any], model: str) -> dict[str, np.ndarray]:
    """Turns a network's variables into timm's state dict, without BatchNorm's counters.

    Args:
      variables: nested dict of numpy arrays, or flat by path, "params/conv1/kernel".
      model: a key of `NETWORKS`.
    """
    family = family_of(model)
    flat: dict[str, Any] = traverse_util.flatten_dict(variables, sep="/")
    return {timm_name(path, family): to_torch(path, leaf) for path, leaf in flat.items()}


def write_state(
    path: str | os.PathLike, state: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
    """Writes a state dict that PyTorch's `load_state_dict` accepts with `strict=True`.

    Args:
      path: a .safetensors, which also holds `metadata`, or a .pth or .bin, which needs PyTorch.
      state: tensors by timm's name, without BatchNorm's counters.
      metadata: of the network, as for `save_weights`.

    Raises:
      UserError: PyTorch is needed but not installed, or `path` has another suffix.
    """
    path = Path(path)
    state = {name: np.asarray(array, order="C") for name, array in state.items()}
    for name in list(state):
        if name.endswith(".running_mean"):
            counter = name.removesuffix("running_mean") + _COUNTER
            state[counter] = np.array(metadata.get(_COUNTER, 0), np.int64)
    if path.suffix == ".safetensors":
        texts = {"format": "pt", _EXPORTED_KEY: json.dumps(metadata, sort_keys=True)}
        contents = save(state, texts)
    elif path.suffix in (".pth", ".bin"):
        torch = import_torch(path)
        buffer = io.BytesIO()
        torch.save({name: torch.from_numpy(array) for name, array in state.items()}, buffer)
        contents = buffer.getvalue()
    else:
        raise UserError(f"{path} must end in .safetensors, .pth or .bin.")
    write_file(path, contents)


def _checkpoint(
    name: str,
    path: Path,
    tensors: Mapping[str, np.ndarray],
    stated: dict[str, Any],
    notes: list[str],
    key: str,
) -> Checkpoint:
    """A foreign checkpoint, with what it and the config.json next to it state."""
    config, ignored = read_config(path.parent)
    if stated.keys() & {"model", "architecture"}:  # by the file itself
        config = {k: v for k, v in config.items() if k not in ("model", "architecture", "args")}
    stripped, taken = strip_prefixes(name, tensors, key)
    state, counter = _split_counter(stripped)
    return Checkpoint(name, state, config | stated | counter, [*ignored, *notes, *taken])


def _split_counter(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The tensors without BatchNorm's counters, and the largest of the counters as metadata."""
    state = {name: array for name, array in tensors.items() if not name.endswith(_COUNTER)}
    counter = max((int(tensors[name]) for name in tensors.keys() - state.keys()), default=0)
    return state, {_COUNTER: counter} if counter else {}
