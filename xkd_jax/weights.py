"""Weights as safetensors files, whose metadata describes the network.

This module never unpickles: an untrusted file can hold wrong weights, but can't run code.
"""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from xkd_jax.errors import UserError, unknown
from xkd_jax.reporting.files import write_file

# How files of torch.save begin: a zip, or before PyTorch 1.6 a pickle.
PYTORCH_MAGIC = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")
_ASSETS = Path(__file__).parent / "assets"
METADATA_KEY = "xkd_jax"  # in the file's own metadata: JSON of ours
PACKAGED = "packaged:"  # prefix of a name: weights that are installed with xkd_jax


def locate(weights: str | os.PathLike) -> Path:
    """The file that `weights` names: a path, or "packaged:NAME" for one installed with xkd_jax.

    Raises:
      UserError: there are no packaged weights of that name.
    """
    text = os.fspath(weights)
    if not text.startswith(PACKAGED):
        return Path(text)
    known = {path.stem: path for path in _ASSETS.glob("*.safetensors")}
    name = text.removeprefix(PACKAGED)
    if name not in known:
        raise unknown("packaged weights", name, known)
    return known[name]


def save_weights(path: str | os.PathLike, variables: dict, metadata: dict[str, Any]) -> None:
    """Writes a network's variables and the metadata needed to use them, atomically.

    Args:
      path: the file to write; missing folders are created.
      variables: `{"params": ..., "batch_stats": ...}`, arrays of any shape.
      metadata: JSON-serialisable: model name, args, num_classes, mean, std, image_size, ...
    """
    text = json.dumps(metadata, sort_keys=True)
    write_file(Path(path), save(_flatten(variables), metadata={METADATA_KEY: text}))


def list_sources(name: str, metadata: dict[str, Any]) -> tuple[dict[str, str], ...]:
    """The published weights that a file's weights were made from, each with its licence.

    Args:
      name: what the file is called in a config.
      metadata: the file's.

    Returns:
      Objects with `weights`, a name or address, and `license`, "" if it is not recorded; empty for
      a network that was trained from random weights.
    """
    if "license" not in metadata and "sources" in metadata:
        return tuple(metadata["sources"])
    own = "Apache-2.0" if name.startswith(PACKAGED) else ""  # xkd_jax's
    weights = name if own else metadata.get("source", name)
    return ({"weights": weights, "license": metadata.get("license", own)},)


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The start of an .npy file whose rows are appended later."""
    buffer = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(buffer, about)
    return buffer.getvalue()


def load_weights(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a file written by `save_weights`.

    Returns:
      the variables as a nested dict of numpy arrays, and the metadata.

    Raises:
      UserError: the file is missing, damaged, or without xkd_jax's metadata.
    """
    path = Path(path)
    tensors, texts = read_safetensors(path)
    if METADATA_KEY not in texts:
        raise UserError(
            f"{path} is a safetensors file without xkd_jax's metadata; give one that xkd_jax "
            f"wrote, or convert it: python -m xkd_jax.convert --from {path} --out FILE."
        )
    metadata = parse_metadata(path, texts[METADATA_KEY])
    return traverse_util.unflatten_dict(tensors, sep="/"), metadata


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads any safetensors file: its tensors by name, and its metadata.

    Raises:
      UserError: the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"there is no weights file at {path}; give a .safetensors file.")
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a valid safetensors file ({_damage(path) or error}); copy or write it "
            "again."
        ) from error


def _damage(path: Path) -> str:
    """Why a safetensors file can't be read; empty if unknown.

    The file begins with the header's length in 8 bytes; the header holds each tensor's end.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(PYTORCH_MAGIC):
            return f"PyTorch's files are read by python -m xkd_jax.convert --from {path}"
        begin = 8 + int.from_bytes(start, "little")
        if begin > 100_000_000:  # safetensors' own limit
            return ""
        header = file.read(begin - 8)
    needed = begin
    if size >= begin:
        try:
            tensors = json.loads(header)
            needed += max(
                value["data_offsets"][1] for value in tensors.values() if "data_offsets" in value
            )
        except (ValueError, TypeError, LookupError, AttributeError):
            return ""
    return f"it is cut off: {size:,} of {needed:,} bytes" if size < needed else ""


def parse_metadata(path: Path, text: str) -> dict[str, Any]:
    """Parses `text`, JSON from the metadata of the file at `path`.

    Raises:
      UserError: it is not a JSON object.
    """
    try:
        metadata = json.loads(text)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise UserError(f"{path} has metadata that is not a JSON object; write the file again.")
    return metadata


def check_weights(
    path: str | os.PathLike, variables: dict, expected: dict, network: str = "the network"
) -> None:
    """Checks that weights have exactly the tensors and shapes that a network needs.

    Args:
      path: their origin, for the message.
      variables: nested dict of arrays.
      expected: nested dict of `jax.ShapeDtypeStruct`, as `jax.eval_shape` of `init` returns it.
      network: its name, for the message.

    Raises:
      UserError: a tensor is missing, unexpected or has another shape; the message names the first
        five and gives their number.
    """
    have = {name: np.shape(leaf) for name, leaf in _flat_items(variables)}
    want = {name: tuple(leaf.shape) for name, leaf in _flat_items(expected)}
    wrong = [f"{name} is missing" for name in sorted(want.keys() - have.keys())]
    wrong += [
        f"{name} has the shape {list(have[name])} instead of {list(want[name])}"
        for name in sorted(want.keys() & have.keys())
        if have[name] != want[name]
    ]
    wrong += [f"unexpected tensor {name}" for name in sorted(have.keys() - want.keys())]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"{path} does not fit {network} in {len(wrong)} of its tensors: "
            f"{'; '.join(wrong[:5])}{more}."
        )


def fingerprint(variables: dict) -> str:
    """A hash of 16 hex digits over all names, shapes, dtypes and values of `variables`.

    SHA-256 over the tensors in the order of their names: the same on every machine.
    """
    digest = hashlib.sha256()
    for name, array in sorted(_flatten(variables).items()):
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _flat_items(tree: dict) -> list[tuple[str, Any]]:
    return list(traverse_util.flatten_dict(tree, sep="/").items())


def _flatten(variables: dict) -> dict[str, np.ndarray]:
    """Nested dict of arrays to {"params/conv1/kernel": numpy array in C order}."""
    host = jax.device_get(variables)
    return {name: np.asarray(leaf, order="C") for name, leaf in _flat_items(host)}
