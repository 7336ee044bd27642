"""Evaluates a detector that finds whole images, in one of several processes; prints the scores.

python -m tests.analysis.evaluate_shapes FOLDER COORDINATOR PROCESSES NUMBER (run by
test_detection.py)
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tests.data.coco_files import image, rectangle, write
from xkd_jax.analysis.detection import evaluate_detector
from xkd_jax.data.coco import open_split
from xkd_jax.data.detection_split import DetectionSplit
from xkd_jax.data.frame import Frame
from xkd_jax.distributed import processes, sharding

SIZES = {3: (40, 60), 1: (60, 40), 2: (48, 48), 4: (30, 90), 9: (20, 50)}  # by image id


class Detections(NamedTuple):
    boxes: jax.Array
    scores: jax.Array
    classes: jax.Array
    masks: jax.Array


def whole_images(root: Path) -> DetectionSplit:
    """Five images with an object that fills them, four of the first class and one of the third."""
    objects = [rectangle(key, key, (0, 0, w, h)) for key, (h, w) in SIZES.items()]
    objects[2]["category_id"] = 8
    write(root, [image(*entry) for entry in SIZES.items()], objects)
    return open_split(f"coco:{root}", "train2017", Frame(64, 96), training=False, masks=True)


def find_whole_image(variables, images, sizes):
    """One object, of the class `variables`, that fills the image; the score falls with its area."""
    shape = len(images), 2
    zero = jnp.zeros(len(images))
    boxes = jnp.stack([zero, zero, sizes[:, 1], sizes[:, 0]], axis=1)
    scores = 1 / jnp.prod(sizes, axis=1)
    return Detections(
        jnp.broadcast_to(boxes[:, None], (*shape, 4)),
        jnp.broadcast_to(scores[:, None], shape),
        jnp.broadcast_to(jnp.array([variables, 0]), shape),
        jnp.ones((*shape, 28, 28)),
    )


def main(folder: str, coordinator: str, count: str, number: str) -> None:
    """Every process writes the data set for itself."""
    processes.start(coordinator, int(count), int(number))
    split = whole_images(Path(folder) / number)
    mesh = sharding.create_mesh()
    scores = evaluate_detector(find_whole_image, jnp.array(1), split, mesh, True, 1)
    print(json.dumps(scores), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
