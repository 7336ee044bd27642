"""What the archives of CIFAR and ImageNet hold, as their authors distribute them."""

import contextlib
import dataclasses
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from xkd_jax.errors import UserError

Record = dict[str, Any]  # a TFDS example; its image is a file of encoded bytes


@dataclasses.dataclass(frozen=True)
class Contents:
    """What TFDS needs to prepare a set.

    Attributes:
      splits: what generates each split's keys and records.
      class_names: of each label feature; none for those that TFDS knows.
    """

    splits: Mapping[str, Callable[[], Iterator[tuple[int | str, Record]]]]
    class_names: Mapping[str, list[str]]


def read_cifar(name: str, archive: Path) -> Contents:
    """Opens cifar-10-*.tar.gz or cifar-100-*.tar.gz, the binary or the Python version.

    Args:
      name: "cifar10" or "cifar100".
      archive: the file.

    Raises:
      UserError: it is damaged, or another archive.
    """
    files: dict[str, bytes] = {}
    with _reading(name, archive), tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile():
                files[Path(member.name).name] = _open(tar, member).read()
    keys = ["coarse_label", "label"] if name == "cifar100" else ["label"]
    with _reading(name, archive):
        read = _python if "meta" in files or "batches.meta" in files else _binary
        parts, names = read(files, keys)
    splits = {
        split: lambda split=split, rows=rows: _cifar_records(split, rows, keys)
        for split, rows in parts.items()
    }
    return Contents(splits, dict(zip(keys, names, strict=True)))


_Rows = tuple[np.ndarray, np.ndarray]  # labels [n, keys] and pixels [n, 3072]
_CIFAR_FILES = {
    "label": {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
    "coarse_label": {"train": ["train"], "test": ["test"]},
}


def _binary(files: Mapping[str, bytes], keys: list[str]) -> tuple[dict[str, _Rows], list]:
    def rows(stems: list[str]) -> _Rows:
        raw = b"".join(files[f"{stem}.bin"] for stem in stems)
        table = np.frombuffer(raw, np.uint8).reshape(-1, len(keys) + 3072)
        return table[:, : len(keys)], table[:, len(keys) :]

    labels = ["coarse_label_names.txt", "fine_label_names.txt"]
    if len(keys) == 1:
        labels = ["batches.meta.txt"]
    names = [files[label].decode().split() for label in labels]
    return {split: rows(stems) for split, stems in _CIFAR_FILES[keys[0]].items()}, names


def _python(files: Mapping[str, bytes], keys: list[str]) -> tuple[dict[str, _Rows], list]:
    fields = [b"coarse_labels", b"fine_labels"] if len(keys) == 2 else [b"labels"]

    def rows(stems: list[str]) -> _Rows:
        batches = [_ArraysOnly(io.BytesIO(files[stem]), encoding="bytes").load() for stem in stems]
        labels = [np.stack([batch[field] for field in fields], axis=1) for batch in batches]
        return np.concatenate(labels), np.concatenate([batch[b"data"] for batch in batches])

    label_names = (
        [b"coarse_label_names", b"fine_label_names"] if len(keys) == 2 else [b"label_names"]
    )
    file = files["meta" if len(keys) == 2 else "batches.meta"]
    meta = _ArraysOnly(io.BytesIO(file), encoding="bytes").load()
    names = [[name.decode() for name in meta[field]] for field in label_names]
    return {split: rows(stems) for split, stems in _CIFAR_FILES[keys[0]].items()}, names


# NumPy's own, under the name that this version has for it.
_RECONSTRUCT = np.empty(0).__reduce__()[0]


class _ArraysOnly(pickle.Unpickler):
    """Reads pickled containers and NumPy arrays; a pickle that asks for more is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _RECONSTRUCT
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _cifar_records(split: str, rows: _Rows, keys: list[str]) -> Iterator[tuple[int, Record]]:
    for index, (labels, pixels) in enumerate(zip(*rows, strict=True)):
        png = io.BytesIO()
        Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)).save(png, "png")
        png.seek(0)
        record = {key: int(label) for key, label in zip(keys, labels, strict=True)}
        yield index, {"id": f"{split}_{index:05d}", "image": png, **record}


def read_imagenet(archives: list[Path]) -> Contents:
    """Opens ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; JPEG bytes stay as they are.

    Args:
      archives: the two, in any order.

    Raises:
      UserError: one is missing, damaged or another archive.
    """
    found = {_kind(archive): archive for archive in archives}
    if set(found) != {"train", "validation"}:
        raise UserError(
            "imagenet2012 is prepared from both its archives; add "
            "--archive ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar (image-net.org has them)."
        )
    return Contents(
        {
            "train": lambda: _train_records(found["train"]),
            "validation": lambda: _validation_records(found["validation"]),
        },
        {},
    )


def _kind(archive: Path) -> str:
    """The training archive holds one archive for each class."""
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
    # TFDS's package has them, in the order of the images' numbers.
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
        raise tarfile.ReadError(f"{member.name} is no file")
    return file  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def _reading(name: str, archive: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"there is no file {archive}.") from error
    except (
        tarfile.TarError,
        pickle.UnpicklingError,
        zlib.error,
        OSError,
        EOFError,
        LookupError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{archive} is damaged, or is not an archive of {name} ({reason}); download it again."
        ) from error
