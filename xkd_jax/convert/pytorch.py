"""Files of torch.save, in which trainers keep a state dict under keys of many names."""

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np

from xkd_jax.convert.prefixes import find_prefix
from xkd_jax.errors import UserError

# Keys under which trainers store a state dict. Averaged weights come first, as in timm.
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "model_ema_state")
_WEIGHTS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "module",
    "state",
    "params",
    "weights",
)
_NETWORKS = ("student", "teacher")  # of distillation: which one is meant can't be known
# Other parts of training that hold tensors.
_TRAINING = re.compile(r".*(optim|sched|scaler|rng|loss|criterion|callback|loops|queue).*|amp")
_STATED = ("arch", "model", "model_name", "architecture")  # fields that name the network
_DEPTH = 4  # of nested dicts


def import_torch(path: Path) -> Any:
    """PyTorch, which the file at `path` needs.

    Raises:
      UserError: it is not installed.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{path} needs PyTorch: pip install torch, or use a .safetensors instead."
        ) from error
    return torch


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type's name if the message is empty."""
    return (str(error) or type(error).__name__).splitlines()[0]


class TorchFile(NamedTuple):
    """The state dict of a file of torch.save.

    Attributes:
      tensors: by name, as in the file.
      network: the name of the network, if the file states one, or "".
      notes: a sentence for each choice that was made.
      key: the key that was asked for, if it is a prefix of names and not a dict; or "".
    """

    tensors: dict[str, np.ndarray]
    network: str
    notes: list[str]
    key: str


def read_torch(path: Path, key: str = "") -> TorchFile:
    """Reads a file of torch.save without running code that it may hold.

    Args:
      path: the file.
      key: of the state dict, where the file has several.

    Raises:
      UserError: PyTorch is missing, the file can't be read, or has no or several state dicts.
    """
    holder = _load(path)
    if not isinstance(holder, Mapping):
        raise UserError(f"{path} holds a {type(holder).__name__}; save a network's state_dict().")
    state, notes, key = _find_state(path, holder, key)
    tensors = {str(name): value for name, value in state.items() if _is_tensor(value)}
    if not tensors:
        keys = ", ".join(map(str, list(holder)[:8]))
        has = f"its keys are {keys}" if keys else "it is an empty dict"
        raise UserError(f"{path} holds no tensors ({has}); save a network's state_dict().")
    arrays = {name: _to_numpy(path, name, value) for name, value in tensors.items()}
    return TorchFile(arrays, _stated(holder), notes, key)


def _load(path: Path) -> Any:
    torch = import_torch(path)
    # Tensors and plain data only: unpickling anything else can run arbitrary code. A Namespace, in
    # which timm's and DeiT's checkpoints hold their command line, can't, nor can NumPy's numbers,
    # as which trainers store accuracies.
    scalar: Any = np.float64(0).__reduce__()[0]
    allowed = [argparse.Namespace, np.dtype, type(np.dtype("f8")), type(np.dtype("f4")), scalar]
    allowed += [(scalar, "numpy.core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if not found:
            raise UserError(f"{path} can't be read by torch.load ({first_line(error)}).") from error
        raise UserError(
            f"{path} holds {found[1]} besides its tensors, which is not unpickled for safety; "
            "load it where you trust it and save only its state_dict()."
        ) from error
    except (RuntimeError, EOFError, LookupError, ValueError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    """The error for a file that PyTorch can't read; says why only where that is known."""
    if "EOF" in str(error) or isinstance(error, EOFError):
        return UserError(f"{path} is cut off ({first_line(error)}); copy or download it again.")
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except zipfile.BadZipFile as broken:
            bad = first_line(broken)
        if bad:
            return UserError(
                f"{path} is damaged ({bad} fails its checksum); copy or download it again."
            )
    return UserError(
        f"{path} can't be read by torch.load ({first_line(error)}); load it where it was written, "
        "and save its state_dict()."
    )


def _find_state(path: Path, top: Mapping, key: str) -> tuple[Mapping, list[str], str]:
    """The state dict in nested dicts, a sentence for each choice, and `key` if it is a prefix."""
    notes, holder = [], top
    for _ in range(_DEPTH):
        inside = {str(name): value for name, value in holder.items() if _is_state(name, value)}
        if key and key in inside:
            holder, key = inside[key], ""
            continue
        if key and any(find_prefix(str(name), key) for name in holder):
            return holder, notes, key
        has_tensors = any(map(_is_tensor, holder.values()))
        chosen, note = _choose(path, inside, has_tensors, key)
        if not chosen:
            break
        notes += [note] if note else []
        holder = inside[chosen]
    if key:
        raise UserError(
            f"{path} has no state dict under the key {key!r}; its keys are "
            f"{', '.join(map(str, list(top)[:12]))}."
        )
    return holder, notes, ""


def _choose(
    path: Path, inside: Mapping[str, Mapping], has_tensors: bool, key: str
) -> tuple[str, str]:
    """The key of the dict that holds the weights, or "", and a sentence if others were left."""
    averages = [name for name in _AVERAGES if name in inside]
    weights = [name for name in (*_WEIGHTS, *_NETWORKS) if name in inside]
    for names in (averages, weights, [] if has_tensors else list(inside)):
        if len(names) == 1:
            others = [name for name in (*averages, *weights) if name != names[0]]
            note = f"read {names[0]!r}"
            if others and not key:
                return names[0], f"{note}; --key {others[0]} reads {others[0]!r} instead"
            known = names[0] in (*_AVERAGES, *_WEIGHTS)
            return names[0], "" if known else note
        if names:
            listed = ", ".join(map(repr, names))
            if key:
                raise UserError(f"{path} has no key {key!r}; it has state dicts under {listed}.")
            raise UserError(
                f"{path} has {len(names)} state dicts, under {listed}; choose one, such as "
                f"--key {names[0]}."
            )
    return "", ""


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "dtype")


def _is_state(name: Any, value: Any) -> bool:
    """Whether `value` is a dict with tensors, and not an optimizer's or another part's state."""
    if not isinstance(value, Mapping) or "param_groups" in value:
        return False
    return not _TRAINING.fullmatch(str(name).lower()) and _has_tensors(value, _DEPTH)


def _has_tensors(value: Mapping, depth: int) -> bool:
    return any(
        _is_tensor(item) or (depth and isinstance(item, Mapping) and _has_tensors(item, depth - 1))
        for item in value.values()
    )


def _stated(holder: Mapping) -> str:
    """The name of the network, as a trainer stores it beside the weights; "" if it doesn't."""
    for fields in (holder, holder.get("args"), holder.get("hyper_parameters")):
        fields = vars(fields) if isinstance(fields, argparse.Namespace) else fields
        if isinstance(fields, Mapping):
            for field in _STATED:
                if isinstance(fields.get(field), str) and fields[field]:
                    return fields[field]
    return ""


def _to_numpy(path: Path, name: str, tensor: Any) -> np.ndarray:
    torch = import_torch(path)
    tensor = tensor.detach()
    # NumPy has neither bfloat16 nor the 8-bit floats; float32 holds the same numbers.
    if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float64):
        tensor = tensor.float()
    try:
        return tensor.numpy()
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{path}: {name} can't be read ({first_line(error)}); only dense, unquantised tensors "
            "can be converted."
        ) from error
