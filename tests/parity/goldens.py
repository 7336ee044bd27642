"""Golden files: sketches of the reference outputs, small enough to keep in the repository."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.parity.filling import noise
from xkd_jax.models import MODELS

FOLDER = Path(__file__).parents[1] / "models" / "goldens"

_ENTRIES = 8


def family_of(name: str) -> str:
    """The stem of the file that keeps the network's golden: the module that defines it."""
    return MODELS[name].network.__module__.rpartition(".")[2]


def sketch(key: str, array: np.ndarray) -> np.ndarray:
    """What is kept of a tap, float32 and flat: logits in full, and a summary of others.

    The summary is the largest magnitude, a projection on fixed random signs, to which every element
    contributes, and eight elements, except for running statistics.
    """
    flat = np.asarray(array, np.float32).reshape(-1)
    if key.endswith("logits"):
        return flat
    signs = np.sign(noise("signs", flat.shape))
    projection = flat.astype(np.float64) @ signs / math.sqrt(flat.size)
    parts = [np.array([np.abs(flat).max(), projection], np.float32)]
    if not key.startswith("train/"):
        rng = np.random.RandomState(zlib.crc32(key.encode()))  # see `filling`: it never changes
        parts.append(flat[rng.randint(flat.size, size=_ENTRIES)])
    return np.concatenate(parts)


def _length(key: str, shape: list[int]) -> int:
    """The length of the sketch of a tap with that shape."""
    if key.endswith("logits"):
        return math.prod(shape)
    return 2 if key.startswith("train/") else 2 + _ENTRIES


def sketch_difference(key: str, got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference of two sketches, relative to the largest magnitude of the tap."""
    scale = np.abs(want).max() if key.endswith("logits") else want[0]
    return float(np.abs(got - want).max() / scale)


def read(family: str) -> dict[str, dict[str, Any]]:
    """The goldens of a family by network.

    Returns:
      for each network its `size`, `batch`, `train_size`, `train_batch`, the `versions` of the
      libraries that made it, and the `shapes` and `sketches` of its taps by key.
    """
    goldens = {}
    with np.load(FOLDER / f"{family}.npz") as file:
        for name in file.files:
            if name.endswith("/about"):
                continue
            about = json.loads(bytes(file[f"{name}/about"]))
            sketches, start = {}, 0
            for key, shape in about["shapes"].items():
                length = _length(key, shape)
                sketches[key] = file[name][start : start + length]
                start += length
            goldens[name] = {**about, "sketches": sketches}
    return goldens


def write(family: str, goldens: dict[str, dict[str, Any]]) -> None:
    """The inverse of `read`."""
    arrays = {}
    for name, golden in sorted(goldens.items()):
        sketches = golden["sketches"]
        about = {key: value for key, value in golden.items() if key != "sketches"}
        arrays[name] = np.concatenate(list(sketches.values()))
        arrays[f"{name}/about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / f"{family}.npz", **arrays)
