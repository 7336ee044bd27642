"""COCO's format: splits, what is left out and counted, and every kind of wrong input."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data import coco_files
from tests.data.coco_files import (
    SIZES,
    image,
    in_image,
    overlap,
    rectangle,
    rewrite,
    write,
    write_shapes,
)
from tests.data.test_folder import picture
from xkd_jax import data
from xkd_jax.data.coco import check_categories, open_split
from xkd_jax.data.frame import Frame
from xkd_jax.data.masks import box_mask, decode
from xkd_jax.errors import UserError

FRAME = Frame(48, 64)


def opened(root: Path, split: str = "train2017", training: bool = True, **options):
    return open_split(f"coco:{root}", split, FRAME, training=training, **options)


@pytest.fixture
def shapes(tmp_path) -> Path:
    return write_shapes(tmp_path / "shapes")


def content(root: Path) -> dict:
    return json.loads((root / "annotations/instances_train2017.json").read_text())


def test_a_split(shapes):
    split = opened(shapes)
    assert len(split) == 5
    assert (split.num_classes, split.category_ids) == (3, (3, 7, 8))  # 8 has no objects
    assert split.class_names == ("square", "triangle", "none")
    assert split.images.shape == (5, 64, 64, 3)
    assert sorted(split.image_ids) == sorted(SIZES)
    for index, image_id in enumerate(split.image_ids.tolist()):
        height, width = SIZES[image_id]
        assert split.original_sizes[index].tolist() == [height, width]
        assert tuple(split.sizes[index]) == FRAME.fit(height, width)
        assert Path(split.name(index)) == shapes / "train2017" / f"{image_id:03d}.png"
        boxes, classes, rows = split.objects(index)
        assert classes.tolist() == [1, 2]  # the crowd isn't an object
        assert boxes[0].tolist() == [3, 4, 3 + width // 3, 4 + height // 3]
        assert len(split.annotations_of(index)) == len(rows) + (image_id == 6)
    assert split.count_objects().tolist() == [2] * 5
    images = split.images[np.array([4, 0, 4])]
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images[0], images[2])


def test_slices_are_parts_in_an_order_of_their_own(shapes, tmp_path):
    whole = opened(shapes).image_ids.tolist()
    assert whole not in (sorted(whole), list(SIZES))
    parts = [opened(shapes, f"train2017[{part}]").image_ids.tolist() for part in (":60%", "60%:")]
    assert parts == [whole[:3], whole[3:]]
    moved = shutil.copytree(shapes, tmp_path / "moved")
    assert opened(moved).identity == opened(shapes).identity
    assert len(opened(shapes).identity["digest"]) == 16
    found = content(moved)
    found["annotations"][0]["bbox"][2] += 1
    rewrite(shapes := shutil.copytree(moved, tmp_path / "changed"), found)
    assert opened(shapes).identity != opened(moved).identity


def test_it_can_be_sent_to_workers(shapes):
    split = opened(shapes)
    images = split.images[:2]  # the pool of threads stays behind
    copy = pickle.loads(pickle.dumps(split))
    np.testing.assert_array_equal(copy.images[:2], images)
    np.testing.assert_array_equal(copy.objects(1).boxes, split.objects(1).boxes)


def test_images_without_objects_are_only_evaluated(tmp_path, capsys):
    """Without annotations, with a crowd alone, and with a box that is narrower than a pixel."""
    boxes = [rectangle(1, 1, (2, 2, 9, 9)), rectangle(2, 3, (2, 2, 9, 9), iscrowd=1)]
    boxes.append(rectangle(3, 4, (2, 2, 0.5, 9)))
    write(tmp_path, [image(i, (20, 20)) for i in (1, 2, 3, 4)], boxes)
    assert opened(tmp_path).image_ids.tolist() == [1]
    assert "left out 3 of 4 images of train2017: no objects.\n" in capsys.readouterr().err
    assert len(opened(tmp_path, training=False)) == 4
    assert capsys.readouterr().err == ""


def test_boxes_beyond_the_image(tmp_path, capsys):
    boxes = [(-5, 2, 15, 9), (2, 2, 18.3, 9), (30, 2, 5, 5), (2, 2, 0, 9), (9, 9, -4, 3)]
    annotations = [rectangle(i, 1, box) for i, box in enumerate(boxes)]
    write(tmp_path, [image(1, (20, 20))], [])
    rewrite(tmp_path, {"images": [image(1, (20, 20))], "annotations": annotations,
                       "categories": coco_files.CATEGORIES})  # fmt: skip
    split = opened(tmp_path)
    assert split.objects(0).boxes.tolist() == [[0, 2, 10, 11], [2, 2, 20, 11]]
    expected = "json: of 5 boxes, 1 clipped to the image and 3 without an area left out.\n"
    assert expected in capsys.readouterr().err


def test_area_and_crowd_may_be_missing(tmp_path):
    bare = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}
    write(tmp_path, [image(1, (20, 20))], [bare])
    split = opened(tmp_path)
    assert split.annotations.areas.tolist() == [12]
    assert not split.annotations.crowd.any()


# ---- wrong annotations


def change_annotation(**values):
    def change(found):
        found["annotations"][0] |= values

    return change


def without(key):
    def change(found):
        del found["annotations"][0][key]

    return change


def not_an_object(found):
    found["annotations"][0] = 7


@pytest.mark.parametrize(
    ("change", "message", "masks"),
    [
        (change_annotation(image_id=99), "annotation 10 is of an unknown image, 99", False),
        (without("image_id"), "annotation 10 is of an unknown image, None", False),
        (change_annotation(category_id=1), "annotation 10 is of an unknown category, 1", False),
        (change_annotation(bbox=[1, 2, 3]), "annotation 10 has no 'bbox' of four numbers", False),
        (change_annotation(bbox=[1, 2, 3, 1e300]), "10 has no 'bbox' of four numbers", False),
        (without("bbox"), "annotation 10 has no 'bbox' of four numbers", False),
        (change_annotation(id=20), "the id of annotation 20 is repeated", False),
        (not_an_object, r"annotations\[0\] is not an object", False),
        (without("segmentation"), r"one of 004.png has neither polygons nor run lengths", True),
        (change_annotation(segmentation=[[1]]), r"of annotation 10 is damaged \(a polygon", True),
    ],
)  # fmt: skip
def test_wrong_annotations_stop_or_are_skipped(shapes, capsys, change, message, masks):
    if masks:
        pytest.importorskip("pycocotools", reason="needs the extra detection")
    found = content(shapes)
    change(found)
    rewrite(shapes, found)
    count = r"found 1 of 11 annotations in .*\.json that can't be used"
    cure = r"repair the file, or leave them out with data\.on_error=skip\.$"
    with pytest.raises(UserError, match=rf"{count}: .*{message}.*; {cure}"):
        opened(shapes, masks=masks)
    split = opened(shapes, masks=masks, on_error="skip")
    assert split.count_objects().sum() == 9
    assert "left out 1 of 11 annotations" in capsys.readouterr().err
    if masks:  # which a detector without masks doesn't need
        assert opened(shapes).count_objects().sum() == 10


def test_many_wrong_annotations_are_counted(shapes):
    found = content(shapes)
    for annotation in found["annotations"]:
        annotation["category_id"] = 55
    rewrite(shapes, found)
    with pytest.raises(UserError, match=r"found 11 of 11 .* category, 55, and 6 more; repair"):
        opened(shapes)
    with pytest.raises(
        UserError, match=r"no image of 'train2017' has an object in .*; take another"
    ):
        opened(shapes, on_error="skip", training=False)


# ---- wrong files


def no_annotations(found):
    found["annotations"] = []


def drop(key):
    return lambda found: found.pop(key)


def no_images(found):
    found["images"] = []


def repeated_image(found):
    found["images"].append(found["images"][0])


def repeated_category(found):
    found["categories"].append({"id": 7, "name": "again"})


def nameless(found):
    del found["categories"][1]["name"]


def flat_image(found):
    found["images"][0]["height"] = 0


def text_width(found):
    found["images"][2]["width"] = "48"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_annotations, r"no image of 'train2017' has an object in .*\.json; take another"),
        (drop("categories"), r"train2017\.json has no list 'categories'; .* images, annotations, "),
        (drop("annotations"), r"train2017\.json has no list 'annotations'; it should be"),
        (no_images, r"has no images; export it again with at least one\.$"),
        (repeated_image, r"has 2 images with the id 4; give each an id of its own\.$"),
        (repeated_category, r"has 2 categories with the id 7; give each an id of its own\.$"),
        (nameless, r"lacks 'name', a text, in categories\[1\]; add it\.$"),
        (text_width, r"lacks 'width', a whole number, in images\[2\]; add it\.$"),
        (flat_image, r"says that 004\.png has 60 x 0 pixels; export it again\.$"),
    ],
)
def test_wrong_files_stop(shapes, change, message):
    found = content(shapes)
    change(found)
    rewrite(shapes, found)
    with pytest.raises(UserError, match=message):
        opened(shapes, on_error="skip")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"train2017\.json is not valid JSON \(Expecting property name .*\); download or"),
        ("", "is not valid JSON"),
        ('{"images": NaN}', r"is not valid JSON \(NaN is not a number\)"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "has no list 'images'; it should be an annotation file in COCO's format"),
        ("[1]", "has no list 'images'"),
    ],
)
def test_files_of_another_kind(shapes, text, message):
    (shapes / "annotations/instances_train2017.json").write_text(text)
    with pytest.raises(UserError, match=message):
        opened(shapes)


def test_names_that_do_not_exist(shapes, tmp_path):
    for split, message in (
        ("train2O17", r"unknown split 'train2O17'; did you mean train2017\?$"),
        ("test[:5]", r"unknown split 'test'; known: train2017\.$"),
        ("train2017[:x]", r"unknown split .* or a slice such as 'train2017\[:1000\]'"),
        ("train2017[:9]", "has 5 examples"),
    ):
        with pytest.raises(UserError, match=message):
            opened(shapes, split)
    with pytest.raises(UserError, match=r"no folder .*/shape; it should hold annotations/inst"):
        opened(tmp_path / "shape")
    with pytest.raises(UserError, match=r"has no annotations/instances_\*\.json; it should hold"):
        opened(shapes / "train2017")
    shutil.rmtree(shapes / "train2017")
    with pytest.raises(UserError, match=r"no folder .*train2017; it should hold the split's im"):
        opened(shapes)
    for name in ("coco", "coco:", "folder:photos"):
        with pytest.raises(UserError, match=rf"in COCO's format, 'coco:DIR', not '{name}'\.$"):
            open_split(name, "train2017", FRAME, training=True)
    with pytest.raises(UserError, match="is a data set of objects, for detectors; take a recipe"):
        data.open_source(f"coco:{shapes}")


def test_categories_must_agree(shapes):
    write_shapes(shapes, "val2017")
    check_categories(opened(shapes), opened(shapes, "val2017"))
    found = content(shapes)
    found["categories"][2]["name"] = "nothing"
    rewrite(shapes, found, "other")
    os.symlink(shapes / "train2017", shapes / "other")
    with pytest.raises(UserError, match=r"other\.json differ, as in 'none' with the id 8; every"):
        check_categories(opened(shapes), opened(shapes, "other"))


# ---- damaged images


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:70])


def resize(path):
    path.write_bytes(picture("png", (41, 60)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, r"002\.png can't be read \(No such file or directory\)"),
        (truncate, r"002\.png can't be decoded \("),
        (resize, r"002\.png can't be decoded \(it has 41 x 60 pixels, but its annotations say 40 "),
    ],
)
def test_damaged_images_stop_or_are_skipped(shapes, capsys, damage, message):
    damage(shapes / "train2017/002.png")
    with pytest.raises(UserError, match=rf"found 1 of 5 images, .* .*{message}.*on_error=skip\.$"):
        opened(shapes)
    split = opened(shapes, training=False, on_error="skip")
    assert sorted(split.image_ids) == [1, 4, 6, 9]
    assert split.images[:].shape == (4, 64, 64, 3)
    assert "left out 1 of 5 images, which are damaged" in capsys.readouterr().err


def test_objects_of_damaged_images_alone_are_none(tmp_path):
    write(tmp_path, [image(1, (20, 20)), image(2, (20, 20))], [rectangle(1, 1, (2, 2, 9, 9))])
    remove(tmp_path / "train2017/001.png")
    for training, message in ((False, "no image of 'train2017'"), (True, "found 1 of 1 images")):
        with pytest.raises(UserError, match=message):
            opened(tmp_path, training=training, on_error="skip")


@pytest.mark.parametrize("upright", [True, False])
def test_photographs_that_lie_on_their_side(tmp_path, upright):
    """Annotated as they are shown, or as they are stored."""
    write(tmp_path, [image(1, (24, 48))], [rectangle(1, 1, (2, 2, 9, 9))])
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((48, 24, 3), np.uint8) if upright else np.zeros((24, 48, 3), np.uint8)
    pixels[:8] = 200
    Image.fromarray(pixels).save(tmp_path / "train2017/001.png", exif=exif)
    (found,) = opened(tmp_path).images[:]
    assert (found[:32].min(axis=-1) > 190).mean() == pytest.approx(
        1 / 6 if upright else 1 / 3, abs=0.03
    )
    assert (found[30, 62] > 190).all() == upright


@pytest.mark.slow
@pytest.mark.skipif("XKD_JAX_TEST_COCO" not in os.environ, reason="needs a sample of COCO")
def test_real_photographs():
    """Every image of a sample can be decoded, and every mask reproduced from its box's cells."""
    pytest.importorskip("pycocotools", reason="needs the extra detection")
    root, frame = os.environ["XKD_JAX_TEST_COCO"], Frame(320, 512)
    split = open_split(f"coco:{root}", "val2017", frame, training=False, masks=True)
    assert split.num_classes == 80
    assert split.images[:].shape == (len(split), 512, 512, 3)
    overlaps = []
    for index in range(len(split)):
        boxes, _, rows = split.objects(index)
        for box, row in zip(boxes, rows, strict=True):
            mask = decode(split.run_lengths(index, row)).astype(bool)
            again = in_image(box_mask(mask, box, 112), box, *mask.shape)
            overlaps.append(overlap(again, mask))
    assert np.mean(overlaps) > 0.95
