"""The contents of the CIFAR and ImageNet archives, as their authors distribute them."""

import contextlib
import dataclasses
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from xkd_jax.errors import UserError

Record = dict[str, Any]  # a TFDS example; its image is a file object of encoded bytes


@dataclasses.dataclass(frozen=True)
class Contents:
    """What TFDS needs to prepare a data set.

    Attributes:
      splits: for each split, a function that yields its keys and records.
      class_names: for each label feature, its class names; features whose names TFDS knows are
        left out.
    """

    splits: Mapping[str, Callable[[], Iterator[tuple[int | str, Record]]]]
    class_names: Mapping[str, list[str]]


_PIXELS = 3 * 32 * 32  # bytes of an image, channel by channel
_CIFAR_SPLITS = {
    "cifar10": {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
    "cifar100": {"train": ["train.bin"], "test": ["test.bin"]},
}
# Files with the class names of each label, in the order of the label bytes of a record.
_CIFAR_LABELS = {
    "cifar10": {"label": "batches.meta.txt"},
    "cifar100": {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
}
_CIFAR_BINARY = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}
_CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


def read_cifar(name: str, archive: Path) -> Contents:
    """Reads cifar-10-binary.tar.gz or cifar-100-binary.tar.gz (format: the CIFAR page).

    A record is one byte for each label, then 3,072 bytes of pixels, channel by channel. The Python
    version of the archives is refused, because unpickling a file can run arbitrary code.

    Args:
      name: "cifar10" or "cifar100".
      archive: the file.

    Raises:
      UserError: it is missing, damaged, the Python version or another archive.
    """
    files: dict[str, bytes] = {}
    with _reading(name, archive), tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if path.name in ("meta", "batches.meta"):
                raise UserError(
                    f"{archive} is the Python (pickle) version of CIFAR; use the binary version, "
                    f"{_CIFAR_BINARY[name]}, from {_CIFAR_PAGE}."
                )
            if path.suffix in (".bin", ".txt"):
                files[path.name] = _open(tar, member).read()
    labels = _CIFAR_LABELS[name]
    with _reading(name, archive):
        class_names = {key: files[file].decode().split() for key, file in labels.items()}
        tables = {
            split: np.frombuffer(b"".join(files[part] for part in parts), np.uint8).reshape(
                -1, len(labels) + _PIXELS
            )
            for split, parts in _CIFAR_SPLITS[name].items()
        }
    splits = {
        split: lambda split=split, table=table: _cifar_records(split, table, list(labels))
        for split, table in tables.items()
    }
    return Contents(splits, class_names)


def _cifar_records(split: str, table: np.ndarray, keys: list[str]) -> Iterator[tuple[int, Record]]:
    for index, row in enumerate(table):
        pixels = row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "png")
        png.seek(0)
        record = {key: int(label) for key, label in zip(keys, row[: len(keys)], strict=True)}
        yield index, {"id": f"{split}_{index:05d}", "image": png, **record}


def read_imagenet(archives: list[Path]) -> Contents:
    """Reads ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; JPEG bytes are kept unchanged.

    Args:
      archives: the two files, in any order.

    Raises:
      UserError: one of them is missing, damaged or another archive.
    """
    found = {_kind(archive): archive for archive in archives}
    if set(found) != {"train", "validation"}:
        raise UserError(
            "imagenet2012 is prepared from both its archives; add "
            "--archive ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar (from image-net.org)."
        )
    return Contents(
        {
            "train": lambda: _train_records(found["train"]),
            "validation": lambda: _validation_records(found["validation"]),
        },
        {},
    )


def _kind(archive: Path) -> str:
    """ "train" or "validation"; only the training archive contains archives, one per class."""
    with _reading("imagenet2012", archive), tarfile.open(archive, "r:") as tar:
        first = tar.next()
        if first is None:
            raise tarfile.ReadError("it is empty")
        return "train" if first.name.endswith(".tar") else "validation"


def _train_records(archive: Path) -> Iterator[tuple[str, Record]]:
    with _reading("imagenet2012", archive), tarfile.open(archive, "r:") as outer:
        for inner in outer:
            with tarfile.open(fileobj=_open(outer, inner), mode="r:") as tar:
                for member in tar:
                    jpeg = io.BytesIO(_open(tar, member).read())
                    label = Path(inner.name).stem
                    yield member.name, {"file_name": member.name, "image": jpeg, "label": label}


def _validation_records(archive: Path) -> Iterator[tuple[str, Record]]:
    # The archive has no labels; TFDS ships them, ordered by image number.
    folder = resources.files("tensorflow_datasets.datasets.imagenet2012")
    labels = (folder / "validation_labels.txt").read_text().split()
    with _reading("imagenet2012", archive), tarfile.open(archive, "r:") as tar:
        for member in tar:
            if not member.isfile():
                continue
            number = int(Path(member.name).stem.removeprefix("ILSVRC2012_val_"))
            jpeg, name = io.BytesIO(_open(tar, member).read()), Path(member.name).name
            yield name, {"file_name": name, "image": jpeg, "label": labels[number - 1]}


def _open(tar: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    file = tar.extractfile(member)
    if file is None:
        raise tarfile.ReadError(f"{member.name} is not a file")
    return file  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def _reading(name: str, archive: Path) -> Iterator[None]:
    """Turns the errors of reading an archive into a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"there is no file {archive}.") from error
    except (tarfile.TarError, zlib.error, OSError, EOFError, LookupError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{archive} is damaged or is not an archive of {name} ({reason}); download it again."
        ) from error
