"""Checkpoint files: safetensors, PyTorch's, and this library's."""

import argparse
import dataclasses
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import save

from xkd_jax.convert.rules import family_of, timm_name, to_torch
from xkd_jax.errors import UserError, unknown
from xkd_jax.models import MODELS
from xkd_jax.weights import (
    METADATA_KEY,
    PYTORCH_MAGIC,
    parse_metadata,
    read_safetensors,
    write_file,
)

_EXPORTED_KEY = "xkd_jax_exported"  # metadata key of state dicts written here
# Keys under which training scripts store a state dict; averaged weights come first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")  # added by parallel and compiled modules
_COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm: the same in every layer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A state dict and its metadata.

    Attributes:
      name: its origin, for messages.
      state: tensors by name, in PyTorch's layout, without BatchNorm's counters.
      metadata: model, args, image_size, mean, std, class_names, source ..., where known.
    """

    name: str
    state: dict[str, np.ndarray]
    metadata: dict[str, Any]


def read_checkpoint(path: str | os.PathLike, name: str = "") -> Checkpoint:
    """Reads a checkpoint: timm's, a similar one, or this library's.

    A `config.json` in the folder of a state dict is read as the Hugging Face hub's.

    Args:
      path: a .safetensors file, or one written by `torch.save`.
      name: its name in messages; by default the path.

    Raises:
      UserError: the file is missing, damaged, truncated or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file at {path}; give a .safetensors, .pth or .bin.")
    name = name or str(path)
    config = _read_config(path.with_name("config.json"))
    if path.suffix != ".safetensors":
        return _checkpoint(name, _read_torch(path), config)
    tensors, texts = read_safetensors(path)
    if METADATA_KEY in texts:
        metadata = parse_metadata(path, texts[METADATA_KEY])
        model = metadata.get("model", "")
        if model not in MODELS:
            raise unknown("network", model, MODELS)
        return Checkpoint(name, to_state(tensors, model), metadata)
    if _EXPORTED_KEY in texts:
        config = parse_metadata(path, texts[_EXPORTED_KEY])
    return _checkpoint(name, tensors, config)


def to_state(variables: Mapping[str, Any], model: str) -> dict[str, np.ndarray]:
    """Turns a network's variables into timm's state dict, without BatchNorm's counters.

    Args:
      variables: nested dict of numpy arrays, or flat by path, "params/conv1/kernel".
      model: a key of `MODELS`.
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
        torch = _import_torch(path)
        buffer = io.BytesIO()
        torch.save({name: torch.from_numpy(array) for name, array in state.items()}, buffer)
        contents = buffer.getvalue()
    else:
        raise UserError(f"{path} must end in .safetensors, .pth or .bin.")
    write_file(path, contents)


def _checkpoint(name: str, tensors: Mapping[str, np.ndarray], metadata: dict) -> Checkpoint:
    state, counter = {}, 0
    for key, array in tensors.items():
        key = _PREFIXES.sub("", key)
        if key.endswith(_COUNTER):
            counter = max(counter, int(array))
        else:
            state[key] = array
    if counter:
        metadata = {**metadata, _COUNTER: counter}
    return Checkpoint(name, state, metadata)


def _read_config(path: Path) -> dict[str, Any]:
    """The metadata in the hub's config.json; empty if it is missing or of another kind."""
    try:
        config = json.loads(path.read_text())
        model, pretrained = config["architecture"], config.get("pretrained_cfg", config)
        metadata = {key: list(pretrained[key]) for key in ("mean", "std")}
        metadata["image_size"] = pretrained["input_size"][-1]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    if model in MODELS:
        metadata |= {"model": model, "args": config.get("model_args", {})}
    return metadata


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type's name if the message is empty."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _import_torch(path: Path) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{path} needs PyTorch: pip install torch, or use a .safetensors instead."
        ) from error
    return torch


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic and magic not in PYTORCH_MAGIC:
        raise UserError(f"{path} was not written by torch.save; give a .safetensors, .pth or .bin.")
    if not magic or (magic == PYTORCH_MAGIC[0] and not zipfile.is_zipfile(path)):
        raise UserError(f"{path} is cut off: its end is missing; copy or download it again.")
    torch = _import_torch(path)
    try:
        # Tensors and plain data only: unpickling anything else can run arbitrary code. A Namespace,
        # in which timm's and DeiT's checkpoints hold their command line, can't.
        with torch.serialization.safe_globals([argparse.Namespace]):
            holder = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path} holds {found[1] if found else 'an object'} besides its tensors, which is not "
            "unpickled for safety; load it where you trust it and save only its state_dict()."
        ) from error
    except (RuntimeError, EOFError, LookupError, ValueError, OSError) as error:
        raise UserError(
            f"{path} is damaged or cut off ({first_line(error)}); copy or download it again."
        ) from error
    while isinstance(holder, dict):
        inner = next((holder[key] for key in _WRAPPERS if isinstance(holder.get(key), dict)), None)
        if inner is None:
            break
        holder = inner
    if not isinstance(holder, dict):
        raise UserError(f"{path} holds a {type(holder).__name__}; save a network's state_dict().")
    tensors = {key: value for key, value in holder.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors; save a network's state_dict().")
    return {
        # PyTorch's bfloat16 has no NumPy dtype; float32 holds the same numbers.
        key: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for key, value in tensors.items()
    }
