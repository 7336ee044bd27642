"""`Split.identity`: equal for a moved folder, different for other data."""

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_folder import picture, write
from tests.data.test_idx import write_idx
from tests.data.test_tfds_source import needs_array_record, prepare_tfds, random_images
from xkd_jax import data
from xkd_jax.data.encoded import open_split


@pytest.fixture
def photos(tmp_path) -> Path:
    return write(tmp_path / "photos", *[f"train/{c}/{i}.jpg" for c in "ab" for i in range(5)])


def identity(name: str | Path, split: str = "train", feed: str = "host", on_error: str = "stop"):
    name = f"folder:{name}" if isinstance(name, Path) else name
    return open_split(name, split, "", 8, feed, on_error, 0.0).identity


def copied(photos: Path, name: str = "copy") -> Path:
    return shutil.copytree(photos, photos.with_name(name))


def test_what_it_says(photos):
    found = identity(photos)
    assert found["class_names"] == ["a", "b"]
    assert found["examples"] == 10
    assert len(found["digest"]) == 16
    assert int(found["digest"], 16)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("feed", ["host", "resident"])
def test_the_way_of_reading_and_the_location_change_nothing(photos, feed):
    first = identity(photos)
    assert identity(photos, feed=feed) == first
    assert identity(copied(photos), feed=feed) == first
    assert data.load(f"folder:{photos}", "train").identity == first
    renamed = copied(photos, "renamed")
    (renamed / "train").rename(renamed / "Training")
    assert identity(renamed, feed=feed) == first


def swap_images(root):
    (root / "train/a/0.jpg").rename(root / "train/b/9.jpg")
    (root / "train/b/0.jpg").rename(root / "train/a/9.jpg")


def rename_a_file(root):
    (root / "train/a/0.jpg").rename(root / "train/a/9.jpg")


def rename_a_class(root):
    (root / "train/a").rename(root / "train/aa")


def delete(root):
    (root / "train/a/0.jpg").unlink()


def add(root):
    (root / "train/a/9.jpg").write_bytes(picture())


@pytest.mark.parametrize("change", [swap_images, rename_a_file, rename_a_class, delete, add])
def test_other_data_differ(photos, change):
    other = copied(photos)
    change(other)
    assert identity(other) != identity(photos)


def test_slices_differ(photos):
    assert identity(photos, "train[:4]")["examples"] == 4
    digests = {identity(photos, s)["digest"] for s in ("train", "train[:4]", "train[4:8]")}
    assert len(digests) == 3


@pytest.mark.parametrize("feed", ["host", "resident"])
def test_images_that_are_skipped_do_not_count(photos, feed):
    damaged = copied(photos)
    (damaged / "train/a/0.jpg").write_bytes(b"")
    found = identity(damaged, feed=feed, on_error="skip")
    assert found["examples"] == 9
    assert found["digest"] != identity(photos)["digest"]
    assert found == identity(damaged, feed="host", on_error="skip")


def test_names_are_compared_composed(tmp_path):
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "caf\u00e9")
        write(tmp_path / form, f"train/{name}/{name}.jpg", "train/tea/1.jpg")
    assert identity(tmp_path / "NFC") == identity(tmp_path / "NFD")


def test_idx_folders(tmp_path):
    for name, classes in (("one", 3), ("two", 3), ("three", 2)):
        write_idx(tmp_path / name, compress=False, classes=classes)
    one, two, three = (identity(f"idx:{tmp_path / x}") for x in ("one", "two", "three"))
    assert one == two
    assert one["digest"] != three["digest"]
    assert identity(f"idx:{tmp_path / 'one'}", "train[1:]")["digest"] != one["digest"]


def test_a_split_of_arrays():
    images = np.zeros((3, 4, 4, 3), np.uint8)
    first, second = (
        data.Split(images, np.array(labels, np.int32), ("a", "b")).identity
        for labels in ([0, 1, 0], [1, 0, 0])
    )
    assert first["digest"] != second["digest"]


@needs_array_record
def test_tfds_reads_no_record(tmp_path, monkeypatch):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        prepare_tfds(tmp_path / place, random_images(*[(6, 5, 3)] * 4))
    one, two = (data.load("tfds:tiny", "train", str(tmp_path / x)) for x in ("one", "two"))
    monkeypatch.setattr("xkd_jax.data.tfds_source.TfdsExamples.__getitem__", None)
    assert one.identity == two.identity
    assert one.identity["examples"] == 4
    host = data.open_source("tfds:tiny", str(tmp_path / "one")).examples("train", 0, 4)
    assert host.digest() == one.identity["digest"]
    assert host.digest(np.arange(3)) != one.identity["digest"]
