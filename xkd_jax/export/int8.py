"""Quantises an ONNX file to 8 bits after training, with ONNX Runtime."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xkd_jax.augment import ops
from xkd_jax.data.encoded import open_split
from xkd_jax.export import runtime

IMAGES = 512
_BATCH = 32


def calibration_images(data: tuple[str, str, str], size: int, crop_pct: float) -> np.ndarray:
    """Up to `IMAGES` images of a split, uint8 [n, size, size, 3], the same in every call.

    Args:
      data: name, split and data folder, as for `data.load`; labels aren't needed.
      size: side of the network's input, pixels.
      crop_pct: the share of the shorter side that is cropped.

    Raises:
      UserError: the data can't be read.
    """
    split = open_split(*data, size, "auto", "stop", crop_pct, labelled=False)
    count = min(IMAGES, len(split))
    rows = np.sort(np.random.default_rng(0).choice(len(split), count, replace=False))

    crop = jax.jit(lambda images: ops.evaluated_pixels(images, size, split.crop_pct))
    batches = (split.images[rows[i : i + _BATCH]] for i in range(0, count, _BATCH))
    return np.concatenate([np.rint(255 * crop(images)).astype(np.uint8) for images in batches])


def quantize(source: Path, images: np.ndarray) -> Path:
    """Writes an 8-bit version of an ONNX file next to it, `model_int8.onnx`.

    Weights and activations are quantised, except for the normalisation of uint8 images. The
    settings are those that ONNX Runtime recommends for CPUs: uint8 activations, int8 weights per
    channel, and 7 bits of these, since the sums of products saturate on x86 CPUs without VNNI.

    Args:
      source: of `write_onnx`, with `fold`.
      images: from `calibration_images`.
    """
    import onnx  # pyright: ignore[reportMissingImports]
    from onnxruntime import quantization  # pyright: ignore[reportMissingImports]

    target = source.with_name(f"{source.stem}_int8.onnx")
    student, _ = runtime.load(source)

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = _batches(student, images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._batches, None)

    nodes = onnx.load(source).graph.node
    first = next(i for i, node in enumerate(nodes) if node.op_type == "Conv")
    with tempfile.TemporaryDirectory() as folder:
        # Adds the shapes that the quantiser looks for; the graph is optimised already.
        shaped = Path(folder) / "shaped.onnx"
        quantization.quant_pre_process(
            source, shaped, skip_optimization=True, skip_symbolic_shape=True
        )
        quantization.quantize_static(
            shaped,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            nodes_to_exclude=[node.name for node in nodes[:first]],
        )
    return target


def _batches(student: runtime.Exported, images: np.ndarray) -> Iterator[dict[str, Any]]:
    for i in range(0, len(images), _BATCH):
        yield {"images": student.prepare(images[i : i + _BATCH]).transpose(0, 3, 1, 2)}
