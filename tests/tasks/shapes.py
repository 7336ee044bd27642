"""A small data set in COCO's format: plain squares and discs on noise."""

import json

import numpy as np
from PIL import Image

COLOURS = {"square": (220, 40, 40), "disc": (40, 60, 220)}


def write_coco(folder, count, side=(96, 128), splits=("train2017", "val2017"), seed=0):
    """Writes `count` images of `side` (height, width) for each of `splits`; returns "coco:DIR"."""
    (folder / "annotations").mkdir(parents=True)
    for number, split in enumerate(splits):
        rng = np.random.default_rng((seed, number))
        content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 3 * i, "name": name} for i, name in enumerate(COLOURS, 1)],
        }
        (folder / split).mkdir()
        for i in range(1, count + 1):
            image, objects = draw(rng, *side)
            Image.fromarray(image).save(folder / split / f"{i:03d}.png")
            height, width = side
            entry = {"id": i, "file_name": f"{i:03d}.png", "height": height, "width": width}
            content["images"].append(entry)
            for category, outline in objects:
                low, high = outline.min(0), outline.max(0)
                content["annotations"].append({
                    "id": len(content["annotations"]) + 1,
                    "image_id": i,
                    "category_id": category,
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "area": float(np.prod(high - low)),
                    "segmentation": [outline.ravel().tolist()],
                    "iscrowd": 0,
                })  # fmt: skip
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return f"coco:{folder}"


def draw(rng, height, width):
    """An image with a square at the left and a disc at the right, and their outlines."""
    image = rng.integers(90, 160, (height, width, 3), np.uint8)
    rows, columns = np.mgrid[:height, :width] + 0.5
    objects = []
    for place, (name, colour) in enumerate(COLOURS.items()):
        side = int(rng.integers(28, 44))
        x = int(rng.integers(0, width // 2 - side)) + place * width // 2
        y = int(rng.integers(0, height - side))
        middle = np.array([x + side / 2, y + side / 2])
        if name == "square":
            outline = np.array([(x, y), (x + side, y), (x + side, y + side), (x, y + side)])
            inside = (abs(columns - middle[0]) < side / 2) & (abs(rows - middle[1]) < side / 2)
        else:
            angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            outline = middle + side / 2 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            inside = np.hypot(columns - middle[0], rows - middle[1]) < side / 2
        image[inside] = colour
        objects.append((3 * (place + 1), outline))
    return image, objects
