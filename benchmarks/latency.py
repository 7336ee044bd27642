"""Accuracy, size and latency of a teacher and of its exported student on one CPU.

python benchmarks/latency.py runs/quickstart/cakd [--teacher packaged:quickstart_teacher]
    [--data fashion_mnist_mini] [--threads 1] [--runs 500] [--untrained NAME ...]

Needs what docs/export.md names for ONNX and LiteRT. Each network runs in JAX and in LiteRT, and a
CNN also in ONNX Runtime: as it is, with BatchNorm folded, and in 8 bits. Times are milliseconds for
one image, normalised in float32: the median, and the 10th and 90th percentile. They are taken in
ten rounds through all files, so that other load affects all alike. The process is bound to as many
cores as it has threads.

Then networks of `--untrained` follow at their usual size with random weights, 1,000 classes, and no
accuracy; their 8-bit files are calibrated on noise.
"""

import argparse
import dataclasses
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xkd_jax.export import int8, runtime, student
from xkd_jax.model import Model, create_model
from xkd_jax.prediction import load_student
from xkd_jax.reporting import evaluation
from xkd_jax.reporting.document import Table

UNTRAINED = ("vit_small_patch16_224", "resnet18", "mobilenetv2_100")
ROUNDS = 10


@dataclasses.dataclass(frozen=True)
class Variant:
    """A network in a runtime: a row of the table."""

    network: str
    runtime: str
    file: Path
    run: Callable[[np.ndarray], object]
    images: np.ndarray


def create_variants(
    model: Model, folder: Path, calibration: np.ndarray, crop_pct: float, threads: int
) -> list[Variant]:
    """`model` in every runtime that takes it."""
    weights = folder / "model.safetensors"
    model.save(weights, crop_pct=crop_pct)
    forward = jax.jit(lambda variables, images: model.forward(variables, images)[0])
    variables = jax.device_put(model.variables)

    def run(images: np.ndarray) -> object:
        return jax.block_until_ready(forward(variables, images))

    options, folded = student.Options(crop_pct), student.Options(crop_pct, fold=True)
    files = {"LiteRT": student.export(model, "litert", folder / "litert", options)[0]}
    if model.module.kind == "cnn":
        file = student.export(model, "onnx", folder / "folded", folded)[0]
        files = {
            "ONNX Runtime": student.export(model, "onnx", folder / "onnx", options)[0],
            "ONNX Runtime, folded": file,
            "ONNX Runtime, int8": int8.quantize(file, calibration),
        } | files
    loaded = {name: (file, runtime.load(file, threads)[0].run) for name, file in files.items()}
    rows = {"JAX": (weights, run)} | loaded
    size = model.image_size
    image = np.random.default_rng(0).normal(size=(1, size, size, 3)).astype(np.float32)
    return [Variant(model.name, name, *row, image) for name, row in rows.items()]


def measure(variants: Sequence[Variant], runs: int) -> list[np.ndarray]:
    """Milliseconds [runs] of each."""
    times = np.zeros((len(variants), ROUNDS, -(-runs // ROUNDS)))
    for i in range(-1, ROUNDS):  # the first round warms up
        for row, variant in zip(times, variants, strict=True):
            for j in range(row.shape[1]):
                begun = time.perf_counter()
                variant.run(variant.images)
                row[i, j] = 1e3 * (time.perf_counter() - begun)
    return [row.reshape(-1) for row in times]


def table(variants: Sequence[Variant], runs: int, data: tuple[str, str, str] | None) -> str:
    """Rows of the network, its runtime, top-1 on `data` if given, MB, and milliseconds."""
    rows = [["network", "runtime", *(["top-1 %"] if data else []), "MB", "ms", "10-90%"]]
    for variant, spent in zip(variants, measure(variants, runs), strict=True):
        low, middle, high = np.percentile(spent, (10, 50, 90))
        cells = [variant.network, variant.runtime]
        if data:
            scores = evaluation.measure(str(variant.file), data, 0, noisy=False).scores
            cells.append(f"{100 * scores.top1:.2f}")
        cells += [f"{variant.file.stat().st_size / 1e6:.2f}", f"{middle:.3f}"]
        rows.append([*cells, f"{low:.3f}-{high:.3f}"])
    return Table(rows).markdown()


def create_untrained(name: str) -> Model:
    """A network with random weights and 1,000 classes."""
    model = create_model(name, num_classes=1000)
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> np.ndarray:
        # Not `model.init`: converters remove the branches whose last BatchNorm starts at zero.
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        return (rng.normal(size=leaf.shape) / 20).astype(leaf.dtype)

    return dataclasses.replace(
        model, variables=jax.tree_util.tree_map_with_path(fill, model.shapes)
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student", help="a run's folder or a .safetensors file")
    parser.add_argument("--teacher", default="packaged:quickstart_teacher")
    parser.add_argument("--data", default="fashion_mnist_mini")
    parser.add_argument("--split", default="test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--untrained", nargs="*", default=UNTRAINED)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    print(
        f"{platform.processor() or platform.machine()}, {options.threads} thread(s), "
        f"{options.runs} runs of one image\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        trained, untrained = [], []
        for i, file in enumerate((options.teacher, options.student)):
            model, recorded = load_student(file)
            crop_pct = recorded.get("crop_pct") or 1.0
            images = int8.calibration_images(
                (options.data, "train", ""), model.image_size, crop_pct
            )
            folder = Path(name) / str(i)
            trained += create_variants(model, folder, images, crop_pct, options.threads)
        print(table(trained, options.runs, (options.data, options.split, "")), "\n", flush=True)
        for network in options.untrained:
            model = create_untrained(network)
            shape = (32, model.image_size, model.image_size, 3)
            images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            folder = Path(name) / network
            untrained += create_variants(model, folder, images, 1.0, options.threads)
        if untrained:
            print(table(untrained, options.runs, None))


if __name__ == "__main__":
    main()
