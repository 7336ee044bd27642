"""Average precision of detectors over a whole split, as pycocotools computes it for COCO."""

import contextlib
import io
import json
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from xkd_jax.data.detection_split import DetectionSplit
from xkd_jax.data.masks import encode, paste_mask, require_pycocotools
from xkd_jax.distributed import processes, sharding

IMAGES_PER_DEVICE = 4
# COCO's first six numbers: over IoUs of 0.5 to 0.95, at 0.5 and at 0.75, and over objects of less
# than 32 x 32 pixels, up to 96 x 96 and above.
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class ImageDetections(NamedTuple):
    """What a detector found in an image: D objects.

    Attributes:
      image_id: of the file of annotations.
      boxes: x1, y1, x2, y2 in pixels of the image file, [D, 4].
      scores: [D].
      classes: [D], from 1.
      masks: of each, compressed run lengths from `masks.encode`; empty without masks.
    """

    image_id: int
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: Sequence[dict[str, Any]] = ()


def evaluate_detector(
    step: Callable[..., Any],
    variables: Any,
    split: DetectionSplit,
    mesh: Mesh,
    masks: bool = False,
    images_per_device: int = IMAGES_PER_DEVICE,
) -> dict[str, dict[str, float]]:
    """Average precision over every image of `split`.

    Several processes share the images, and each returns the result.

    Args:
      step: step(variables, images uint8 [N, S, S, 3], sizes float32 [N, 2]) -> detections, an
        object with `boxes` [N, D, 4] in pixels of the padded image, `scores` [N, D], `classes`
        [N, D] (from 1; 0: none) and `masks` [N, D, m, m] (probabilities within the box) or None.
        Sizes are the height and width of the image within the square. A jitted function, the same
        in every call, is compiled once.
      variables: the network's variables.
      split: the split to evaluate on, opened with masks if these are evaluated.
      mesh: the devices.
      masks: whether to evaluate masks, too.
      images_per_device: the number of images in a device's part of a batch.

    Returns:
      As `average_precision`.

    Raises:
      UserError: pycocotools is missing, or an image is damaged.
    """
    require_pycocotools()
    over_batch = sharding.over_batch(mesh)
    step = jax.jit(step, out_shardings=over_batch)
    variables = jax.device_put(variables, sharding.replicated(mesh))
    batch_size, found = images_per_device * mesh.shape["data"], []
    for start in range(0, len(split), batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), len(split) - 1)
        images = sharding.put_rows(split.images, rows, over_batch)
        local, detections = sharding.local_rows(
            step(variables, images, sharding.put(split.sizes[rows], over_batch))
        )
        for place, row in enumerate((start + local).tolist()):
            if row < len(split):  # not the padding of the last batch
                image = jax.tree.map(operator.itemgetter(place), detections)
                found.append(in_file(split, row, image, masks))
    return average_precision(split, _gather(found), masks)


def in_file(
    split: DetectionSplit, index: int, detections: Any, masks: bool = False
) -> ImageDetections:
    """An image's detections in pixels of its file.

    Args:
      split: the split.
      index: of the image.
      detections: as from `evaluate_detector`'s step, but without the axis N.
      masks: whether to paste masks into the whole image, too.
    """
    kept = np.flatnonzero(detections.classes > 0)
    height, width = split.original_sizes[index].tolist()
    boxes = original_boxes(detections.boxes[kept], split.sizes[index], (height, width))
    run_lengths = []
    if masks:
        for mask, box in zip(detections.masks[kept], boxes, strict=True):
            run_lengths.append(encode(paste_mask(mask, box, height, width) > 0.5))
    scores, classes = detections.scores[kept], detections.classes[kept]
    return ImageDetections(int(split.image_ids[index]), boxes, scores, classes, run_lengths)


def original_boxes(
    boxes: np.ndarray, size: Sequence[float], original_size: Sequence[int]
) -> np.ndarray:
    """Boxes in pixels of the image file, clipped to it: float32 [D, 4].

    Args:
      boxes: x1, y1, x2, y2 in pixels of the padded image, [D, 4].
      size: height and width of the image within the padded one.
      original_size: height and width of the image file.
    """
    height, width = np.asarray(original_size, np.float32)
    scale = np.tile([width / size[1], height / size[0]], 2).astype(np.float32)
    return np.clip(np.asarray(boxes, np.float32) * scale, 0, [width, height] * 2)


def average_precision(
    split: DetectionSplit, detections: Iterable[ImageDetections], masks: bool = False
) -> dict[str, dict[str, float]]:
    """COCO's average precision of boxes, and of masks.

    Regions of crowds are ignored, as pycocotools does it: detections in them are not false.

    Args:
      split: the split; an image without detections counts, too.
      detections: of its images.
      masks: whether to evaluate masks, too; the split is opened with them.

    Returns:
      By "bbox" and "segm", the numbers `NAMES`, in [0, 1]; those over objects of a size that the
      split doesn't have are left out.
    """
    found = list(detections)
    kinds = ("bbox", "segm") if masks else ("bbox",)
    return {kind: _evaluate(split, found, kind) for kind in kinds}


def _evaluate(
    split: DetectionSplit, found: Sequence[ImageDetections], kind: str
) -> dict[str, float]:
    from pycocotools import cocoeval

    functions: Any = cocoeval
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a table
        truth = _indexed(split, _objects(split, kind))
        evaluation = functions.COCOeval(truth, _indexed(split, _results(split, found, kind)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = zip(NAMES, evaluation.stats, strict=False)  # recalls follow
    return {name: float(number) for name, number in numbers if number >= 0}  # -1: no such objects


def _indexed(split: DetectionSplit, annotations: list[dict[str, Any]]) -> Any:
    """pycocotools' index of annotations, which are numbered here: from 1, as 0 stands for none."""
    from pycocotools.coco import COCO

    index: Any = COCO()
    sizes = zip(split.image_ids.tolist(), split.original_sizes.tolist(), strict=True)
    index.dataset = {
        "images": [{"id": key, "height": size[0], "width": size[1]} for key, size in sizes],
        "categories": [{"id": label} for label in range(1, split.num_classes + 1)],
        "annotations": [{**found, "id": i} for i, found in enumerate(annotations, 1)],
    }
    index.createIndex()
    return index


def _objects(split: DetectionSplit, kind: str) -> list[dict[str, Any]]:
    """The annotations of the split as the file has them, boxes not clipped."""
    about, found = split.annotations, []
    for index, image_id in enumerate(split.image_ids.tolist()):
        for row in split.annotations_of(index).tolist():
            entry = {
                "image_id": image_id,
                "category_id": int(about.classes[row]),
                "bbox": about.boxes[row].tolist(),
                "area": float(about.areas[row]),
                "iscrowd": int(about.crowd[row]),
            }
            if kind == "segm":
                entry["segmentation"] = split.run_lengths(index, row)
            found.append(entry)
    return found


def _results(
    split: DetectionSplit, found: Sequence[ImageDetections], kind: str
) -> list[dict[str, Any]]:
    """Detections as annotations. The area, by which they count as small or large, is the mask's."""
    from pycocotools import mask

    functions: Any = mask
    results = []
    for image in found:
        boxes = np.array(image.boxes, np.float64).reshape(-1, 4)
        boxes[:, 2:] -= boxes[:, :2]
        areas = functions.area(list(image.masks)) if kind == "segm" else np.prod(boxes[:, 2:], 1)
        for i, (box, area) in enumerate(zip(boxes.tolist(), areas.tolist(), strict=True)):
            entry = {
                "image_id": image.image_id,
                "category_id": int(image.classes[i]),
                "bbox": box,
                "area": area,
                "iscrowd": 0,
                "score": float(image.scores[i]),
            }
            results.append(entry | ({"segmentation": image.masks[i]} if kind == "segm" else {}))
    return results


def _gather(found: Sequence[ImageDetections]) -> list[ImageDetections]:
    """The detections of all processes, in each of them."""
    plain = [
        image._replace(
            **{name: getattr(image, name).tolist() for name in ("boxes", "scores", "classes")}
        )
        for image in found
    ]
    parts = processes.gather(json.dumps(plain).encode())
    return [ImageDetections(*image) for part in parts for image in json.loads(part)]
