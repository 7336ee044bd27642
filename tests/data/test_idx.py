"""The packaged data set and folders of idx files."""

import gzip
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xkd_jax import data
from xkd_jax.data import idx, packaged
from xkd_jax.errors import UserError

ASSETS = Path(packaged.__file__).parent.parent / "assets"


# ---- the packaged set


def test_packaged_shapes_and_balance():
    for split, size in (("train", 2000), ("validation", 2000), ("test", 9600)):
        loaded = data.load("fashion_mnist_mini", split)
        assert loaded.images.shape == (size, 28, 28, 3)
        assert loaded.images.dtype == np.uint8
        assert loaded.labels.dtype == np.int32
        assert len(loaded) == size
        assert loaded.num_classes == 10
        assert loaded.class_names == idx.FASHION_CLASSES
        np.testing.assert_array_equal(np.bincount(loaded.labels), size // 10)
        np.testing.assert_allclose(loaded.images.mean() / 255, loaded.mean[0], atol=0.01)
        np.testing.assert_allclose(loaded.images.std() / 255, loaded.std[0], atol=0.01)


def test_packaged_slices():
    whole = data.load("fashion_mnist_mini", "test")
    part = data.load("fashion_mnist_mini", "test[995:1035]")
    np.testing.assert_array_equal(part.images, whole.images[995:1035])
    np.testing.assert_array_equal(part.labels, whole.labels[995:1035])
    np.testing.assert_array_equal(np.bincount(part.labels), 4)


def test_packaged_train_and_validation_are_disjoint():
    source = packaged.Packaged()
    train, validation = source.original_indices("train"), source.original_indices("validation")
    assert len(np.union1d(train, validation)) == 4000
    assert len(np.unique(source.original_indices("test"))) == 9600


def test_packaged_is_small_and_licensed():
    files = list(ASSETS.glob("fashion_mnist_mini*"))
    assert sum(path.stat().st_size for path in files) < 4_900_000
    assert "2017 Zalando SE" in (ASSETS / "fashion_mnist_mini.LICENSE").read_text()


def test_packaged_equals_the_original():
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    source = packaged.Packaged()
    for split, origin in (("train", "train"), ("validation", "train"), ("test", "test")):
        images, labels = idx.read_pair(folder, origin)
        indices = source.original_indices(split)
        loaded = data.load("fashion_mnist_mini", split)
        np.testing.assert_array_equal(loaded.images[..., 1], images[indices])
        np.testing.assert_array_equal(loaded.labels, labels[indices])


def test_damaged_package(tmp_path):
    with pytest.raises(UserError, match=r"fashion_mnist_mini\.json is missing or damaged"):
        packaged.Packaged(tmp_path)
    for path in ASSETS.glob("fashion_mnist_mini*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    torn = tmp_path / "fashion_mnist_mini_train.xz"
    torn.write_bytes(torn.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"_train\.xz is missing or damaged; reinstall"):
        packaged.Packaged(tmp_path).examples("train", 0, 10)
    torn.write_bytes(lzma.compress(b"short"))
    with pytest.raises(UserError, match=r"_train\.xz is missing or damaged; reinstall"):
        packaged.Packaged(tmp_path).examples("train", 0, 10)


def test_script_help():
    script = Path(__file__).parents[2] / "scripts" / "make_fashion_mnist_mini.py"
    command = [sys.executable, str(script), "--help"]
    environment = {"PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "example:" in done.stdout


# ---- idx folders


def write_idx(folder: Path, compress: bool, classes: int = 3) -> dict[str, np.ndarray]:
    """Writes a tiny data set of 12 + 6 images of 5x4; returns its arrays."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for stem, n in (("train", 12), ("t10k", 6)):
        images = rng.integers(0, 256, (n, 5, 4), np.uint8)
        labels = (np.arange(n) % classes).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            raw = header + array.tobytes()
            name = f"{stem}-{kind}-ubyte" + (".gz" if compress else "")
            (folder / name).write_bytes(gzip.compress(raw) if compress else raw)
            arrays[f"{stem}-{kind}"] = array
    return arrays


@pytest.mark.parametrize("compress", [True, False])
def test_idx_folder(tmp_path, compress):
    arrays = write_idx(tmp_path, compress)
    loaded = data.load(f"idx:{tmp_path}", "train[2:7]")
    assert loaded.images.shape == (5, 5, 4, 3)
    for channel in range(3):
        np.testing.assert_array_equal(loaded.images[..., channel], arrays["train-images-idx3"][2:7])
    np.testing.assert_array_equal(loaded.labels, arrays["train-labels-idx1"][2:7])
    assert loaded.labels.dtype == np.int32
    assert loaded.class_names == ("0", "1", "2")
    assert len(data.load(f"idx:{tmp_path}", "test")) == 6


def test_idx_folder_called_fashion(tmp_path):
    write_idx(tmp_path / "Fashion-MNIST", compress=True, classes=10)
    loaded = data.load(f"idx:{tmp_path}/Fashion-MNIST", "test")  # 6 examples, 10 classes
    assert loaded.class_names == idx.FASHION_CLASSES
    assert loaded.mean == (0.2860,) * 3
    assert loaded.std == (0.3530,) * 3


def test_idx_missing(tmp_path):
    with pytest.raises(UserError, match=r"no train-images-idx3-ubyte .*apt-get install"):
        data.load(f"idx:{tmp_path}/nowhere", "train")
    write_idx(tmp_path, compress=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="no t10k-labels-idx1-ubyte "):
        data.load(f"idx:{tmp_path}", "train")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "is damaged"),
        (lambda raw: b"<html>not found</html>", "is damaged"),
        (lambda raw: raw[:30] + b"xxxx" + raw[34:], "is damaged"),
        (lambda raw: gzip.compress(b"short"), "is not an idx file"),
        (
            lambda raw: gzip.compress(gzip.decompress(raw)[:-7]),
            "is damaged: its header announces 240 bytes but 233 follow",
        ),
    ],
)
def test_damaged_idx_is_named(tmp_path, damage, message):
    write_idx(tmp_path, compress=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"train-images-idx3-ubyte\.gz {message}"):
        data.load(f"idx:{tmp_path}", "train")


def test_idx_lengths_that_differ(tmp_path):
    write_idx(tmp_path, compress=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(
        (tmp_path / "t10k-labels-idx1-ubyte").read_bytes()
    )
    with pytest.raises(UserError, match="has 12 images, but its label file has 6 labels"):
        data.load(f"idx:{tmp_path}", "train")
