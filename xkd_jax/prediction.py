"""Predictions for image files: finds, decodes and classifies them, and reports damaged ones."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xkd_jax.convert.conversion import find_weights
from xkd_jax.data.decode import DamagedImage, eval_crop
from xkd_jax.data.listing import list_all_images
from xkd_jax.errors import UserError
from xkd_jax.export import runtime
from xkd_jax.model import Model, load
from xkd_jax.reporting.files import STUDENT
from xkd_jax.weights import load_weights

_BATCH = 64


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The image files among `paths` and in the folders among them, sorted within each folder.

    Raises:
      UserError: a path doesn't exist, or a folder has no images.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += [path / name for name in sorted(list_all_images(path).images[""])]
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"there is no image {path}; give an image's path or a folder's.")
    return files


def predict(
    model: Model | runtime.Exported, files: Sequence[Path], top: int, crop_pct: float
) -> Iterator[dict[str, Any]]:
    """Classifies image files, decoding each batch while the previous one is classified.

    Args:
      model: a classifier.
      files: the images.
      top: the number of classes for each image.
      crop_pct: the share of the shorter side that is cropped.

    Yields:
      For each file in order, its `path`, and `classes`, pairs of a name and a probability, the most
      probable first; or the `error` of an image that can't be read.
    """
    names = model.class_names or tuple(map(str, range(model.num_classes)))
    top = min(top, model.num_classes)

    @jax.jit
    def best(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.top_k(jax.nn.softmax(logits), top)

    pending: Any = None
    for paths, images, faults in _batches(files, model.image_size, crop_pct):
        found = best(model(images))  # computed in the background
        if pending:
            yield from _results(names, *pending)
        pending = paths, faults, found
    yield from _results(names, *pending)


def _batches(
    files: Sequence[Path], size: int, crop_pct: float
) -> Iterator[tuple[Sequence[Path], np.ndarray, dict[int, str]]]:
    """Batches of paths, images and faults by row; all batches of images have the same size."""
    count = min(_BATCH, len(files))
    # Not `examples.in_threads`, which decodes ahead without limit: a folder may not fit in memory.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), count):
            paths = files[start : start + count]
            images, faults = np.zeros((count, size, size, 3), np.uint8), {}
            for i, found in enumerate(pool.map(lambda p: _read(p, size, crop_pct), paths)):
                if isinstance(found, DamagedImage):
                    faults[i] = str(found)
                else:
                    images[i] = found
            yield paths, images, faults


def _read(path: Path, size: int, crop_pct: float) -> np.ndarray | DamagedImage:
    try:
        return eval_crop(path.read_bytes(), size, crop_pct, name=str(path))
    except DamagedImage as error:
        return error
    except OSError as error:
        return DamagedImage(f"{path} can't be read ({error.strerror}); check the file.")


def _results(
    names: Sequence[str], paths: Sequence[Path], faults: dict[int, str], found: Any
) -> Iterator[dict[str, Any]]:
    probabilities, labels = (array.tolist() for array in found)
    for i, path in enumerate(paths):
        if i in faults:
            yield {"path": str(path), "error": faults[i]}
        else:
            pairs = zip(labels[i], probabilities[i], strict=True)
            yield {"path": str(path), "classes": [(names[label], p) for label, p in pairs]}


def load_any(
    name: str,
) -> tuple[Model | runtime.Exported | runtime.ExportedDetector, dict[str, Any]]:
    """As `load_student`, or from an exported .onnx or .tflite file."""
    path = Path(name)
    return runtime.load_any(path) if path.suffix in runtime.RUNTIMES else load_student(name)


def load_classifier(name: str) -> tuple[Model | runtime.Exported, float]:
    """As `load_any`; in place of everything that is recorded, the crop_pct or 0.

    Raises:
      UserError: as for `load_student`, or it is a detector.
    """
    model, recorded = load_any(name)
    if isinstance(model, runtime.ExportedDetector) or is_detector(model):
        raise UserError(f"{name} is a detector; give a classifier, or images with boxes, coco:DIR.")
    return model, recorded.get("crop_pct", 0.0)


def is_detector(model: Any) -> bool:
    """Whether what `load_any` returns finds objects; otherwise it classifies images."""
    return isinstance(model, runtime.ExportedDetector) or (
        isinstance(model, Model) and model.is_detector
    )


def load_student(name: str) -> tuple[Model, dict[str, Any]]:
    """A student with its classifier or its heads, and the metadata of its file.

    Args:
      name: a run's folder, a .safetensors file, packaged:NAME or timm:NAME.

    Raises:
      UserError: it can't be read, or has no classifier.
    """
    if Path(name).suffix in runtime.RUNTIMES:
        raise UserError(f"{name} is exported already; give the run's folder or .safetensors file.")
    path = _locate_student(name)
    model = load(path)
    if not model.num_classes:
        raise UserError(f"{path} has no classifier; train it on labelled images first.")
    return model, load_weights(path)[1]


def _locate_student(name: str) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        return find_weights(name)
    if not (folder / STUDENT).exists():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{STUDENT}"))
        cure = f"give one of its runs: {', '.join(inside[:5])}" if inside else "train it first"
        raise UserError(f"{folder} holds no {STUDENT}; {cure}.")
    return folder / STUDENT
