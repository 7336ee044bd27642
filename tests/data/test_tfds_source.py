"""TFDS data sets, read without TensorFlow."""

import importlib.metadata
import io
import json
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xkd_jax import data
from xkd_jax.data.encoded import open_split
from xkd_jax.errors import UserError


def test_missing_tfds_set_is_found_at_once(tmp_path):
    started = time.perf_counter()
    with pytest.raises(UserError) as caught:
        data.load("tfds:cifar100", "train", str(tmp_path))
    assert time.perf_counter() - started < 1
    message = str(caught.value)
    assert f"cifar100 is not in {tmp_path}" in message
    assert f"python -m xkd_jax.prepare cifar100 --data_dir {tmp_path}" in message
    with pytest.raises(UserError, match=r"imagenet2012 .*--archive ILSVRC2012_img_train\.tar"):
        data.load("tfds:imagenet2012", "train", str(tmp_path))
    with pytest.raises(UserError, match=r"tfds\.builder\('stl10'.*download_and_prepare\(\)"):
        data.load("tfds:stl10", "train", str(tmp_path))


def test_default_tfds_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=f"not in {tmp_path}"):
        data.load("tfds:cifar100", "train")


def write_info(folder: Path, **changes) -> Path:
    """The dataset_info.json of a prepared set of 5 examples in two shards."""
    folder.mkdir(parents=True)
    info = {"fileFormat": "array_record", "splits": [{"name": "train", "shardLengths": ["3", "2"]}]}
    (folder / "dataset_info.json").write_text(json.dumps(info | changes))
    return folder


def test_tfds_opens_the_newest_version_and_decodes_nothing(tmp_path):
    write_info(tmp_path / "cifar100/9.0.0", splits=[])
    write_info(tmp_path / "cifar100/10.0.0")
    assert data.open_source("tfds:cifar100", str(tmp_path)).sizes == {"train": 5}


def test_tfds_in_another_format(tmp_path):
    write_info(tmp_path / "cifar100/3.0.2", fileFormat="tfrecord")
    with pytest.raises(UserError, match="in tfrecord format, which only TensorFlow reads"):
        data.load("tfds:cifar100", "train", str(tmp_path))


def test_damaged_tfds_info(tmp_path):
    folder = write_info(tmp_path / "cifar100/3.0.2")
    (folder / "dataset_info.json").write_text('{"spl')
    with pytest.raises(UserError, match=r"is damaged \(dataset_info\.json.*prepare it again"):
        data.load("tfds:cifar100", "train", str(tmp_path))


def prepare_tfds(
    data_dir: Path, images: list[np.ndarray], label: str = "label", labels: tuple[int, ...] = (0, 1)
) -> Path:
    """Prepares a set `tiny` as array_record; TFDS stores encoded bytes without TensorFlow."""
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
            info = self.dataset_info_from_configs(features=features)
            # It would leave an empty folder in the system's temporary folder.
            info.initialize_from_bucket = lambda: None
            return info

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, image in enumerate(images):
                png = io.BytesIO()
                Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(png, "png")
                png.seek(0)
                yield i, {"image": png, label: labels[i % 2]}

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
    examples = data.open_source("tfds:tiny", str(tmp_path)).examples("train", 1, 9)
    assert isinstance(examples[0].image, bytes)
    copy = pickle.loads(pickle.dumps(examples))  # after use: open files are not sent
    assert copy[3] == examples[3]
    np.testing.assert_array_equal(copy.labels, loaded.labels[1:])


@needs_array_record
def test_tfds_images_that_differ_in_size(tmp_path):
    prepare_tfds(tmp_path, random_images((6, 5, 3), (5, 6, 3), (6, 5, 3)))
    with pytest.raises(UserError, match=r"differ in size .*set image_size"):
        data.load("tfds:tiny", "train", str(tmp_path))
    assert data.load("tfds:tiny", "train", str(tmp_path), size=4).images.shape == (3, 4, 4, 3)


@needs_array_record
def test_tfds_set_without_labels(tmp_path):
    prepare_tfds(tmp_path, random_images((6, 5, 3), (6, 5, 3)), label="breed")
    with pytest.raises(UserError, match="is not an image-classification set"):
        data.load("tfds:tiny", "train", str(tmp_path))


@needs_array_record
def test_tfds_labels_out_of_range(tmp_path):
    """-1 is how TFDS marks a test split whose labels are secret."""
    prepare_tfds(tmp_path, random_images((6, 5, 3), (6, 5, 3)), labels=(0, -1))
    with pytest.raises(UserError, match=r"\] has the label -1, which is not within 0\.\.1; use"):
        data.load("tfds:tiny", "train", str(tmp_path))


@needs_array_record
def test_a_host_feed_looks_at_labels_before_it_starts(tmp_path):
    prepare_tfds(tmp_path, random_images(*[(6, 5, 3)] * 4), labels=(-1, -1))
    with pytest.raises(UserError, match=r"\] has the label -1, which is not within 0\.\.1; use"):
        open_split("tfds:tiny", "train", str(tmp_path), 4, "host", "stop", 0.0)


@needs_array_record
def test_torn_tfds_shard(tmp_path):
    folder = prepare_tfds(tmp_path, random_images(*[(6, 5, 3)] * 4))
    shard = next(folder.glob("*array_record-00000*"))
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"is damaged \(split train.*prepare it again"):
        data.load("tfds:tiny", "train", str(tmp_path))


def test_tfds_is_declared():
    """TFDS imports importlib_resources without declaring it."""
    assert importlib.metadata.version("importlib_resources")
