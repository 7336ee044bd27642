"""Masks: what a file may have, cells of a box, and pasting."""

import json

import numpy as np
import pytest

from tests.data.coco_files import in_image
from xkd_jax.data import masks
from xkd_jax.errors import UserError

HEIGHT, WIDTH = 40, 50


@pytest.fixture(scope="module")
def tools():
    return pytest.importorskip("pycocotools.mask", reason="needs the extra detection")


@pytest.fixture(scope="module")
def blob():
    """An object with a hole and a separate part."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:20, 5:30] = 1
    mask[13:16, 8:11] = 0
    mask[30:33, 47:50] = 1
    return mask


def counts(mask: np.ndarray) -> list[int]:
    """Run lengths of the columns, beginning with zeros."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    return np.diff([0, *changes, len(flat)]).tolist()


def through(segmentation, height=HEIGHT, width=WIDTH) -> np.ndarray:
    """The pixels of the second of three packed segmentations."""
    some = [masks.pack([[0, 0, 9, 0, 9, 9], [1, 1, 1, 2, 2, 2]], height, width), (masks.NONE, [])]
    packed = masks.join([some[0], masks.pack(segmentation, height, width), some[1]])
    assert packed.get(2, height, width) is None
    assert packed.get(0, height, width) == [[0, 0, 9, 0, 9, 9], [1, 1, 1, 2, 2, 2]]
    return masks.decode(masks.to_rle(packed.get(1, height, width), height, width))


def test_run_lengths_of_both_kinds_give_the_same_pixels(tools, blob):
    plain = {"size": [HEIGHT, WIDTH], "counts": counts(blob)}
    np.testing.assert_array_equal(through(plain), blob)
    compressed = masks.encode(blob)
    assert json.loads(json.dumps(compressed)) == compressed
    np.testing.assert_array_equal(through(compressed), blob)


def test_compressed_run_lengths_of_any_length(tools):
    rng = np.random.default_rng(0)
    for density in (0.001, 0.1, 0.5, 0.99, 1.0):
        mask = (rng.random((200, 300)) < density).astype(np.uint8)
        np.testing.assert_array_equal(through(masks.encode(mask), 200, 300), mask)


def test_polygons_are_joined(tools):
    mask = through([[5, 10, 30, 10, 30, 20, 5, 20], [40, 1, 49, 1, 49, 5, 40, 5], [1, 2, 3, 4]])
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[10:20, 5:30] = expected[1:5, 40:49] = 1
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("nothing", [None, [], [[]], {}, [[1, 2, 3, 4]]])
def test_no_mask(nothing):
    assert masks.pack(nothing, HEIGHT, WIDTH) == (masks.NONE, [])


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon has an odd number of coordinates"),
        ([[1, 2, 3, 4, 5, 1e7]], "a polygon has a coordinate of 1000000 pixels or more"),
        ([["1", 2, 3, 4, 5, 6]], "neither a list of polygons nor run lengths"),
        ([1, 2, 3, 4, 5, 6], "neither a list of polygons nor run lengths"),
        ("mask.png", "neither a list of polygons nor run lengths"),
        ({"counts": [2000]}, "neither a list of polygons nor run lengths"),
        ({"size": [50, 40], "counts": [2000]}, r"for \[50, 40\], but the image is \[40, 50\]"),
        ({"size": [40, 50], "counts": [7, 8]}, "add up to 15, not 2000"),
        ({"size": [40, 50], "counts": [2001, -1]}, "neither a list of polygons nor run lengths"),
        ({"size": [40, 50], "counts": "b6:n"}, "add up to"),
        ({"size": [40, 50], "counts": ["a"]}, "neither a list of polygons nor run lengths"),
    ],
)
def test_damaged_masks(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        masks.pack(wrong, HEIGHT, WIDTH)


def test_cells_hold_the_share_that_is_covered():
    mask = np.zeros((20, 20), np.uint8)
    mask[5:15, 5:15] = 1
    whole = masks.box_mask(mask, np.array([5, 5, 15, 15]), 28)
    assert whole.min() == whole.max() == 255
    # Cells of 2.5 x 5 pixels; the object covers the right half of the second column.
    part = masks.box_mask(mask, np.array([1.25, 0, 11.25, 20]), 4)
    np.testing.assert_array_equal(part, np.rint(255 * np.outer([0, 1, 1, 0], [0, 0.5, 1, 1])))


def test_cells_hold_the_mask(blob):
    box = np.array([5, 10, 50, 33])
    cells = masks.box_mask(blob, box, 112)
    np.testing.assert_array_equal(in_image(cells, box, HEIGHT, WIDTH), blob)


def test_a_pasted_mask_covers_the_box():
    """And a pixel around it, as torchvision's does."""
    pasted = masks.paste_mask(np.ones((28, 28)), np.array([4, 6, 14, 18.0]), 20, 30) > 0.5
    assert pasted[6:18, 4:14].all()
    pasted[5:19, 3:15] = False
    assert not pasted.any()
    beyond = masks.paste_mask(np.ones((28, 28)), np.array([-9, 16, 4, 29.0]), 20, 30) > 0.5
    assert beyond[16:, :4].all()
    assert not beyond[:15].any()
    for box in ([-50, -40, -20, -10], [40, 30, 50, 60]):
        assert not masks.paste_mask(np.ones((28, 28)), np.array(box, float), 20, 30).any()


def test_without_pycocotools(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need pycocotools: pip install 'xkd_jax\[detection\]'\.$"):
        masks.require_pycocotools()
