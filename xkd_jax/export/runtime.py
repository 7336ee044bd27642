"""Exported students, run by the runtimes that they were exported for."""

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xkd_jax.augment import ops
from xkd_jax.data.frame import Frame
from xkd_jax.errors import UserError

PREPARATION = "preprocessing.json"
# Sources of optional packages. The converter pins older versions of packages that we depend on, for
# a module that it doesn't import here.
EXPORT, LITERT = "'xkd_jax[export]'", "'xkd_jax[litert]'"
CONVERTER = "--no-deps 'litert-converter>=0.5,<0.6'"
_Run = Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """A classifier in another runtime; callable on images like `Model`.

    Attributes:
      run: images as the file takes them, but [N, H, W, 3], to logits [N, K].
      num_classes: K.
      image_size: side of its input, pixels.
      class_names: class names by label; empty if unknown.
      normalize: `mean` and `std` per channel, of images in [0, 1]; None if it takes uint8 images.
      class_order: for each label the file's logit, if the file has another order of classes.
    """

    run: _Run
    num_classes: int
    image_size: int
    class_names: tuple[str, ...]
    normalize: dict[str, list[float]] | None
    class_order: tuple[int, ...] = ()

    def __call__(self, images: Any) -> jax.Array:
        """The logits [N, K] of images [N, H, W, 3], uint8 or float in [0, 1], of any size."""
        logits = jnp.asarray(self.run(self.prepare(images)))
        return logits[:, jnp.asarray(self.class_order)] if self.class_order else logits

    def prepare(self, images: Any) -> np.ndarray:
        """What `run` takes for such images."""
        return np.asarray(self._prepare(images))

    @functools.cached_property
    def _prepare(self) -> Callable[..., jax.Array]:
        @jax.jit
        def prepare(images: jax.Array) -> jax.Array:
            pixels = ops.resize(ops.to_float(images), self.image_size)
            if self.normalize is None:
                return jnp.round(255 * pixels).astype(jnp.uint8)
            mean, std = (tuple(self.normalize[name]) for name in ("mean", "std"))
            return ops.normalize(pixels, mean, std)

        return prepare


@dataclasses.dataclass(frozen=True, eq=False)
class ExportedDetector:
    """A detector in another runtime, for one image at a time.

    Attributes:
      run: an image [1, S, S, 3] as the file takes it, and its size [1, 2], to arrays by name:
        `boxes` [D, 4], `scores` [D], `classes` [D] and, with a mask head, `masks` [D, 28, 28].
      frame: how images are resized.
      class_names: class names by class, from class 1; empty if unknown.
      normalize: as in `Exported`.
    """

    run: _Run
    frame: Frame
    class_names: tuple[str, ...]
    normalize: dict[str, list[float]] | None

    def __call__(self, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """The objects in padded images.

        Args:
          images: uint8 [1, S, S, 3].
          sizes: float32 [1, 2], height and width without padding, pixels.
        """
        if self.normalize is not None:
            mean, std = (np.array(self.normalize[name], np.float32) for name in ("mean", "std"))
            images = (images / np.float32(255) - mean) / std
        return self.run(images, sizes)


def load(path: Path, threads: int = 0) -> tuple[Exported, float]:
    """An exported classifier, and the crop_pct that is recorded with it.

    Args and errors are those of `load_any`.

    Raises:
      UserError: it is a detector.
    """
    model, about = load_any(path, threads)
    if isinstance(model, ExportedDetector):
        raise UserError(f"{path} is a detector; give the file of a classifier.")
    return model, about["crop_pct"]


def load_any(path: Path, threads: int = 0) -> tuple[Exported | ExportedDetector, dict[str, Any]]:
    """An exported student, and what is recorded with it.

    Args:
      path: of an .onnx file, or of a .tflite file next to its preprocessing.json.
      threads: to compute with; 0: the runtime's default.

    Raises:
      UserError: there is no such file, it was not written by `xkd-jax export`, or its runtime isn't
        installed.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; export the student first, with xkd-jax export.")
    run, count, about = RUNTIMES[path.suffix](path, threads)
    try:
        names, normalize = tuple(about["class_names"]), about["normalize"]
        if count:
            return Exported(run, count, about["size"], names, normalize), about
        frame = Frame(about["min_size"], about["max_size"])
        return ExportedDetector(run, frame, names, normalize), about
    except KeyError as error:
        raise UserError(
            f"{path} lacks the {error.args[0]} that xkd-jax export records; export it again."
        ) from None


def _open_onnx(path: Path, threads: int) -> tuple[_Run, int, dict[str, Any]]:
    require("onnxruntime", EXPORT, f"running {path}")
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(path, options)
    except Exception as error:  # its classes share no other base
        raise _unreadable(path, "ONNX", error) from None
    recorded = session.get_modelmeta().custom_metadata_map
    about = {key: json.loads(recorded[key]) for key in _RECORDED if key in recorded}
    outputs = {output.name: output.shape for output in session.get_outputs()}

    def run(images: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(["logits"], {"images": images.transpose(0, 3, 1, 2)})[0])

    def detect(images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
        inputs = {"images": images.transpose(0, 3, 1, 2), "sizes": sizes}
        return dict(zip(outputs, map(np.asarray, session.run(None, inputs)), strict=True))

    if "logits" not in outputs:
        return detect, 0, about
    return run, outputs["logits"][1], about


def _open_litert(path: Path, threads: int) -> tuple[_Run, int, dict[str, Any]]:
    require("ai_edge_litert", LITERT, f"running {path}")
    from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

    beside = path.with_name(PREPARATION)
    if not beside.exists():
        raise UserError(
            f"there is no {beside}, which says how to prepare images; keep it next to {path.name}."
        )
    try:
        interpreter = Interpreter(str(path), num_threads=threads or None)
    except ValueError as error:
        raise _unreadable(path, "LiteRT", error) from None
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    about = json.loads(beside.read_text())
    if "H, W, 3]" not in about["images"] or np.dtype(source["dtype"]) != about["dtype"]:
        raise UserError(f"{beside} is of another export than {path.name}; export to a new folder.")
    step = 1 if about["images"].startswith("[1,") else None  # images at a time

    def run(images: np.ndarray) -> np.ndarray:
        logits = []
        for i in range(0, len(images), step or len(images)):
            some = images[i : i + step] if step else images
            interpreter.resize_tensor_input(source["index"], some.shape)
            interpreter.allocate_tensors()
            interpreter.set_tensor(source["index"], some)
            interpreter.invoke()
            logits.append(interpreter.get_tensor(target["index"]))
        return np.concatenate(logits)

    return run, target["shape"][1], about


def _unreadable(path: Path, kind: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0][:200]
    return UserError(f"{path} can't be read as {kind} ({reason}); export the student again.")


def require(package: str, source: str, purpose: str) -> None:
    """Checks that an optional package is installed.

    Args:
      package: its module.
      source: what to give `pip install`.
      purpose: what needs it, for the message.

    Raises:
      UserError: it isn't.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{purpose} needs the package {package}; pip install {source} brings it.")


_RECORDED = ("size", "crop_pct", "min_size", "max_size", "normalize", "class_names")
RUNTIMES = {".onnx": _open_onnx, ".tflite": _open_litert}
