"""Exports a student: its weights or its inference pass, and how images are prepared for it."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from xkd_jax import backend
from xkd_jax.augment import ops
from xkd_jax.convert.files import to_state, write_state
from xkd_jax.data.frame import Frame
from xkd_jax.errors import UserError
from xkd_jax.export.runtime import CONVERTER, EXPORT, LITERT, PREPARATION, require
from xkd_jax.model import Model
from xkd_jax.models import cifar
from xkd_jax.models.repvgg import RepVGG, reparameterize
from xkd_jax.weights import write_file

# Arguments that timm's constructors know by the same names.
_TIMMS = {
    "depth", "drop_path_rate", "drop_rate", "embed_dim", "img_size", "init_values", "layers",
    "mlp_ratio", "num_heads", "patch_size", "reg_tokens", "window_size",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """How a student is exported.

    Attributes:
      crop_pct: the share of the shorter side that is cropped from the centre, to be recorded.
      fold: whether BatchNorm becomes part of the convolutions in ONNX, as it always does in LiteRT.
      uint8: whether the exported function takes uint8 images and normalises them itself.
      frame: how a detector's images are resized, to be recorded; None for a classifier.
    """

    crop_pct: float = 1.0
    fold: bool = False
    uint8: bool = False
    frame: Frame | None = None


def export(model: Model, target: str, folder: Path, options: Options) -> list[Path]:
    """Writes `model` for another runtime; returns the files.

    Branches that only training needs, such as RepVGG's, are folded into one convolution each,
    except for timm, which reads the weights of the branches.

    Args:
      model: the student with its weights.
      target: a key of `TARGETS`.
      folder: created if it doesn't exist.
      options: see there.

    Raises:
      UserError: the network can't be expressed in the target, or a package is missing.
    """
    if model.is_detector and target not in ("onnx", "stablehlo"):
        raise UserError(
            f"--to {target} is for classifiers, but {model.name} is a detector; take --to onnx or "
            "--to stablehlo."
        )
    model = model if target == "timm" else _without_branches(model)
    path, layout = TARGETS[target](model, folder, options)
    if not layout:
        return [path, folder / "config.json"]
    write_file(folder / PREPARATION, _json(preparation(model, options) | {"images": layout}))
    return [path, folder / PREPARATION]


def _without_branches(model: Model) -> Model:
    """The same function with as few convolutions as possible: re-parameterised, if it can be."""
    if not isinstance(model.module, RepVGG):
        return model
    module, variables = reparameterize(model.module, model.variables)
    args = model.args | {"branches": False}
    return dataclasses.replace(model, module=module, variables=variables, args=args)


def preparation(model: Model, options: Options) -> dict[str, Any]:
    """How images are prepared for the exported function, and what its outputs mean.

    A detector's are resized to `min_size` or `max_size`, see `Frame`, and padded at the right and
    bottom with the mean to a square of side `size`.
    """
    normalized = {"mean": list(model.mean), "std": list(model.std), "scale": 1 / 255}
    how: dict[str, Any] = {"crop_pct": options.crop_pct}
    if options.frame:
        how = dataclasses.asdict(options.frame)
    return {
        "size": model.image_size,
        **how,
        "interpolation": "bilinear",
        "dtype": "uint8" if options.uint8 else "float32",
        # What is left to do: (pixel * scale - mean) / std.
        "normalize": None if options.uint8 else normalized,
        "class_names": list(model.class_names),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _timm(model: Model, folder: Path, options: Options) -> tuple[Path, str]:
    """The folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    if model.name in cifar.VARIANTS or re.search(r"(_32|x\d)$", model.name):
        raise UserError(f"timm has no {model.name}; take --to onnx or --to stablehlo.")
    unknown = model.args.keys() - _TIMMS
    if unknown:
        names = ", ".join(f"{name}={model.args[name]!r}" for name in sorted(unknown))
        raise UserError(
            f"timm's {model.name} has no equivalent of {names}; take --to onnx or --to stablehlo."
        )
    state = to_state(model.variables, model.name)
    write_state(folder / "model.safetensors", state, model.metadata())
    size, count = model.image_size, model.num_classes
    config = {
        "architecture": model.name,
        "num_classes": count,
        "model_args": model.args,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "mean": list(model.mean),
            "std": list(model.std),
            "crop_pct": options.crop_pct,
            "interpolation": "bilinear",
            "num_classes": count,
            "label_names": list(model.class_names),
        },
    }
    write_file(folder / "config.json", _json(config))
    return folder / "model.safetensors", ""


def _onnx(model: Model, folder: Path, options: Options) -> tuple[Path, str]:
    require("onnx", EXPORT, "--to onnx")
    from xkd_jax.export.onnx_file import write_onnx

    path = folder / "model.onnx"
    write_onnx(model, path, preparation(model, options), options.fold, options.uint8)
    return path, "[1, 3, H, W]" if model.is_detector else "[N, 3, H, W]"


def _litert(model: Model, folder: Path, options: Options) -> tuple[Path, str]:
    require("ai_edge_litert", LITERT, "--to litert")
    require("litert_converter", CONVERTER, "--to litert")
    from xkd_jax.export.litert_file import write_litert

    path = folder / "model.tflite"
    return path, "[N, H, W, 3]" if write_litert(model, path, options.uint8) else "[1, H, W, 3]"


def _stablehlo(model: Model, folder: Path, options: Options) -> tuple[Path, str]:
    """For `jax.export.deserialize`: images [N, H, W, 3] to logits [N, K], on any platform.

    A detector also takes sizes [N, 2], and returns a dict of what `Detections` has.
    """
    require("flatbuffers", EXPORT, "--to stablehlo")  # which JAX serializes with
    variables = model.variables

    def forward(images: jax.Array) -> jax.Array:
        return model.forward(variables, normalized(model, images))[0]

    def detect(images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        found, _ = model.forward(variables, normalized(model, images), sizes=sizes)
        return {name: x for name, x in dataclasses.asdict(found).items() if x is not None}

    (count,) = jax.export.symbolic_shape("n")
    size = model.image_size
    dtype = jnp.uint8 if options.uint8 else jnp.float32
    images = [jax.ShapeDtypeStruct((count, size, size, 3), dtype)]
    sizes = [jax.ShapeDtypeStruct((count, 2), jnp.float32)]
    function, inputs = (detect, images + sizes) if model.is_detector else (forward, images)
    with backend.assume("gpu"):  # XLA's convolutions, which every platform has
        exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(*inputs)
    path = folder / "model.stablehlo"
    write_file(path, bytes(exported.serialize()))
    return path, "[N, H, W, 3]"


def normalized(model: Model, images: jax.Array) -> jax.Array:
    """uint8 images normalised for `model`; float images are already."""
    if images.dtype != jnp.uint8:
        return images
    return ops.normalize(ops.to_float(images), model.mean, model.std)


# Each writes its file and returns the layout of its images; timm's folder describes them itself.
TARGETS: dict[str, Callable[[Model, Path, Options], tuple[Path, str]]] = {
    "timm": _timm,
    "onnx": _onnx,
    "litert": _litert,
    "stablehlo": _stablehlo,
}
