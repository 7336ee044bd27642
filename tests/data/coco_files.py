"""Tiny data sets in COCO's format, with objects of a colour of their own."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

# One colour per category, and the ids of COCO have gaps, too.
COLOURS = {3: (255, 0, 0), 7: (0, 255, 0), 8: (0, 0, 255)}
CATEGORIES = [{"id": 7, "name": "triangle"}, {"id": 3, "name": "square"}, {"id": 8, "name": "none"}]


def image(number: int, size: tuple[int, int]) -> dict:
    """The entry of an image of height and width `size`."""
    return {"id": number, "file_name": f"{number:03d}.png", "height": size[0], "width": size[1]}


def rectangle(number: int, image_id: int, box: tuple[float, ...], **more) -> dict:
    """The annotation of a rectangle x, y, width, height, with a polygon around it."""
    x, y, w, h = box
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 3,
        "bbox": list(box),
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [corners],
    } | more


def triangle(number: int, image_id: int, box: tuple[float, ...]) -> dict:
    """The annotation of a triangle, of which two sides are those of the box."""
    x, y, w, h = box
    corners = [x, y, x + w, y, x, y + h]
    more = {"category_id": 7, "area": w * h / 2, "segmentation": [corners]}
    return rectangle(number, image_id, box, **more)


def write(root: Path, images: list, annotations: list, split: str = "train2017", **more) -> Path:
    """Writes the annotations as they are, and images that show those that can be drawn."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for entry in images:
        pixels = np.zeros((entry["height"], entry["width"], 3), np.uint8)
        for found in annotations:
            if found["image_id"] == entry["id"]:
                draw(pixels, found)
        Image.fromarray(pixels).save(root / split / entry["file_name"])
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES} | more
    rewrite(root, content, split)
    return root


def draw(pixels: np.ndarray, annotation: dict) -> None:
    """Colours the rectangle or the triangle of an annotation."""
    x, y, w, h = (int(side) for side in annotation["bbox"])
    down, across = np.mgrid[:h, :w]
    inside = np.ones((h, w), bool)
    if annotation["category_id"] == 7:
        inside = (across + 0.5) / w + (down + 0.5) / h < 1
    pixels[y : y + h, x : x + w][inside] = COLOURS[annotation["category_id"]]


def rewrite(root: Path, content: dict, split: str = "train2017") -> None:
    """Exchanges the annotation file."""
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


SIZES = {4: (40, 60), 2: (60, 40), 9: (48, 48), 1: (30, 90), 6: (60, 60)}  # by image id


def write_shapes(root: Path, split: str = "train2017") -> Path:
    """Five images with a square and a triangle each, the last one with a region of a crowd."""
    annotations = []
    for number, (image_id, (height, width)) in enumerate(SIZES.items()):
        annotations += [
            rectangle(10 + number, image_id, (3, 4, width // 3, height // 3)),
            triangle(20 + number, image_id, (width // 2, height // 2, width // 3, height // 3)),
        ]
    crowd = {"size": list(SIZES[6]), "counts": [0, 60, 3540]}  # the first column
    annotations.append(
        rectangle(30, 6, (0, 0, 1, 60), category_id=8, iscrowd=1, segmentation=crowd)
    )
    return write(root, [image(*entry) for entry in SIZES.items()], annotations, split)


def in_image(cells: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mask of a box, uint8 [m, m], in the whole image, by nearest neighbours: bool."""
    size = len(cells)
    across, down = (
        np.floor((np.arange(side) + 0.5 - box[i]) * size / (box[i + 2] - box[i])).astype(int)
        for i, side in enumerate((width, height))
    )
    found = np.zeros((height, width), bool)
    rows, columns = (np.flatnonzero((at >= 0) & (at < size)) for at in (down, across))
    found[np.ix_(rows, columns)] = cells[np.ix_(down[rows], across[columns])] > 127
    return found


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """The intersection of two masks divided by their union."""
    return np.sum(first & second) / np.sum(first | second)
