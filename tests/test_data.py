"""Sources, splits and the order of batches."""

import gzip
import importlib.metadata
import io
import json
import lzma
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xkd_jax import data
from xkd_jax.data import idx, packaged
from xkd_jax.data.order import batch_indices
from xkd_jax.errors import UserError

ASSETS = Path(packaged.__file__).parent.parent / "assets"


# ---- splits

SIZES = {"train": 50, "test": 10}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("train", ("train", 0, 50)),
        ("test", ("test", 0, 10)),
        ("train[:20]", ("train", 0, 20)),
        ("train[45:]", ("train", 45, 50)),
        ("train[3:7]", ("train", 3, 7)),
        ("train[:]", ("train", 0, 50)),
        ("train[-5:]", ("train", 45, 50)),
        ("train[:-5]", ("train", 0, 45)),
        ("test[:10%]", ("test", 0, 1)),
        ("train[:90%]", ("train", 0, 45)),
        ("train[90%:]", ("train", 45, 50)),
        ("train[-10%:]", ("train", 45, 50)),
    ],
)
def test_split_syntax(spec, expected):
    assert data.parse_split(spec, SIZES) == expected


def test_percentages_partition_like_tfds():
    """Adjacent percentages meet: nothing is lost or read twice, as with TFDS's own rounding."""
    sizes = {"train": 997}
    stops = [data.parse_split(f"train[:{p}%]", sizes)[2] for p in range(1, 101)]
    starts = [data.parse_split(f"train[{p}%:]", sizes)[1] for p in range(1, 100)]
    assert stops[:-1] == starts
    assert stops[-1] == 997


@pytest.mark.parametrize("spec", ["validation", "train[", "train[1:2", "", "train[a:b]", "t est"])
def test_unknown_split_names_the_right_ones(spec):
    with pytest.raises(UserError, match=r"unknown split .*train \(50\), test \(10\).*'train\[:10"):
        data.parse_split(spec, SIZES)


@pytest.mark.parametrize("spec", ["train[:51]", "train[7:7]", "train[9:3]", "train[-51:]"])
def test_impossible_range(spec):
    with pytest.raises(UserError, match="'train' holds 50"):
        data.parse_split(spec, SIZES)


# ---- the packaged set


def test_packaged_shapes_and_balance():
    for split, size in (("train", 2000), ("validation", 2000), ("test", 9600)):
        loaded = data.load("fashion_mnist_mini", split)
        assert loaded.images.shape == (size, 28, 28, 3)
        assert loaded.images.dtype == np.uint8
        assert loaded.labels.dtype == np.int32
        assert len(loaded) == size == data.check("fashion_mnist_mini", split)
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
        packaged.Packaged(tmp_path).read("train", 0, 10)
    torn.write_bytes(lzma.compress(b"short"))
    with pytest.raises(UserError, match=r"_train\.xz is missing or damaged; reinstall"):
        packaged.Packaged(tmp_path).read("train", 0, 10)


def test_script_help():
    script = Path(__file__).parent.parent / "scripts" / "make_fashion_mnist_mini.py"
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
    assert data.check(f"idx:{tmp_path}", "test") == 6


def test_idx_folder_called_fashion(tmp_path):
    write_idx(tmp_path / "Fashion-MNIST", compress=True, classes=10)
    loaded = data.load(f"idx:{tmp_path}/Fashion-MNIST", "test")  # 6 labels of the 10 classes
    assert loaded.class_names == idx.FASHION_CLASSES
    assert loaded.mean == (0.2860,) * 3
    assert loaded.std == (0.3530,) * 3


def test_idx_missing(tmp_path):
    with pytest.raises(UserError, match=r"no train-images-idx3-ubyte .*apt-get install"):
        data.check(f"idx:{tmp_path}/nowhere", "train")
    write_idx(tmp_path, compress=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="no t10k-labels-idx1-ubyte "):
        data.check(f"idx:{tmp_path}", "train")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "is damaged"),
        (lambda raw: b"<html>not found</html>", "is damaged"),
        (lambda raw: raw[:30] + b"xxxx" + raw[34:], "is damaged"),
        (lambda raw: gzip.compress(b"short"), "is not an idx file"),
        (
            lambda raw: gzip.compress(gzip.decompress(raw)[:-7]),
            "is damaged: its header promises 240 bytes and 233 follow",
        ),
    ],
)
def test_damaged_idx_is_named(tmp_path, damage, message):
    write_idx(tmp_path, compress=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"train-images-idx3-ubyte\.gz {message}"):
        data.load(f"idx:{tmp_path}", "train")


def test_idx_lengths_that_disagree(tmp_path):
    write_idx(tmp_path, compress=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(
        (tmp_path / "t10k-labels-idx1-ubyte").read_bytes()
    )
    with pytest.raises(UserError, match="holds 12 images, but the file beside it holds 6 labels"):
        data.load(f"idx:{tmp_path}", "train")


# ---- TFDS


def test_missing_tfds_set_is_found_at_once(tmp_path):
    started = time.perf_counter()
    with pytest.raises(UserError) as caught:
        data.load("tfds:cifar100", "train", str(tmp_path))
    assert time.perf_counter() - started < 1
    message = str(caught.value)
    assert f"cifar100 is not in {tmp_path}" in message
    assert "tfds.builder('cifar100'" in message
    assert "download_and_prepare()" in message


def test_default_tfds_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=f"not in {tmp_path}"):
        data.check("tfds:cifar100", "train")


def write_info(folder: Path, **changes) -> Path:
    """The dataset_info.json of a prepared set of 5 examples in two shards."""
    folder.mkdir(parents=True)
    info = {"fileFormat": "array_record", "splits": [{"name": "train", "shardLengths": ["3", "2"]}]}
    (folder / "dataset_info.json").write_text(json.dumps(info | changes))
    return folder


def test_tfds_check_reads_the_newest_version_and_decodes_nothing(tmp_path):
    write_info(tmp_path / "cifar100/9.0.0", splits=[])
    write_info(tmp_path / "cifar100/10.0.0")
    assert data.check("tfds:cifar100", "train[1:]", str(tmp_path)) == 4


def test_tfds_in_another_form(tmp_path):
    write_info(tmp_path / "cifar100/3.0.2", fileFormat="tfrecord")
    with pytest.raises(UserError, match="in the form tfrecord, which only TensorFlow reads"):
        data.check("tfds:cifar100", "train", str(tmp_path))


def test_damaged_tfds_info(tmp_path):
    folder = write_info(tmp_path / "cifar100/3.0.2")
    (folder / "dataset_info.json").write_text('{"spl')
    with pytest.raises(UserError, match=r"is damaged \(dataset_info\.json.*prepare it again"):
        data.check("tfds:cifar100", "train", str(tmp_path))


def prepare_tfds(data_dir: Path, images: list[np.ndarray], label: str = "label") -> Path:
    """Prepares a set `tiny` as array_record; encoded bytes spare TFDS the need for TensorFlow."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny"
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = data_dir

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(None, None, images[0].shape[2]), encoding_format="png"
                    ),
                    label: tfds.features.ClassLabel(names=["cat", "dog"]),
                }
            )
            return self.dataset_info_from_configs(features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, image in enumerate(images):
                png = io.BytesIO()
                Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(png, "png")
                png.seek(0)
                yield i, {"image": png, label: i % 2}

    builder = Tiny(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return Path(builder.data_dir)


def random_images(*shapes: tuple[int, int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, shape, np.uint8) for shape in shapes]


def sorted_by_bytes(images) -> list[bytes]:
    return sorted(np.asarray(image).tobytes() for image in images)


needs_array_record = pytest.mark.skipif(
    sys.platform != "linux", reason="array_record has wheels for Linux only"
)


@needs_array_record
@pytest.mark.parametrize("channels", [1, 3])
def test_tfds_without_tensorflow(tmp_path, channels):
    images = random_images(*[(6, 5, channels)] * 9)
    prepare_tfds(tmp_path, images)
    loaded = data.load("tfds:tiny", "train", str(tmp_path))
    assert loaded.images.shape == (9, 6, 5, 3)
    assert loaded.class_names == ("cat", "dog")
    expected = [np.repeat(image, 3 // channels, axis=-1) for image in images]
    assert sorted_by_bytes(loaded.images) == sorted_by_bytes(expected)  # TFDS shuffles them
    for image, label in zip(loaded.images, loaded.labels, strict=True):
        at = next(i for i, x in enumerate(expected) if (x == image).all())
        assert label == at % 2
    part = data.load("tfds:tiny", "train[2:8]", str(tmp_path))
    np.testing.assert_array_equal(part.images, loaded.images[2:8])
    np.testing.assert_array_equal(part.labels, loaded.labels[2:8])


@needs_array_record
def test_tfds_images_that_differ_in_size(tmp_path):
    prepare_tfds(tmp_path, random_images((6, 5, 3), (5, 6, 3), (6, 5, 3)))
    with pytest.raises(UserError, match="differ in size"):
        data.load("tfds:tiny", "train", str(tmp_path))


@needs_array_record
def test_tfds_set_without_labels(tmp_path):
    prepare_tfds(tmp_path, random_images((6, 5, 3), (6, 5, 3)), label="breed")
    with pytest.raises(UserError, match="does not classify images"):
        data.load("tfds:tiny", "train", str(tmp_path))


@needs_array_record
def test_torn_tfds_shard(tmp_path):
    folder = prepare_tfds(tmp_path, random_images(*[(6, 5, 3)] * 4))
    shard = next(folder.glob("*array_record-00000*"))
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"is damaged \(split train.*prepare it again"):
        data.load("tfds:tiny", "train", str(tmp_path))


# ---- names, and what is imported


def test_unknown_data_set():
    with pytest.raises(UserError, match=r"unknown data set 'cifar100'; did you mean tfds:cifar100"):
        data.load("cifar100", "train")
    with pytest.raises(UserError, match=r"known: .*fashion_mnist_mini.*idx:FOLDER"):
        data.load("zzz", "train")
    with pytest.raises(UserError, match="lacks its second half"):
        data.load("tfds:", "train")


def test_neither_jax_nor_tensorflow_is_imported():
    code = (
        "import sys; from xkd_jax import data; data.load('fashion_mnist_mini', 'train[:10]'); "
        "import xkd_jax.data.order; "
        "print([m for m in ('jax', 'tensorflow', 'tensorflow_datasets') if m in sys.modules])"
    )
    root = Path(data.__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == "[]"


def test_tfds_is_declared():
    """TFDS imports importlib_resources without declaring it."""
    assert importlib.metadata.version("importlib_resources")


# ---- order


def test_an_epoch_is_a_permutation_less_its_remainder():
    steps = 103 // 10
    seen = np.concatenate([batch_indices(103, 10, seed=3, step=step) for step in range(steps)])
    assert seen.dtype == np.int32
    assert len(np.unique(seen)) == 100
    assert seen.min() >= 0
    assert seen.max() < 103


def test_epochs_and_seeds_differ():
    first = batch_indices(100, 100, seed=0, step=0)
    assert (first != batch_indices(100, 100, seed=0, step=1)).any()
    assert (first != batch_indices(100, 100, seed=1, step=0)).any()
    np.testing.assert_array_equal(np.sort(first), np.arange(100))


def test_order_needs_only_the_step():
    walked = [batch_indices(64, 10, seed=7, step=step) for step in range(20)]
    for step in (19, 0, 6, 5, 12):  # in any order, over several epochs
        np.testing.assert_array_equal(batch_indices(64, 10, seed=7, step=step), walked[step])


def test_order_is_pinned():
    """A different NumPy, or a different platform, must not reorder a resumed run."""
    np.testing.assert_array_equal(batch_indices(10, 5, seed=0, step=0), [0, 7, 8, 6, 9])


def test_order_is_read_only():
    with pytest.raises(ValueError, match="read-only"):
        batch_indices(10, 5, 0, 0)[0] = 1


@pytest.mark.parametrize("batch_size", [0, 11])
def test_impossible_batch(batch_size):
    with pytest.raises(ValueError, match=r"not within 1\.\.10"):
        batch_indices(10, batch_size, 0, 0)
