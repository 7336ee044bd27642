"""Data sets of objects in COCO's format.

DIR/SPLIT/ holds the images of a split, and DIR/annotations/instances_SPLIT.json their objects.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import tqdm

from xkd_jax.data.annotations import Annotations, read_annotations
from xkd_jax.data.detection_split import DetectionSplit
from xkd_jax.data.examples import in_threads, report_faults
from xkd_jax.data.frame import Frame
from xkd_jax.data.masks import NONE, require_pycocotools
from xkd_jax.data.source import parse_split
from xkd_jax.errors import UserError, unknown

_PREFIX, _SUFFIX = "instances_", ".json"
# An image whose boxes are all thinner is not trained on, as in torchvision's references.
_THIN = 1.0  # pixels
_FLAT = 0.01  # pixels: a thinner box has no area
_ROUNDING = 0.5  # pixels by which a box may leave its image without being counted
_SHOWN = 5  # annotations named in a message


def open_split(
    name: str,
    split: str,
    frame: Frame,
    *,
    training: bool,
    masks: bool = False,
    on_error: str = "stop",
) -> DetectionSplit:
    """Opens a split of a data set in COCO's format.

    Args:
      name: "coco:DIR".
      split: the name of a folder in DIR, such as "train2017", or a slice of it in TFDS's syntax.
      frame: of the networks' input.
      training: whether to leave out images without objects, as torchvision's references do.
      masks: whether all objects need a mask.
      on_error: what to do about damaged images and annotations: "stop", or "skip" to leave them
        out.

    Raises:
      UserError: the data set or the split is missing, damaged or has no objects.
    """
    if masks:
        require_pycocotools()
    kind, _, path = name.partition(":")
    if kind != "coco" or not path:
        raise UserError(f"a detector needs a data set in COCO's format, 'coco:DIR', not {name!r}.")
    root = Path(path).expanduser()
    wanted = _find_split(root, split.partition("[")[0].strip())
    about = read_annotations(root / "annotations" / f"{_PREFIX}{wanted}{_SUFFIX}")
    _, start, stop = parse_split(split, {wanted: len(about.files)})
    usable = _usable(about, masks, on_error)
    rows = np.arange(start, stop)
    if training:
        rows = _with_objects(about, rows, usable, split)
    found = DetectionSplit(root / wanted, about, rows, usable, frame)
    faults = {
        i: str(fault)
        for i, fault in enumerate(in_threads(found.check, len(found), "checking files"))
        if fault
    }
    report_faults(faults, len(found), on_error)
    found = dataclasses.replace(found, rows=np.delete(rows, list(faults)))
    if not np.any(found.count_objects()):
        raise UserError(f"no image of {split!r} has an object in {about.path}; take another split.")
    return found


def check_categories(train: DetectionSplit, other: DetectionSplit) -> None:
    """Checks that two splits have the same categories.

    Raises:
      UserError: their ids or names differ.
    """
    pairs = [
        set(zip(split.category_ids, split.class_names, strict=True)) for split in (train, other)
    ]
    differing = sorted(pairs[0] ^ pairs[1])
    if differing:
        number, name = differing[0]
        raise UserError(
            f"the categories of {train.annotations.path} and {other.annotations.path} differ, as "
            f"in {name!r} with the id {number}; every split needs the same ones."
        )


def _find_split(root: Path, wanted: str) -> str:
    """The name of a split, checked.

    Raises:
      UserError: there is no such data set, split or folder of images.
    """
    layout = "annotations/instances_SPLIT.json and its images in SPLIT/"
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; it should hold {layout}.")
    files = (root / "annotations").glob(f"{_PREFIX}*{_SUFFIX}")
    known = [file.name.removeprefix(_PREFIX).removesuffix(_SUFFIX) for file in files]
    if not known:
        raise UserError(f"{root} has no annotations/{_PREFIX}*{_SUFFIX}; it should hold {layout}.")
    if wanted not in known:
        raise unknown("split", wanted, known)
    if not (root / wanted).is_dir():
        raise UserError(f"there is no folder {root / wanted}; it should hold the split's images.")
    return wanted


def _usable(about: Annotations, masks: bool, on_error: str) -> np.ndarray:
    """Whether each annotation counts, bool [a]; reports the others.

    Raises:
      UserError: some can't be used and `on_error` is "stop".
    """
    faults, usable = list(about.faults), np.ones(len(about.boxes), bool)
    if masks:
        for i in np.flatnonzero(about.segments.kinds == NONE).tolist():
            file = about.file(about.owners[i])
            bare = f"one of {file} has neither polygons nor run lengths, as masks need"
            faults.append(about.mask_faults.get(i, bare))
            usable[i] = False
    if faults:
        shown = ", ".join(faults[:_SHOWN])
        more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        count = len(about.boxes) + len(about.faults)
        what = f"{len(faults)} of {count} annotations in {about.path} that can't be used"
        if on_error == "stop":
            raise UserError(
                f"found {what}: {shown}{more}; repair the file, or leave them out with "
                f"data.on_error=skip."
            )
        _say(f"left out {what}: {shown}{more}.")
    return usable & _with_area(about)


def _with_area(about: Annotations) -> np.ndarray:
    """Whether each box covers a part of its image, bool [a]; reports those clipped and the others.

    Boxes beyond the image are clipped to it.
    """
    sides = about.corners[:, 2:] - about.corners[:, :2]
    covers = np.all(sides > _FLAT, axis=1)
    ends = np.concatenate([about.boxes[:, :2], about.boxes[:, :2] + about.boxes[:, 2:]], axis=1)
    clipped = covers & np.any(np.abs(ends - about.corners) > _ROUNDING, axis=1)
    if np.any(clipped) or not np.all(covers):
        _say(
            f"{about.path}: of {len(covers)} boxes, {np.sum(clipped)} clipped to the image and "
            f"{np.sum(~covers)} without an area left out."
        )
    return covers


def _with_objects(
    about: Annotations, rows: np.ndarray, usable: np.ndarray, split: str
) -> np.ndarray:
    """The images in `rows` that have an object; reports the number of the others."""
    sides = about.corners[:, 2:] - about.corners[:, :2]
    objects = usable & ~about.crowd & np.all(sides > _THIN, axis=1)
    counts = np.bincount(about.owners[objects], minlength=len(about.files))
    kept = rows[counts[rows] > 0]
    if 0 < len(kept) < len(rows):
        _say(f"left out {len(rows) - len(kept)} of {len(rows)} images of {split}: no objects.")
    return kept


def _say(text: str) -> None:
    tqdm.tqdm.write(f"xkd_jax: {text}", file=sys.stderr)
