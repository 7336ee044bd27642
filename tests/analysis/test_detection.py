"""Average precision: hand-computed cases, and pycocotools on the file itself."""

import contextlib
import io
import json
import os
import socket
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.analysis.evaluate_shapes import find_whole_image, whole_images
from tests.data.coco_files import image, rectangle, triangle, write, write_shapes
from tests.runs import finish, spawn
from xkd_jax.analysis.detection import (
    NAMES,
    ImageDetections,
    average_precision,
    evaluate_detector,
    original_boxes,
)
from xkd_jax.data.coco import open_split
from xkd_jax.data.frame import Frame
from xkd_jax.data.masks import encode
from xkd_jax.distributed import sharding

pytest.importorskip("pycocotools", reason="needs the extra detection")


def opened(root, masks=False, split="train2017"):
    return open_split(f"coco:{root}", split, Frame(64, 96), training=False, masks=masks)


def found(image_id, *boxes, scores=None, classes=None, masks=()):
    """Detections of boxes x, y, width, height."""
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.linspace(0.9, 0.5, len(boxes)) if scores is None else np.array(scores)
    classes = np.ones(len(boxes), int) if classes is None else np.array(classes)
    return ImageDetections(image_id, boxes, scores, classes, masks)


# Two images with three objects of one category; those of the others have no image.
BOXES = {1: [(10, 10, 40, 40), (60, 10, 30, 40)], 2: [(20, 30, 50, 50)]}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    objects = [
        rectangle(10 * key + i, key, box) for key, of in BOXES.items() for i, box in enumerate(of)
    ]
    root = tmp_path_factory.mktemp("two")
    return opened(write(root, [image(1, (100, 100)), image(2, (100, 120))], objects), masks=True)


def test_a_case_by_hand(two):
    """Ranked: right, wrong, right; the third object is never found."""
    score = average_precision(
        two,
        [
            found(1, BOXES[1][0], (0, 60, 30, 30), scores=[0.9, 0.8]),
            found(2, BOXES[2][0], scores=[0.7]),
        ],
    )["bbox"]
    # Precision 1 up to a recall of 1/3, 34 of COCO's 101 points, then 2/3 up to 2/3: 33 points.
    expected = (34 * 1 + 33 * 2 / 3) / 101
    # All objects are medium; the wrong box isn't, and only counts among all sizes.
    medium = 67 / 101
    assert score == pytest.approx(
        {"AP": expected, "AP50": expected, "AP75": expected, "APm": medium}
    )


def test_overlap_decides_at_each_threshold(two):
    """Boxes of the right place but 0.62 of the width count at thresholds of 0.5, 0.55 and 0.6."""
    narrow = {key: [(x, y, 0.62 * w, h) for x, y, w, h in of] for key, of in BOXES.items()}
    score = average_precision(two, [found(key, *of) for key, of in narrow.items()])["bbox"]
    assert score == pytest.approx({"AP": 0.3, "AP50": 1, "AP75": 0, "APm": 0.3})


def perfect(split):
    """The objects of a split, as detections."""
    some = []
    for index, image_id in enumerate(split.image_ids.tolist()):
        boxes, classes, rows = split.objects(index)
        masks = [split.run_lengths(index, row) for row in rows]
        masks = [mask | {"counts": mask["counts"].decode()} for mask in masks]
        some.append(ImageDetections(image_id, boxes, np.full(len(rows), 0.9), classes, masks))
    return some


def test_perfect_detections(two, tmp_path):
    for split in (two, opened(write_shapes(tmp_path), masks=True)):
        scores = average_precision(split, perfect(split), masks=True)
        assert scores.keys() == {"bbox", "segm"}
        for score in scores.values():
            assert {"AP", "AP50", "AP75"} <= score.keys() <= set(NAMES)
            assert list(score.values()) == pytest.approx([1] * len(score))


def test_no_detections(two):
    expected = {"AP": 0, "AP50": 0, "AP75": 0, "APm": 0}
    empty = [found(1), found(2)]
    assert average_precision(two, [], masks=True) == {"bbox": expected, "segm": expected}
    assert average_precision(two, empty, masks=True) == {"bbox": expected, "segm": expected}


def test_regions_of_crowds_are_ignored(tmp_path):
    """Detections in them are not false, and that none is found isn't a miss."""
    objects = [rectangle(1, 1, (10, 10, 40, 40))]
    crowd = {"size": [100, 200], "counts": [100 * 100, 100 * 100]}  # the right half
    region = rectangle(2, 1, (100, 0, 100, 100), iscrowd=1, segmentation=crowd)
    inside = [(10, 10, 40, 40), (110, 10, 20, 20), (150, 40, 30, 30)]
    masks = []
    for x, y, w, h in inside:
        mask = np.zeros((100, 200), bool)
        mask[y : y + h, x : x + w] = True
        masks.append(encode(mask))
    detections = [found(1, *inside, scores=[0.5, 0.9, 0.8], masks=masks)]
    scores = {}
    for name, annotations in {"with": [*objects, region], "without": objects}.items():
        split = opened(write(tmp_path / name, [image(1, (100, 200))], annotations), masks=True)
        scores[name] = average_precision(split, detections, masks=True)
    for kind in ("bbox", "segm"):
        assert scores["with"][kind]["AP"] == pytest.approx(1)
        assert scores["without"][kind]["AP"] == pytest.approx(1 / 3)  # last of three


def pycocotools_scores(path, results, kind):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation: Any = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: x for name, x in zip(NAMES, evaluation.stats, strict=False) if x != -1}


def test_the_numbers_are_those_of_pycocotools_on_the_file(tmp_path, capsys):
    """With random detections of objects of all sizes in images of several."""
    rng = np.random.default_rng(0)
    images, objects = [image(i, (200 + 10 * i, 240)) for i in range(1, 7)], []
    for entry in images:
        for _ in range(6):
            x, y = rng.integers(0, 100, 2)
            w, h = rng.integers(6, 100, 2)
            shape = (rectangle, triangle)[int(rng.integers(2))]
            objects.append(shape(len(objects) + 1, entry["id"], (int(x), int(y), int(w), int(h))))
        objects[-1]["iscrowd"] = 1
    root = write(tmp_path, images, objects)
    split, detections, results = opened(root, masks=True), [], []
    for entry in images:
        mine = [found for found in objects if found["image_id"] == entry["id"]]
        boxes = np.clip([np.add(found["bbox"], rng.normal(0, 4, 4)) for found in mine], 1, 130)
        masks = []
        for x, y, w, h in boxes.astype(int):
            mask = np.zeros((entry["height"], 240), bool)
            mask[y : y + h, x : x + w] = True
            masks.append(encode(mask))
        labels = [int(found["category_id"] == 7) + 1 for found in mine]
        scores = rng.random(len(boxes))
        detections.append(found(entry["id"], *boxes, scores=scores, classes=labels, masks=masks))
        results += [
            {"image_id": entry["id"], "category_id": (3, 7)[label - 1], "score": score,
             "bbox": box, "segmentation": mask}
            for box, score, label, mask in zip(
                (detections[-1].boxes - [[0, 0, *b[:2]] for b in detections[-1].boxes]).tolist(),
                scores, labels, masks, strict=True)
        ]  # fmt: skip
    scores = average_precision(split, detections, masks=True)
    assert capsys.readouterr().out == ""
    path = root / "annotations/instances_train2017.json"
    assert 0.05 < scores["segm"]["AP"] < scores["bbox"]["AP"] < 0.9
    assert scores["bbox"] == pytest.approx(pycocotools_scores(path, results, "bbox"))
    plain = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
    assert scores["segm"] == pytest.approx(pycocotools_scores(path, plain, "segm"))
    assert json.loads(json.dumps(scores)) == scores


def test_boxes_return_to_the_pixels_of_the_file():
    boxes = np.array([[10, 20, 50, 64], [-5, 0, 200, 90.0]])
    found = original_boxes(boxes, (64, 96), (128, 288))
    np.testing.assert_allclose(found, [[30, 40, 150, 128], [0, 0, 288, 128]], rtol=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The scores with one device."""
    split = whole_images(tmp_path_factory.mktemp("alone"))
    mesh = sharding.create_mesh(jax.devices()[:1])

    def evaluate(label, **options):
        return evaluate_detector(find_whole_image, jnp.array(label), split, mesh, **options)

    return evaluate


def test_every_image_is_evaluated_once(alone):
    """Five images in batches of four, one of them with an object of another class."""
    scores = alone(1, masks=True)
    # The smallest first: right, right, wrong, right, right; and class 3 is never found. Precision 1
    # up to a recall of 1/2, 51 of COCO's 101 points, then 4/5.
    expected = (51 * 1 + 50 * 4 / 5) / 101 / 2
    assert scores["bbox"]["AP"] == scores["segm"]["AP50"] == pytest.approx(expected)
    # A pasted mask can lack its first row and column, as torchvision's.
    assert 0.9 * expected < scores["segm"]["AP"] < expected
    assert alone(3)["bbox"]["AP"] == pytest.approx(1 / 3 / 2)
    assert alone(2)["bbox"]["AP"] == 0


@pytest.mark.slow
def test_two_processes_share_the_images(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "-m", "tests.analysis.evaluate_shapes", tmp_path, address, 2]
    running = [spawn([*program, number], os.environ | flags) for number in range(2)]
    for code, out, err in map(finish, running):
        assert code == 0, err[-2000:]
        assert json.loads(out.splitlines()[-1]) == alone(1, masks=True)
