"""Checkpoints as they come: safetensors, PyTorch's own files, and this library's."""

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

_EXPORTED_KEY = "xkd_jax_exported"  # metadata of a state dict that was written here
# What training scripts wrap a state dict in; an average of the weights goes first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")  # of parallel and of compiled modules
_COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm: one count, repeated by every layer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A state dict and what is known about it.

    Attributes:
      name: where it comes from, for messages.
      state: tensors by name, in PyTorch's layout, without BatchNorm's counters.
      metadata: what is known of model, args, image_size, mean, std, class_names, source ...
    """

    name: str
    state: dict[str, np.ndarray]
    metadata: dict[str, Any]


def read_checkpoint(path: str | os.PathLike, name: str = "") -> Checkpoint:
    """Reads a checkpoint of any kind: timm's, one like it, or one of ours.

    A `config.json` beside a state dict is read as the hub's.

    Args:
      path: of a .safetensors, or of what `torch.save` wrote.
      name: what to call it in messages; the path if not given.

    Raises:
      UserError: the file is missing, damaged, cut off, or holds something else.
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
    """A network's variables as timm's state dict, without BatchNorm's counters.

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
    """Writes a state dict that PyTorch loads strictly.

    Args:
      path: .safetensors, which keeps `metadata` too, or .pth or .bin, which needs PyTorch.
      state: by timm's name, without BatchNorm's counters.
      metadata: of the network, as `save_weights` has it.

    Raises:
      UserError: PyTorch is needed and missing, or the name ends otherwise.
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
    """What the hub's config.json tells; nothing where it is missing or something else."""
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
    """The first line of what an error says, or what it is called if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _import_torch(path: Path) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{path} needs PyTorch: pip install torch, or take a .safetensors instead."
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
        # Tensors and plain data only: unpickling anything else can run a stranger's code.
        # timm's and DeiT's checkpoints keep their command line in a Namespace, which can't.
        with torch.serialization.safe_globals([argparse.Namespace]):
            holder = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path} holds {found[1] if found else 'an object'} beside its tensors, which is never "
            "unpickled; load it where you trust it and save its state_dict() alone."
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
        # NumPy has no bfloat16 of PyTorch's; a wider float holds the same numbers.
        key: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for key, value in tensors.items()
    }
