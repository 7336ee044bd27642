"""The average precision of a trained detector on a data set in COCO's format."""

from typing import Any

import jax
import jax.numpy as jnp

from xkd_jax.analysis.detection import NAMES, evaluate_detector
from xkd_jax.data.coco import open_split
from xkd_jax.detection import frame_of
from xkd_jax.distributed import sharding
from xkd_jax.errors import UserError
from xkd_jax.models.detection.detections import Detections
from xkd_jax.prediction import load_student
from xkd_jax.reporting.document import Table
from xkd_jax.tasks.detection import create_detect_step, flat_scores


def measure(student: str, data: str, split: str) -> dict[str, Any]:
    """Measures a detector on every image of a split, with classes matched by name.

    Args:
      student: as for `prediction.load_student`.
      data: "coco:DIR".
      split: such as "val2017".

    Returns:
      `student`, `data`, the number of `images`, and the scores as from `flat_scores`.

    Raises:
      UserError: the student or the data can't be read, it is a classifier, or the data have a
        class that it lacks.
    """
    model, recorded = load_student(student)
    module: Any = model.module
    if not model.is_detector:
        raise UserError(
            f"{student} is a classifier, but {data} is for detectors; give another one."
        )
    frame = frame_of(model, recorded)
    images = open_split(data, split, frame, training=False, masks=module.mask)
    if missing := [name for name in images.class_names if name not in model.class_names]:
        raise UserError(
            f"{student} doesn't know {missing[0]!r}, a class of {data}; evaluate it on images of "
            "its own classes."
        )
    # From the detector's classes to the data's; 0, no object, where these lack one.
    labels = [0, *(_label(name, images.class_names) for name in model.class_names)]
    step, table = create_detect_step(model), jnp.asarray(labels, jnp.int32)

    def relabelled(variables: Any, pixels: jax.Array, sizes: jax.Array) -> Detections:
        found = step(variables, pixels, sizes)
        return found.replace(classes=table[found.classes])

    mesh = sharding.create_mesh()
    found = evaluate_detector(relabelled, model.variables, images, mesh, module.mask)
    about = {"student": student, "data": f"{data} {split}", "images": len(images)}
    return about | flat_scores(found)


def _label(name: str, names: tuple[str, ...]) -> int:
    return names.index(name) + 1 if name in names else 0


def format_scores(result: dict[str, Any]) -> str:
    """The scores as a Markdown table, a line for boxes and one for masks."""
    lines = [[result["data"], "images", *(f"{name} %" for name in NAMES)]]
    for kind, prefix in (("boxes", ""), ("masks", "mask_")):
        if f"{prefix}AP" in result:
            scores = [result.get(prefix + name) for name in NAMES]
            cells = ["" if score is None else f"{100 * score:.2f}" for score in scores]
            lines.append([kind, f"{result['images']:,}", *cells])
    return Table(lines).markdown()
