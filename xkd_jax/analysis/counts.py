"""Parameters, FLOPs, taps and tensors' names of the registered networks.

Tracing a network takes about half a second, so the counts of all networks in `MODELS` are kept in
assets/networks.json.xz, which `scripts/make_network_counts.py` writes. Networks that are not in it,
or that have changed since, are traced.
"""

import dataclasses
import functools
import hashlib
import json
import lzma
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from xkd_jax.analysis.flops import count_flops, count_parameters
from xkd_jax.errors import UserError
from xkd_jax.models import MODELS
from xkd_jax.models.variant import Variant

PATH = Path(__file__).parent.parent / "assets" / "networks.json.xz"


def describe(name: str) -> dict[str, Any]:
    """One network's counts, with its default number of classes and image size.

    Returns:
      `kind`, `image_size`, `parameters`, `gflops` (multiply-adds), and `taps`: the shape of every
      entry of `out`, without the batch axis.

    Raises:
      UserError: the packaged file is missing or damaged.
    """
    network: Any = MODELS[name].network
    entry = _entry(name)
    return {
        "kind": network.kind,
        "image_size": MODELS[name].image_size,
        "parameters": entry["parameters"],
        "gflops": entry["flops"] / 1e9,
        "taps": {key: tuple(shape) for key, shape in entry["taps"].items()},
    }


def tensors(name: str) -> list[str]:
    """The paths of a network's variables, such as "params/blocks_0/norm1/scale".

    Of those that differ in numbers alone, one stands for all.

    Raises:
      UserError: the packaged file is missing or damaged.
    """
    return _entry(name)["tensors"]


def _entry(name: str) -> dict[str, Any]:
    entry = read().get(name)
    if entry is None or entry["fingerprint"] != fingerprint(MODELS[name]):
        return count(MODELS[name])
    return entry


def count(variant: Variant) -> dict[str, Any]:
    """Traces a network.

    Returns:
      `parameters`, `flops`, `taps` as in `describe` with lists as shapes, and `tensors`.
    """
    size = variant.image_size
    model: Any = variant.network(**variant.args)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    taps: dict[str, list[int]] = {}

    def forward(variables, images):
        logits, out = model.apply(variables, images)
        taps.update({k: list(v) if k == "grid" else list(v.shape[1:]) for k, v in out.items()})
        return logits

    flops = count_flops(forward, variables, images)
    paths = traverse_util.flatten_dict(variables, sep="/")
    return {
        "parameters": count_parameters(variables["params"]),
        "flops": flops,
        "taps": taps,
        "tensors": sorted({re.sub(r"\d+", "#", path): path for path in paths}.values()),
    }


def fingerprint(variant: Variant) -> str:
    """A hash of the class's name, all fields that the counts depend on, and the image size."""
    network = variant.network
    fields = {field.name: field.default for field in dataclasses.fields(network)} | variant.args
    fields = {key: fields[key] for key in sorted(fields.keys() - {"parent", "name", "dtype"})}
    text = repr((network.__module__, network.__qualname__, fields, variant.image_size))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def read(path: Path = PATH) -> dict[str, dict[str, Any]]:
    """The entries of a file, by network: what `count` returns, and a `fingerprint`.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        return json.loads(lzma.decompress(path.read_bytes()))
    except (OSError, lzma.LZMAError, ValueError) as error:
        raise UserError(
            f"the packaged file {path} is missing or damaged; reinstall xkd_jax."
        ) from error


def write(entries: dict[str, dict[str, Any]], path: Path = PATH) -> None:
    """The inverse of `read`."""
    text = json.dumps(entries, separators=(",", ":"))
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
