"""Folders of images: the files found, their order, and damaged files."""

import io
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xkd_jax import data
from xkd_jax.errors import UserError


def picture(format: str = "jpeg", size: tuple[int, int] = (24, 16), shade: int = 90) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(file, format)
    return file.getvalue()


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        suffix = Path(name).suffix[1:].lower()
        (root / name).write_bytes(picture({"jpg": "jpeg"}.get(suffix, suffix)))
    return root


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes: 4 + 2 training images and 1 + 1 validation images."""
    train = [f"train/cat/{i}.jpg" for i in range(3)] + ["train/cat/more/deep/3.PNG"]
    train += ["train/dog/a.webp", "train/dog/b.bmp"]
    return write(tmp_path / "photos", *train, "val/cat/x.jpeg", "val/dog/y.jpg")


def names(source, split="train") -> list[str]:
    examples = source.examples(split, 0, source.sizes[split])
    return [Path(example.name).name for example in examples]


def test_layout(photos):
    write(photos, "train/cat/.hidden.jpg", "train/.ipynb_checkpoints/z.jpg", "notes/z.jpg")
    (photos / "train/cat/notes.txt").write_text("not an image")
    source = data.open_source(f"folder:{photos}")
    assert source.sizes == {"train": 6, "val": 2}
    assert source.class_names == ("cat", "dog")
    assert sorted(names(source)) == ["0.jpg", "1.jpg", "2.jpg", "3.PNG", "a.webp", "b.bmp"]
    for image, label, name in source.examples("train", 0, 6):
        assert isinstance(image, bytes)
        assert source.class_names[label] in name
    assert len(data.load(f"folder:{photos}", "train[:50%]", size=8)) == 3


def test_load(photos):
    loaded = data.load(f"folder:{photos}", "val")
    assert loaded.images.shape == (2, 16, 24, 3)
    assert loaded.images.min() == loaded.images.max() == 90
    np.testing.assert_array_equal(np.sort(loaded.labels), [0, 1])
    assert data.load(f"folder:{photos}", "val", size=8).images.shape == (2, 8, 8, 3)
    (photos / "val/cat/x.jpeg").write_bytes(picture(size=(9, 9)))
    with pytest.raises(UserError, match=r"differ in size \(.* set image_size"):
        data.load(f"folder:{photos}", "val")


def test_a_folder_without_splits_is_stratified(tmp_path):
    write(tmp_path, *[f"a/{i}.bmp" for i in range(40)], *[f"b/{i}.bmp" for i in range(20)])
    source = data.open_source(f"folder:{tmp_path}")
    assert source.sizes == {"train": 60}
    labels = source.examples("train", 0, 60).labels
    for start in range(0, 60, 6):  # slices are stratified
        assert abs(np.sum(labels[start : start + 6] == 0) - 4) <= 1
    ordered = names(source)
    assert sorted(ordered) != ordered
    # The order depends only on the names, not on the location or on how the folder is listed.
    copy = shutil.copytree(tmp_path, tmp_path.with_name("elsewhere"))
    assert names(data.open_source(f"folder:{copy}")) == ordered
    assert ordered[:2] == ["21.bmp", "13.bmp"]


def test_a_class_may_be_called_train(tmp_path):
    source = data.open_source(f"folder:{write(tmp_path, 'train/a.jpg', 'bus/b.jpg')}")
    assert source.sizes == {"train": 2}
    assert source.class_names == ("bus", "train")


def test_classes_by_the_last_folder(tmp_path):
    """CelebA-Spoof's layout."""
    write(tmp_path, "train/17/live/a.jpg", "train/17/spoof/b.png", "train/18/live/c.jpg")
    write(tmp_path, "test/19/spoof/d.jpg", "test/20/live/e.jpg")
    source = data.open_source(f"leaf:{tmp_path}")
    assert source.class_names == ("live", "spoof")
    assert source.sizes == {"train": 3, "test": 2}
    found = {Path(x.name).name: x.label for x in source.examples("train", 0, 3)}
    assert found == {"a.jpg": 0, "b.png": 1, "c.jpg": 0}


def test_examples_can_be_sent_to_workers(photos):
    examples = data.open_source(f"folder:{photos}").examples("train", 1, 5)
    copy = pickle.loads(pickle.dumps(examples))
    assert [copy[i] for i in range(4)] == [examples[i] for i in range(4)]


def empty_class(root):
    (root / "train/eel").mkdir()


def extra_class(root):
    write(root, "val/eel/z.jpg")


def missing_class(root):
    shutil.rmtree(root / "val/dog")


def no_class(root):
    shutil.rmtree(root)
    write(root, "a.jpg", "b.jpg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (empty_class, r"train/eel has no images \(\.jpg, .*delete the folder\.$"),
        (extra_class, r"val has a class 'eel' that .*train lacks; .*same class folders \(2 in"),
        (missing_class, r"val has no class 'dog'; every split needs"),
        (no_class, r"photos has no class folders; put images in .*photos/CLASS/\*\.jpg, or use "
                   r"images:.*photos if they have no labels\.$"),
        (shutil.rmtree, r"there is no folder .*photos; it should hold train/CLASS/\*\.jpg\.$"),
    ],
)  # fmt: skip
def test_wrong_folder(photos, change, message):
    change(photos)
    with pytest.raises(UserError, match=message):
        data.open_source(f"folder:{photos}")


def test_wrong_split(photos):
    with pytest.raises(UserError, match=r"unknown split 'test'; known: train \(6\), val \(2\)"):
        data.load(f"folder:{photos}", "test")


# ---- damaged files


@pytest.fixture
def damaged(photos) -> Path:
    """Three of the six training images are damaged."""
    (photos / "train/cat/0.jpg").write_bytes(b"")
    (photos / "train/cat/1.jpg").write_bytes(noise("jpeg")[:-30])
    (photos / "train/dog/b.bmp").write_bytes(b"<html>not found</html>")
    return photos


def noise(format: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def by_scan(root, on_error="stop"):
    source = data.open_source(f"folder:{root}")
    examples = data.scan(source.examples("train", 0, 6), on_error)
    assert len(examples) == len(examples.labels)
    return [(x.label, Path(x.name).name) for x in examples], list(examples.labels)


def by_reading(root, on_error="stop"):
    loaded = data.load(f"folder:{root}", "train", on_error=on_error)
    return [(int(label), None) for label in loaded.labels], list(loaded.labels)


@pytest.mark.parametrize("look", [by_scan, by_reading])
def test_damaged_files_stop(damaged, look):
    with pytest.raises(UserError, match=r"^found 3 of 6 images, which are damaged: ") as caught:
        look(damaged)
    message = str(caught.value)
    assert "cat/0.jpg can't be decoded (it is empty)" in message
    assert "cat/1.jpg can't be decoded (image file is truncated" in message
    assert "b.bmp can't be decoded (it is not an image" in message
    assert message.endswith("data.on_error=skip.")


@pytest.mark.parametrize("look", [by_scan, by_reading])
def test_damaged_files_are_skipped(damaged, look, capsys):
    found, labels = look(damaged, "skip")
    assert [label for label, _ in found] == labels
    assert sorted(labels) == [0, 0, 1]
    report = capsys.readouterr().err
    assert re.search(r"xkd_jax: left out 3 of 6 images, which are damaged: .*0\.jpg", report)


def test_nothing_left(damaged):
    for path in ("train/cat/2.jpg", "train/cat/more/deep/3.PNG", "train/dog/a.webp"):
        (damaged / path).write_bytes(b"")
    with pytest.raises(UserError, match=r"6 of 6 images, .*, and 1 more; repair"):
        by_scan(damaged, "skip")
    with pytest.raises(UserError, match="6 of 6 images"):
        by_reading(damaged, "skip")


def test_unknown_on_error(photos):
    with pytest.raises(UserError, match=r"unknown data\.on_error 'ignore'; known: skip, stop"):
        by_scan(photos, "ignore")


@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "bmp"])
def test_a_quick_look_finds_what_was_cut_off(tmp_path, format):
    whole = write(tmp_path, "a/x.jpg", "b/y.jpg") / "a/x.jpg"
    examples = data.open_source(f"folder:{tmp_path}").examples("train", 0, 2)
    whole.write_bytes(noise(format))
    assert not examples.faults()
    whole.write_bytes(noise(format) + b"\0" * 200)  # padding, as some cameras write: harmless
    assert not examples.faults()
    whole.write_bytes(noise(format)[:-30])
    assert len(examples.faults()) == 1


def test_a_file_that_vanishes_is_named(photos):
    examples = data.open_source(f"folder:{photos}").examples("val", 0, 2)
    shutil.rmtree(photos)
    with pytest.raises(UserError, match=r"\.jpe?g can't be read \(No such file"):
        examples[0]
    assert len(examples.faults()) == 2
