"""Annotation files of COCO, "instances_*.json": read, checked and kept as a few arrays."""

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from xkd_jax.data.folder import path_hash
from xkd_jax.data.masks import LARGEST, NONE, Segments, join, pack
from xkd_jax.errors import UserError

_LISTS = ("images", "annotations", "categories")


@dataclasses.dataclass(frozen=True, eq=False)
class Annotations:
    """An annotation file: n images and, image by image, their a annotations.

    Images are ordered by a hash of their file name, so that a slice is a random part of them.

    Attributes:
      path: of the file.
      files: the images' file names, bytes [n].
      image_ids: int64 [n].
      sizes: the images' height and width in pixels, int64 [n, 2].
      category_ids: the file's id of each category, ascending.
      class_names: the name of each category.
      starts: int64 [n + 1]; the annotations of image i are starts[i] to starts[i + 1].
      boxes: x, y, width, height in pixels as in the file, float64 [a, 4].
      classes: int32 [a], from 1: a position in `category_ids`, plus one.
      crowd: whether it is a region of many objects, bool [a].
      areas: of the masks, in square pixels, float64 [a]; of the box if the file doesn't say.
      segments: the masks.
      faults: what is wrong with annotations that were left out.
      mask_faults: what is wrong with masks, by annotation; those have none in `segments`.
    """

    path: Path
    files: np.ndarray
    image_ids: np.ndarray
    sizes: np.ndarray
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    starts: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    segments: Segments
    faults: tuple[str, ...]
    mask_faults: dict[int, str]

    def file(self, image: int) -> str:
        """The file name of an image."""
        return os.fsdecode(self.files[image].item())

    @functools.cached_property
    def owners(self) -> np.ndarray:
        """The image of each annotation, int64 [a]."""
        return np.repeat(np.arange(len(self.files)), np.diff(self.starts))

    @functools.cached_property
    def corners(self) -> np.ndarray:
        """The boxes as x1, y1, x2, y2, clipped to their images: float64 [a, 4]."""
        limits = np.tile(self.sizes[self.owners][:, ::-1], 2)
        ends = self.boxes[:, :2] + self.boxes[:, 2:]
        return np.clip(np.concatenate([self.boxes[:, :2], ends], axis=1), 0, limits)


@functools.lru_cache(maxsize=4)  # slices and runs of a comparison share a file
def read_annotations(path: Path) -> Annotations:
    """Reads an annotation file.

    Annotations that can't be used are left out and described in `faults`: they lack a part, have a
    repeated id, or belong to an image or a category that the file lacks.

    Raises:
      UserError: it can't be read, is not JSON or not COCO's, or its images or categories are wrong.
    """
    content = _load(path)
    categories = _checked(path, "categories", content["categories"], {"id": int, "name": str})
    categories.sort(key=lambda category: category["id"])
    wanted = {"id": int, "file_name": str, "width": int, "height": int}
    images = _checked(path, "images", content["images"], wanted)
    for image in images:
        if image["width"] <= 0 or image["height"] <= 0:
            raise UserError(
                f"{path} says that {image['file_name']} has {image['width']} x {image['height']} "
                f"pixels; export it again."
            )
    images.sort(key=lambda image: (path_hash(image["file_name"]), image["file_name"]))
    places = {image["id"]: place for place, image in enumerate(images)}
    classes = {category["id"]: label for label, category in enumerate(categories, 1)}
    usable, faults = _usable(content["annotations"], places, classes)
    usable.sort(key=lambda annotation: places[annotation["image_id"]])  # stable
    owners = [places[annotation["image_id"]] for annotation in usable]
    packed, mask_faults = [], {}
    for number, (annotation, owner) in enumerate(zip(usable, owners, strict=True)):
        image, masks = images[owner], (NONE, [])
        try:
            masks = pack(annotation.get("segmentation"), image["height"], image["width"])
        except ValueError as error:
            mask_faults[number] = f"the mask of {_named(annotation)} is damaged ({error})"
        packed.append(masks)
    boxes = np.array([annotation["bbox"] for annotation in usable], float).reshape(-1, 4)
    return Annotations(
        path,
        files=np.array([os.fsencode(image["file_name"]) for image in images]),
        image_ids=np.array([image["id"] for image in images], np.int64),
        sizes=np.array([(image["height"], image["width"]) for image in images], np.int64),
        category_ids=tuple(category["id"] for category in categories),
        class_names=tuple(category["name"] for category in categories),
        starts=np.searchsorted(owners, np.arange(len(images) + 1)),
        boxes=boxes,
        classes=np.array([classes[annotation["category_id"]] for annotation in usable], np.int32),
        crowd=np.array([bool(annotation.get("iscrowd")) for annotation in usable], bool),
        areas=_areas(usable, boxes),
        segments=join(packed),
        faults=tuple(faults),
        mask_faults=mask_faults,
    )


def _load(path: Path) -> dict[str, list]:
    """The lists of a file, none of their entries checked."""
    try:
        # JSON itself has no infinite numbers, but Python's parser accepts them.
        content = json.loads(path.read_bytes(), parse_constant=_refuse)
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}); change its permissions or give another one."
        ) from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{path} is not valid JSON ({reason}); download or export it again."
        ) from error
    for name in _LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(
                f"{path} has no list {name!r}; it should be an annotation file in COCO's format, "
                f"with the lists {', '.join(_LISTS)}."
            )
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _checked(path: Path, name: str, entries: list, wanted: dict[str, type]) -> list[dict]:
    """The entries of a list that must all be right, in a new list.

    Raises:
      UserError: there is none, one lacks a value or has a wrong one, or two have the same id.
    """
    if not entries:
        raise UserError(f"{path} has no {name}; export it again with at least one.")
    for number, entry in enumerate(entries):
        for key, kind in wanted.items():
            value: Any = entry.get(key) if isinstance(entry, dict) else None
            if type(value) is not kind or (kind is int and abs(value) >= 2**63):
                what = "a text" if kind is str else "a whole number"
                raise UserError(f"{path} lacks {key!r}, {what}, in {name}[{number}]; add it.")
    (repeated, count), *_ = collections.Counter(entry["id"] for entry in entries).most_common(1)
    if count > 1:
        raise UserError(
            f"{path} has {count} {name} with the id {repeated}; give each an id of its own."
        )
    return list(entries)


def _usable(
    annotations: list, images: dict[int, int], categories: dict[int, int]
) -> tuple[list[dict], list[str]]:
    """The annotations that can be used, and what is wrong with each of the others."""
    usable, faults, seen = [], [], set()
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            faults.append(f"annotations[{number}] is not an object of JSON")
            continue
        key, fault = annotation.get("id"), None
        name = f"annotations[{number}]" if key is None else f"annotation {key}"
        if not _has(annotation.get("image_id"), images):
            fault = f"{name} is of an unknown image, {annotation.get('image_id')}"
        elif not _has(annotation.get("category_id"), categories):
            fault = f"{name} is of an unknown category, {annotation.get('category_id')}"
        elif not _is_box(annotation.get("bbox")):
            fault = f"{name} has no 'bbox' of four numbers"
        elif key is not None and str(key) in seen:
            fault = f"the id of {name} is repeated"
        if fault:
            faults.append(fault)
        else:
            seen.add(str(key))
            usable.append(annotation)
    return usable, faults


def _has(key: Any, known: dict[int, int]) -> bool:
    return type(key) is int and key in known


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST


def _named(annotation: dict) -> str:
    return f"annotation {annotation.get('id', 'without an id')}"


def _areas(annotations: Sequence[dict], boxes: np.ndarray) -> np.ndarray:
    areas = boxes[:, 2] * boxes[:, 3]
    for number, annotation in enumerate(annotations):
        if _is_number(annotation.get("area")):
            areas[number] = annotation["area"]
    return areas
