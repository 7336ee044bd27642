"""Folders of images without labels."""

import pytest
from PIL import Image

from xkd_jax import data
from xkd_jax.data.encoded import open_split
from xkd_jax.errors import UserError


def write(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / name)


def names(source, split="train"):
    examples = source.examples(split, 0, source.sizes[split])
    return {examples[i].name for i in range(len(examples))}


def test_flat_and_nested_images_are_one_split(tmp_path, capsys):
    write(tmp_path, "a.png", "b.png", "2024/c.png", "2024/trip/d.png", "cats/e.png", ".hidden.png")
    (tmp_path / "notes.txt").write_text("")
    source = data.open_source(f"images:{tmp_path}")
    assert source.class_names == ()
    assert source.sizes == {"train": 5}
    found = ["a.png", "b.png", "2024/c.png", "2024/trip/d.png", "cats/e.png"]
    assert names(source) == {str(tmp_path / name) for name in found}
    assert "left out of" in capsys.readouterr().err
    split = data.load(f"images:{tmp_path}", "train[:3]")
    assert split.images.shape == (3, 8, 8, 3)
    assert split.num_classes == 0
    assert split.labels.tolist() == [0, 0, 0]
    again = data.load(f"images:{tmp_path}", "train[:3]")
    assert again.identity == split.identity
    assert split.identity["class_names"] == []


def test_folders_with_the_names_of_splits_are_splits(tmp_path):
    write(tmp_path, "train/cat/a.png", "train/b.png", "validation/c.png", "d.png")
    source = data.open_source(f"images:{tmp_path}")
    assert source.sizes == {"train": 2, "val": 1}
    assert names(source, "val") == {str(tmp_path / "validation/c.png")}


def test_wrong_folders(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*; it should hold images"):
        data.open_source(f"images:{tmp_path / 'nothing'}")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"has no images \(\.jpg, .*\) but 1 \.txt; give another"):
        data.open_source(f"images:{tmp_path}")
    write(tmp_path, "val/a.png", "valid/b.png")
    with pytest.raises(UserError, match="two folders for the split 'val'"):
        data.open_source(f"images:{tmp_path}")


@pytest.mark.parametrize("feed", ["resident", "host"])
def test_labels_can_be_ignored(feed):
    arguments = "fashion_mnist_mini", "test[:5]", "", 28, feed, "stop", 0.0
    whole, bare = open_split(*arguments), open_split(*arguments, labelled=False)
    assert whole.num_classes == 10
    assert bare.num_classes == 0
    assert list(bare.labels) == [0] * 5
    assert (bare.images[[0, 3]] == whole.images[[0, 3]]).all()
