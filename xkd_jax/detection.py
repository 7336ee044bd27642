"""Detections in image files: boxes, classes and masks, in the files' own pixels."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xkd_jax.analysis.detection import original_boxes
from xkd_jax.data.decode import DamagedImage, decode, decode_resize
from xkd_jax.data.detection_split import COLOUR
from xkd_jax.data.frame import Frame
from xkd_jax.data.masks import encode, paste_mask, require_pycocotools
from xkd_jax.export.runtime import ExportedDetector
from xkd_jax.model import Model
from xkd_jax.tasks.detection import create_detect_step

_BATCH = 4


class Detected(NamedTuple):
    """The objects in an image, the most probable first.

    Attributes:
      path: of the image.
      pixels: uint8 [h, w, 3], upright.
      classes: int [n], from 1.
      names: of the classes, n.
      scores: probabilities [n].
      boxes: left, top, right and bottom, float32 [n, 4], pixels.
      masks: probabilities inside the boxes, [n, 28, 28]; None without a mask head.
    """

    path: Path
    pixels: np.ndarray
    classes: np.ndarray
    names: list[str]
    scores: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None

    def mask(self, index: int) -> np.ndarray:
        """The pixels of an object, bool [h, w]."""
        assert self.masks is not None
        height, width = self.pixels.shape[:2]
        return paste_mask(self.masks[index], self.boxes[index], height, width) > 0.5

    def summary(self, masks: bool) -> dict[str, Any]:
        """The path and the objects as they are printed, masks as COCO's compressed run lengths.

        Args:
          masks: whether to include them, if there are any.

        Raises:
          UserError: it is to include masks, but pycocotools isn't installed.
        """
        masks = masks and self.masks is not None
        if masks:
            require_pycocotools()
        objects = []
        for i, (name, score, box) in enumerate(
            zip(self.names, self.scores.tolist(), self.boxes.tolist(), strict=True)
        ):
            thing = {"class": name, "score": round(score, 4), "box": [round(x, 2) for x in box]}
            objects.append(thing | ({"mask": encode(self.mask(i))} if masks else {}))
        return {"path": str(self.path), "objects": objects}


def frame_of(model: Model | ExportedDetector, recorded: dict[str, Any]) -> Frame:
    """How a detector's images are resized.

    Args:
      model: the detector.
      recorded: the metadata of its file; where they have no sizes, as those of converted weights,
        these are torchvision's, in proportion to the network's input.
    """
    if isinstance(model, ExportedDetector):
        return model.frame
    usual = Frame()
    scale = model.image_size / usual.side
    return Frame(
        recorded.get("min_size", int(scale * usual.min_size)),
        recorded.get("max_size", int(scale * usual.max_size)),
    )


def detect(
    model: Model | ExportedDetector,
    recorded: dict[str, Any],
    files: Sequence[Path],
    threshold: float,
) -> Iterator[Detected | DamagedImage]:
    """Detects objects in image files, decoding each batch while the previous one is computed.

    Args:
      model: a detector.
      recorded: as for `frame_of`.
      files: the images.
      threshold: probability that an object must have.

    Yields:
      For each file in order, its objects, or what is wrong with it.
    """
    count = 1 if isinstance(model, ExportedDetector) else min(_BATCH, len(files))
    frame, names, compute = frame_of(model, recorded), model.class_names, _create_step(model)
    pending: Any = None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), count):
            paths = files[start : start + count]
            images = list(pool.map(_read, paths))
            found = compute(*_prepare(images, count, frame))
            if pending:
                yield from _results(frame, names, threshold, *pending)
            pending = paths, images, found
    yield from _results(frame, names, threshold, *pending)


def _read(path: Path) -> np.ndarray | DamagedImage:
    try:
        return decode(path.read_bytes(), name=str(path))
    except DamagedImage as error:
        return error
    except OSError as error:
        return DamagedImage(f"{path} can't be read ({error.strerror}); check the file.")


def _prepare(
    images: Sequence[np.ndarray | DamagedImage], count: int, frame: Frame
) -> tuple[np.ndarray, np.ndarray]:
    """The input of `count` images [count, S, S, 3] and their sizes; damaged ones are grey."""
    padded = np.full((count, frame.side, frame.side, 3), COLOUR, np.uint8)
    sizes = np.full((count, 2), frame.side, np.float32)
    for i, image in enumerate(images):
        if isinstance(image, np.ndarray):
            stated = image.shape[0], image.shape[1]
            size = frame.fit(*stated)
            padded[i] = frame.pad(decode_resize(image, stated, size), COLOUR)
            sizes[i] = size
    return padded, sizes


def _create_step(
    model: Model | ExportedDetector,
) -> Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]:
    """Maps uint8 images [N, S, S, 3] and sizes [N, 2] to what `Detections` has, by name."""
    if isinstance(model, ExportedDetector):
        return lambda images, sizes: {
            name: array[None] for name, array in model(images, sizes).items()
        }

    step = create_detect_step(model)

    def compute(images: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
        found = vars(step(model.variables, images, sizes))
        return {name: array for name, array in found.items() if array is not None}

    return compute


def _results(
    frame: Frame,
    names: Sequence[str],
    threshold: float,
    paths: Sequence[Path],
    images: Sequence[np.ndarray | DamagedImage],
    found: Mapping[str, Any],
) -> Iterator[Detected | DamagedImage]:
    arrays = {name: np.asarray(array) for name, array in found.items()}
    for i, (path, image) in enumerate(zip(paths, images, strict=True)):
        if isinstance(image, DamagedImage):
            yield image
            continue
        kept = (arrays["classes"][i] > 0) & (arrays["scores"][i] >= threshold)
        of_image = {name: array[i][kept] for name, array in arrays.items()}
        size = image.shape[0], image.shape[1]
        classes = of_image["classes"]
        yield Detected(
            path,
            image,
            classes,
            [names[number - 1] if names else str(number) for number in map(int, classes)],
            of_image["scores"],
            original_boxes(of_image["boxes"], frame.fit(*size), size),
            of_image.get("masks"),
        )
