"""Preparing TFDS folders from archives."""

import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xkd_jax import data
from xkd_jax.data import prepare
from xkd_jax.errors import UserError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="array_record has wheels for Linux only"
)


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def rows(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), np.uint8)


FINE, COARSE = [f"fine{i}" for i in range(100)], [f"coarse{i}" for i in range(20)]
LABELS = {"train": [(3, 99), (0, 7), (19, 50)], "test": [(1, 2), (2, 1)]}  # coarse, fine


def cifar100_binary(folder: Path) -> Path:
    files = {
        f"cifar-100-binary/{split}.bin": b"".join(
            bytes(label) + row.tobytes()
            for label, row in zip(labels, rows(len(labels), len(labels)), strict=True)
        )
        for split, labels in LABELS.items()
    }
    for kind, names in (("fine", FINE), ("coarse", COARSE)):
        files[f"cifar-100-binary/{kind}_label_names.txt"] = "\n".join(names).encode() + b"\n"
    return write_tar(folder / "cifar-100-binary.tar.gz", files)


def test_cifar100(tmp_path):
    archive = cifar100_binary(tmp_path)
    folder = prepare.prepare("cifar100", str(tmp_path / "tfds"), [str(archive)])
    assert folder == tmp_path / "tfds/cifar100/3.0.2"
    for split, labels in LABELS.items():
        loaded = data.load("tfds:cifar100", split, str(tmp_path / "tfds"))
        assert loaded.class_names == tuple(FINE)
        wanted = rows(len(labels), len(labels)).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        by_label = {fine: image for (_, fine), image in zip(labels, wanted, strict=True)}
        assert sorted(loaded.labels) == sorted(by_label)
        for image, label in zip(loaded.images, loaded.labels, strict=True):
            np.testing.assert_array_equal(image, by_label[int(label)])


def test_tfds_itself_reads_what_was_prepared(tmp_path):
    import tensorflow_datasets as tfds

    prepare.prepare("cifar100", str(tmp_path), [str(cifar100_binary(tmp_path))])
    read = tfds.data_source("cifar100", data_dir=str(tmp_path), split="test", download=False)
    found = {record["id"]: (record["coarse_label"], record["label"]) for record in read}
    assert found == {b"test_00000": (1, 2), b"test_00001": (2, 1)}


def test_cifar10_from_the_command_line(tmp_path):
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    files = {
        f"cifar-10-batches-bin/{name}.bin": bytes([i]) + rows(1, i).tobytes()
        for i, name in enumerate(names)
    }
    files["cifar-10-batches-bin/batches.meta.txt"] = "\n".join("abcdefghij").encode() + b"\n\n"
    archive = write_tar(tmp_path / "any.tar.gz", files)
    command = [sys.executable, "-m", "xkd_jax.prepare", "cifar10", "--data_dir"]
    command += [str(tmp_path), "--archive", str(archive)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/cifar10/3.0.2: train 5, test 1"
    loaded = data.load("tfds:cifar10", "test", str(tmp_path))
    assert loaded.class_names == tuple("abcdefghij")
    np.testing.assert_array_equal(
        loaded.images[0], rows(1, 5).reshape(3, 32, 32).transpose(1, 2, 0)
    )


def jpeg(seed: int, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 8 + seed, len(mode)), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode=None).convert(mode).save(file, "jpeg")
    return file.getvalue()


def imagenet(folder: Path) -> list[str]:
    synsets = {"n01440764": 2, "n15075141": 1}
    inner = {}
    for synset, count in synsets.items():
        images = {f"{synset}_{i}.JPEG": jpeg(i) for i in range(count)}
        inner[f"{synset}.tar"] = write_tar(folder / synset, images, "w").read_bytes()
    train = write_tar(folder / "ILSVRC2012_img_train.tar", inner, "w")
    images = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(i) for i in (1, 2)}
    return [str(train), str(write_tar(folder / "ILSVRC2012_img_val.tar", images, "w"))]


def test_imagenet(tmp_path):
    import tensorflow_datasets as tfds

    prepare.prepare("imagenet2012", str(tmp_path), imagenet(tmp_path))
    source = data.open_source("tfds:imagenet2012", str(tmp_path))
    assert source.sizes == {"train": 3, "validation": 2}
    assert len(source.class_names) == 1000
    examples = source.examples("train", 0, 3)
    assert sorted(examples.labels) == [0, 0, 999]
    assert {example.image for example in examples} == {jpeg(0), jpeg(1)}  # the original bytes
    # The first two validation labels, by image number.
    validation = source.examples("validation", 0, 2)
    assert {source.class_names[label] for label in validation.labels} == {"n01751748", "n09193705"}
    read = tfds.data_source("imagenet2012", data_dir=str(tmp_path), split="train", download=False)
    assert {record["file_name"] for record in read} >= {b"n15075141_0.JPEG"}


def test_imagenet_needs_both_archives(tmp_path):
    train, validation = imagenet(tmp_path)
    for files in ([], [train], [validation]):
        with pytest.raises(UserError, match=r"from both its archives; add --archive ILSVRC2012"):
            prepare.prepare("imagenet2012", str(tmp_path), files)


def torn(folder: Path) -> Path:
    archive = cifar100_binary(folder)
    archive.write_bytes(archive.read_bytes()[:-500])
    return archive


def short(folder: Path) -> Path:
    names = {f"{kind}_label_names.txt": b"a" for kind in ("fine", "coarse")}
    return write_tar(folder / "short.tar.gz", {"train.bin": b"\0" * 3075, "test.bin": b"", **names})


def other(folder: Path) -> Path:
    return write_tar(folder / "other.tar.gz", {"a.txt": b"b"})


def page(folder: Path) -> Path:
    (folder / "page.tar.gz").write_text("<html>not found</html>")
    return folder / "page.tar.gz"


@pytest.mark.parametrize("create", [torn, short, other, page])
def test_wrong_archive(tmp_path, create):
    archive = create(tmp_path)
    with pytest.raises(UserError, match=rf"{archive.name} is damaged or is not .* of cifar100"):
        prepare.prepare("cifar100", str(tmp_path), [str(archive)])
    assert not (tmp_path / "cifar100/3.0.2").exists()


@pytest.mark.parametrize(
    ("name", "member"),
    [("cifar10", "cifar-10-batches-py/batches.meta"), ("cifar100", "cifar-100-python/meta")],
)
def test_python_archives_are_refused(tmp_path, name, member):
    """Without unpickling: these files are not even pickles."""
    archive = write_tar(tmp_path / "python.tar.gz", {member: b"not a pickle"})
    binary = f"{name[:5]}-{name[5:]}-binary"
    with pytest.raises(UserError, match=rf"is the Python \(pickle\) version .*{binary}\.tar\.gz"):
        prepare.prepare(name, str(tmp_path), [str(archive)])
    assert not (tmp_path / name).exists()


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    archive = cifar100_binary(tmp_path)
    prepare.prepare("cifar100", str(tmp_path / "tfds"), [str(archive)])
    data.load("tfds:cifar100", "test", str(tmp_path / "tfds"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive.name, "tfds"]


def test_missing_archive_and_unknown_set(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*nowhere\.tar"):
        prepare.prepare("cifar10", str(tmp_path), ["nowhere.tar"])
    with pytest.raises(UserError, match="unknown data set to prepare 'cifar'; did you mean cifar1"):
        prepare.prepare("cifar", str(tmp_path), [])


def test_a_prepared_set_is_kept(tmp_path):
    folder = tmp_path / "cifar100/3.0.2"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"exists, but not in array_record format; delete it"):
        prepare.prepare("cifar100", str(tmp_path), [])
    (folder / "dataset_info.json").write_text('{"fileFormat": "array_record"}')
    assert prepare.prepare("cifar100", str(tmp_path), []) == folder


def test_download(tmp_path, monkeypatch):
    """A download is verified, and a missing network is one sentence."""

    def no_network(url, timeout):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError, match=r"no route to host\); .*--archive cifar-10-binary\.tar"):
        prepare.prepare("cifar10", str(tmp_path), [])
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(b"<html>"))
    with pytest.raises(UserError, match=r"binary\.tar\.gz of cifar10 was damaged"):
        prepare.prepare("cifar10", str(tmp_path), [])
    assert not list((tmp_path / "downloads").iterdir())
