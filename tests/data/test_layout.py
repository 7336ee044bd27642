"""Folders as people have them: names of splits, wrong paths, links, suffixes and Unicode."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_folder import names, picture, write
from tests.data.test_idx import write_idx
from xkd_jax import data
from xkd_jax.errors import UserError


def open_folder(root: Path, kind: str = "folder"):
    return data.open_source(f"{kind}:{root}")


def refuse(root: Path, match: str, kind: str = "folder") -> str:
    with pytest.raises(UserError, match=match) as caught:
        open_folder(root, kind)
    return str(caught.value)


def split(root: Path, folder: str, count: int = 2) -> Path:
    """A folder with two classes."""
    return write(root, *[f"{folder}/{c}/{i}.jpg" for c in ("cat", "dog") for i in range(count)])


# ---- splits


@pytest.mark.parametrize("train", ["train", "training", "Train", "TRAINING"])
@pytest.mark.parametrize("val", ["val", "valid", "Validation", "VAL"])
@pytest.mark.parametrize("test", ["test", "Testing"])
def test_usual_names_of_splits(tmp_path, train, val, test):
    for folder, count in ((train, 3), (val, 2), (test, 1)):
        split(tmp_path, folder, count)
    source = open_folder(tmp_path)
    assert list(source.sizes.items()) == [("train", 6), ("val", 4), ("test", 2)]
    assert source.class_names == ("cat", "dog")


@pytest.mark.parametrize("folder", ["val", "valid", "validation", "Validation"])
@pytest.mark.parametrize("wanted", ["val", "valid", "validation", "val[:50%]"])
def test_usual_names_in_the_config(tmp_path, folder, wanted):
    split(split(tmp_path, "train"), folder)
    sizes = open_folder(tmp_path).sizes
    assert data.parse_split(wanted, sizes) == ("val", 0, 2 if "[" in wanted else 4)
    with pytest.raises(UserError, match="unknown split 'test'; known: train"):
        data.parse_split("test", sizes)


def test_names_of_other_sources_splits():
    assert data.parse_split("val[:2]", {"train": 5, "validation": 4}) == ("validation", 0, 2)
    assert data.parse_split("val", {"validation": 4, "val": 3}) == ("val", 0, 3)


def test_two_folders_for_a_split(tmp_path):
    for folder in ("train", "val", "Validation"):
        split(tmp_path, folder)
    refuse(tmp_path, r"has two folders for the split 'val', Validation and val; rename or delete")


def test_leaf_splits(tmp_path):
    write(tmp_path, "Training/1/live/a.jpg", "Training/1/spoof/b.jpg")
    write(tmp_path, "valid/2/live/a.jpg", "valid/2/spoof/b.jpg")
    assert open_folder(tmp_path, "leaf").sizes == {"train": 2, "val": 2}


# ---- wrong paths


@pytest.mark.parametrize("kind", ["folder", "leaf"])
@pytest.mark.parametrize("below", ["data", "data/images", "a/b/c"])
def test_a_path_too_high(tmp_path, kind, below):
    split(tmp_path, f"{below}/Train")
    message = refuse(tmp_path, "is not the folder of a data set", kind)
    assert message.endswith(f": {below} has a folder Train; use {tmp_path / below}.")
    assert open_folder(tmp_path / below, kind).sizes == {"train": 4}


def test_a_path_too_high_above_much_else(tmp_path):
    split(split(write(tmp_path, "other/notes/x.png", "b.jpg"), "photos/val"), "photos/train")
    refuse(tmp_path, rf"photos has a folder train; use {tmp_path}/photos\.$")


@pytest.mark.parametrize("kind", ["folder", "leaf"])
@pytest.mark.parametrize("name", ["train", "Testing"])
def test_a_path_too_low(tmp_path, kind, name, monkeypatch):
    split(tmp_path, f"photos/{name}")
    message = refuse(tmp_path / "photos" / name, "is one split of a data set", kind)
    assert message.endswith(f"use {tmp_path / 'photos'}.")
    monkeypatch.chdir(tmp_path / "photos" / name)
    assert refuse(Path("."), "is one split", kind).endswith(f"use {tmp_path / 'photos'}.")


def test_a_path_to_a_class(tmp_path):
    split(tmp_path, "train")
    refuse(tmp_path / "train/cat", rf"cat has no class folders; use {tmp_path}\.$")
    write(tmp_path, "train/cat/holiday/x.jpg")
    match = rf"a single class, 'holiday', .*; if cat is a class, use {tmp_path}\.$"
    refuse(tmp_path / "train/cat", match)


def test_a_single_class(tmp_path):
    write(tmp_path, "one/cat/a.jpg", "two/train/images/cat/a.jpg", "two/train/images/dog/a.jpg")
    write(tmp_path, "three/all/cat/a.jpg", "three/all/dog/a.jpg")
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    refuse(one, rf"one has a single class, 'cat', .*; {one} should have one folder for each class")
    refuse(two, rf"train has a single class, 'images'.*in {two}/train/images, move them to {two}/t")
    refuse(three, rf"three has a single class, 'all'.* in {three}/all, use {three}/all\.$")


def test_a_single_class_of_another_source(tmp_path):
    write_idx(tmp_path, compress=False, classes=1)
    with pytest.raises(UserError, match=r"^idx:.* has a single class, '0', and a classifier needs"):
        data.load(f"idx:{tmp_path}", "train")


def test_splits_without_classes(tmp_path):
    write(tmp_path, "train/cat.0.jpg", "train/dog.0.jpg", "test/1.jpg")
    refuse(
        tmp_path, r"test is a split, but has no class folders; put its images in .*CLASS/\*\.jpg"
    )


def test_a_test_split_without_labels(tmp_path, capsys):
    write(split(tmp_path, "train"), "test/1.jpg", "test/2.jpg")
    assert open_folder(tmp_path).sizes == {"train": 4}
    assert "2 images outside class folders" in capsys.readouterr().err


def test_splits_in_the_classes(tmp_path):
    write(tmp_path, "cat/train/a.jpg", "cat/test/b.jpg", "dog/train/a.jpg", "dog/test/b.jpg")
    refuse(
        tmp_path, rf"such as cat/train; use one .*layout {tmp_path}/train/cat/\*\.jpg if each is"
    )


def test_names_that_contain_a_split(tmp_path):
    for name in ("seg_train", "seg_test", "seg_pred"):
        split(tmp_path, f"{name}/{name}")
    refuse(tmp_path, "folders seg_test and seg_train, which are probably splits and not classes")


def test_classes_with_names_like_splits(tmp_path):
    """A name alone is not a mistake."""
    write(tmp_path, "test_tube/a.jpg", "train_station/b.jpg", "validation/c.jpg")
    assert open_folder(tmp_path).class_names == ("test_tube", "train_station", "validation")


@pytest.mark.skipif("os.getuid() == 0", reason="root reads everything")
def test_a_folder_that_cannot_be_read(tmp_path):
    split(tmp_path, "train")
    (tmp_path / "train/cat").chmod(0)
    refuse(tmp_path, "cat can't be read")


def test_a_folder_that_vanishes(tmp_path, monkeypatch):
    split(tmp_path, "train")

    def fail(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("os.scandir", fail)
    refuse(tmp_path, r"can't be read \(Permission denied\); change its permissions or delete it\.$")


# ---- links


@pytest.mark.parametrize("target", ["../a", "..", "../..", "../../.."])
def test_a_link_in_a_circle(tmp_path, target, capsys):
    write(tmp_path, *[f"photos/{s}/{c}/{i}.jpg" for s in ("train", "val") for c in "ab"
                      for i in range(3)])  # fmt: skip
    (tmp_path / "photos/train/a/again").symlink_to(target)
    assert open_folder(tmp_path / "photos").sizes == {"train": 6, "val": 6}
    assert "1 link to a folder that is read already" in capsys.readouterr().err


@pytest.mark.parametrize("link", ["a/a-link", "a/z-link", "b/a-link"])
def test_a_link_never_takes_the_images_of_a_folder(tmp_path, link):
    """The real folder is read, whichever comes first in the order of names."""
    write(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "train/b/more/3.jpg", "train/c/4.jpg")
    (tmp_path / "train" / link).symlink_to(tmp_path / "train/b/more")
    source = open_folder(tmp_path)
    labels = source.examples("train", 0, 4).labels
    assert dict(zip(names(source), labels.tolist(), strict=True)) == {
        "1.jpg": 0, "2.jpg": 1, "3.jpg": 1, "4.jpg": 2
    }  # fmt: skip


def test_links_to_other_folders_are_followed(tmp_path):
    write(tmp_path, "store/cats/1.jpg", "store/cats/deep/2.jpg", "store/more/3.jpg")
    write(tmp_path, "photos/train/dog/4.jpg")
    (tmp_path / "photos/train/cat").symlink_to(tmp_path / "store/cats")
    (tmp_path / "photos/train/dog/more").symlink_to(tmp_path / "store/more")
    (tmp_path / "photos/train/dog/twice").symlink_to(tmp_path / "store/more")
    (tmp_path / "photos/val").symlink_to(tmp_path / "photos/train")
    assert open_folder(tmp_path / "photos").sizes == {"train": 4, "val": 4}


def test_two_classes_that_are_one_folder(tmp_path):
    write(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg")
    (tmp_path / "train/kitten").symlink_to("cat")
    refuse(tmp_path, "has the classes 'cat' and 'kitten', which are one folder")


# ---- suffixes


SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".JPG"), "jpeg"),
    **dict.fromkeys((".png", ".apng", ".PNG"), "png"),
    **dict.fromkeys((".tif", ".tiff", ".TIF"), "tiff"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "ppm"),
    **dict.fromkeys((".bmp", ".dib"), "bmp"),
    ".webp": "webp",
    ".gif": "gif",
}


def test_every_suffix_of_the_decoder_is_read(tmp_path, capsys):
    write(tmp_path, "train/a/x.jpg")
    (tmp_path / "train/b").mkdir()
    for number, (suffix, format) in enumerate(SUFFIXES.items()):
        (tmp_path / f"train/b/{number}{suffix}").write_bytes(picture(format))
    source = open_folder(tmp_path)
    examples = source.examples("train", 0, 1 + len(SUFFIXES))
    np.testing.assert_array_equal(np.bincount(examples.labels), [1, len(SUFFIXES)])
    assert not examples.faults()
    assert np.ptp(data.load(f"folder:{tmp_path}", "train").images) <= 1
    assert capsys.readouterr().err == ""


def test_what_is_left_out_is_counted(tmp_path, capsys):
    split(split(tmp_path, "train"), "val")
    for name in ("cat/1.heic", "cat/2.HEIC", "cat/deep/3.heic", "dog/x.txt", "labels.csv", "dog/x"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"x")
    for name in (".DS_Store", "Thumbs.db", "cat/desktop.ini", "cat/._0.jpg"):
        (tmp_path / "val" / name).write_bytes(b"x")
    write(tmp_path, "train/stray.jpg", "train/__MACOSX/cat/y.jpg", "val/@eaDir/z.jpg")
    write(tmp_path, "docs/unrelated.jpg", "val/.cache/cat/z.jpg")
    (tmp_path / "README.md").write_text("about")
    assert open_folder(tmp_path).sizes == {"train": 4, "val": 4}
    (line,) = capsys.readouterr().err.splitlines()
    begin = f"xkd_jax: left out of {tmp_path}: 3 .heic, 1 "
    end = " (not read), 1 image outside class folders."
    assert line.startswith(begin)
    assert line.endswith(end)
    assert line.count(",") == 4
    for part in ("1 .txt", "1 .csv", "1 without a suffix"):
        assert part in line


def test_a_class_of_unread_files_says_so(tmp_path):
    split(tmp_path, "train")
    (tmp_path / "train/eel").mkdir()
    for number in range(2):
        (tmp_path / f"train/eel/{number}.heic").write_bytes(b"x")
    refuse(tmp_path, r"train/eel has no images \(\.jpg, .*\) but 2 \.heic; add some or delete")


# ---- names


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def test_names_are_compared_and_stored_composed(tmp_path):
    write(tmp_path, f"train/{DECOMPOSED}/1.jpg", "train/tea/2.jpg")
    write(tmp_path, f"val/{COMPOSED}/1.jpg", "val/tea/2.jpg")
    source = open_folder(tmp_path)
    assert source.class_names == (COMPOSED, "tea")
    assert source.sizes == {"train": 2, "val": 2}
    assert len(data.load(f"folder:{tmp_path}", "train")) == 2


def test_two_classes_that_look_equal(tmp_path):
    write(tmp_path, f"train/{DECOMPOSED}/1.jpg", f"train/{COMPOSED}/2.jpg", "train/tea/2.jpg")
    refuse(tmp_path, rf"two class folders that are both called '{COMPOSED}' but are encoded diff")


def test_leaf_classes_that_look_equal_are_one(tmp_path):
    write(tmp_path, f"train/1/{DECOMPOSED}/1.jpg", f"train/2/{COMPOSED}/2.jpg", "train/2/tea/3.jpg")
    source = open_folder(tmp_path, "leaf")
    assert source.class_names == (COMPOSED, "tea")
    assert source.sizes == {"train": 3}


def test_numbers_are_sorted_as_text(tmp_path):
    """As in torchvision; timm sorts them by value."""
    write(tmp_path, *[f"train/{number}/x.jpg" for number in (0, 1, 2, 10)])
    assert open_folder(tmp_path).class_names == ("0", "1", "10", "2")


def test_the_order_survives_a_copy_by_macos(tmp_path):
    for form in (COMPOSED, DECOMPOSED):
        write(tmp_path / form, *[f"train/{c}{form}/{form}{i}.bmp" for c in "ab" for i in range(20)])
    first, second = (open_folder(tmp_path / form) for form in (COMPOSED, DECOMPOSED))
    assert [unicodedata.normalize("NFC", name) for name in names(second)] == names(first)
