"""Batches for detectors: boxes and masks stay on their objects, in an order that can be resumed."""

import itertools

import jax
import numpy as np
import pytest

from tests.data.coco_files import (
    COLOURS,
    SIZES,
    image,
    in_image,
    overlap,
    rectangle,
    write,
    write_shapes,
)
from xkd_jax.data.coco import open_split
from xkd_jax.data.detection_loader import DetectionLoader, detection_batch_shapes
from xkd_jax.data.frame import Frame
from xkd_jax.data.loader import Order
from xkd_jax.data.masks import decode
from xkd_jax.data.order import batch_indices
from xkd_jax.distributed import sharding

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIDE, MASK = 128, 28
ORDER = Order(5, 2, seed=5)


@pytest.fixture(scope="module")
def mesh():
    return sharding.create_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    pytest.importorskip("pycocotools", reason="needs the extra detection")
    root = write_shapes(tmp_path_factory.mktemp("shapes"))
    return open_split(f"coco:{root}", "train2017", Frame(96, SIDE), training=True, masks=True)


@pytest.fixture
def create(split, mesh):
    def loader(order=ORDER, **options):
        options = {"max_objects": 4, "mask_size": MASK} | options
        return DetectionLoader(split, mesh, order, **options)

    return loader


def take(loader, start, count):
    return jax.device_get(list(itertools.islice(loader.batches(start), count)))


def equal(first, second):
    assert first.keys() == second.keys()
    return all(np.array_equal(first[name], second[name]) for name in first)


def test_what_a_batch_holds(create, split, mesh):
    loader = create()
    assert loader.arrays == {}
    (batch,) = itertools.islice(loader.batches(0), 1)
    shapes = detection_batch_shapes(split, mesh, 2, 4, MASK)
    assert {k: (v.shape, v.dtype) for k, v in shapes.items()} == {
        k: (v.shape, v.dtype) for k, v in batch.items()
    }
    assert all(batch[name].sharding == shape.sharding for name, shape in shapes.items())
    assert "masks" not in detection_batch_shapes(split, mesh, 2)
    assert "masks" not in take(create(mask_size=0), 0, 1)[0]
    found = jax.device_get(batch)
    assert found["classes"].tolist() == [[1, 2, 0, 0]] * 2
    for index, size in zip(found["index"], found["size"], strict=True):
        assert tuple(size) == Frame(96, SIDE).fit(*SIZES[split.image_ids[index]])
    assert not found["boxes"][:, 2:].any()
    assert not found["masks"][:, 2:].any()
    # The image ends where `size` says, and the mean colour follows.
    for pixels, (height, width) in zip(found["image"], found["size"].astype(int), strict=True):
        for rest in (pixels[height:], pixels[:, width:]):
            assert (rest == [124, 116, 104]).all()


def has_colour(pixels, category):
    """Where an image shows a category's colour, bool [S, S]."""
    return np.abs(pixels.astype(int) - COLOURS[category]).max(axis=-1) < 128


def test_boxes_and_masks_lie_on_their_objects(create, split):
    """Whatever the image's size and whether or not it is mirrored."""
    mirrored = {}
    for batch in take(create(), 0, 16):
        for n, index in enumerate(batch["index"].tolist()):
            width = batch["size"][n, 1]
            for place, category in enumerate((3, 7)):
                box, shown = batch["boxes"][n, place], has_colour(batch["image"][n], category)
                rows, columns = (np.flatnonzero(shown.any(axis=axis)) for axis in (1, 0))
                edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                np.testing.assert_allclose(box, edges, atol=3 if category == 7 else 1.1)
                # A triangle and its mirror image have a third in common.
                assert overlap(in_image(batch["masks"][n, place], box, SIDE, SIDE), shown) > 0.85
            original = split.objects(index).boxes[0] * (width / split.original_sizes[index, 1])
            is_mirrored = abs(batch["boxes"][n, 0, 0] - original[0]) > 2
            mirrored.setdefault(index, set()).add(is_mirrored)
    assert len(mirrored) == 5
    assert set.union(*mirrored.values()) == {False, True}


def test_without_flips_the_masks_are_those_of_the_file(create, split):
    for batch in take(create(flip=False, mask_size=112), 0, 4):
        for n, index in enumerate(batch["index"].tolist()):
            for place, row in enumerate(split.objects(index).rows):
                mask = decode(split.run_lengths(index, row)).astype(bool)
                box = split.objects(index).boxes[place]
                again = in_image(batch["masks"][n, place], box, *mask.shape)
                assert overlap(again, mask) > 0.97


def test_the_order_is_that_of_other_data_and_can_be_resumed(create):
    whole = take(create(), 0, 6)
    for step, batch in enumerate(whole):
        np.testing.assert_array_equal(batch["index"], batch_indices(5, 2, 5, step))
    rest = take(create(), 3, 3)
    assert all(map(equal, whole[3:], rest))
    other = take(create(Order(5, 2, seed=6)), 0, 6)
    assert not all(map(equal, whole, other))


def test_two_processes_read_halves_of_what_one_reads(create, monkeypatch):
    whole, halves = take(create(), 2, 3), []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        halves.append(take(create(), 2, 3))
    for batch, first, second in zip(whole, *halves, strict=True):
        assert len(first["index"]) == len(second["index"]) == 1
        joined = {name: np.concatenate([first[name], second[name]]) for name in first}
        assert equal(joined, batch)


@pytest.mark.slow
def test_worker_processes_change_nothing(create):
    assert all(map(equal, take(create(), 1, 3), take(create(workers=2), 1, 3)))


def test_the_largest_of_too_many_objects_are_kept(tmp_path, mesh, capsys):
    boxes = [(2, 2, 3, 3), (20, 20, 10, 10), (5, 30, 4, 4), (30, 2, 12, 9)]
    objects = [rectangle(i, 1, box) for i, box in enumerate(boxes)]
    write(tmp_path, [image(1, (48, 48)), image(2, (48, 48))], [*objects, rectangle(9, 2, boxes[0])])
    split = open_split(f"coco:{tmp_path}", "train2017", Frame(48, 48), training=True)
    loader = DetectionLoader(split, mesh, Order(2, 2, seed=0), max_objects=2, flip=False)
    said = "images with more than data.max_objects=2 objects: 1, with up to 4; only the largest"
    assert said in capsys.readouterr().err
    (batch,) = take(loader, 0, 1)
    found = batch["boxes"][batch["classes"].sum(axis=1).argmax()] * 48 / batch["size"][0, 0]
    assert found.tolist() == [[20, 20, 30, 30], [30, 2, 42, 11]]
