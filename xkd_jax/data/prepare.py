"""Prepares TFDS data sets in array_record format, without TensorFlow."""

import hashlib
import json
import os
import sys
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xkd_jax.data import archives
from xkd_jax.data.progress import Progress
from xkd_jax.errors import UserError, unknown

SETS = ("cifar10", "cifar100", "imagenet2012")
_TIMEOUT = 20  # seconds to wait for the server


def command(name: str, data_dir: str) -> str:
    """The command line that prepares one of `SETS`."""
    extra = " --archive ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar"
    extra = extra if name == "imagenet2012" else ""
    return f"python -m xkd_jax.prepare {name} --data_dir {data_dir}{extra}"


def default_folder() -> str:
    """TFDS's default data folder."""
    return os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"


def prepare(name: str, data_dir: str, files: list[str]) -> Path:
    """Writes DATA_DIR/NAME/VERSION, which `tfds.data_source` and "tfds:NAME" read.

    Args:
      name: one of `SETS`.
      data_dir: TFDS's data folder; "" is its default.
      files: local archives; without one, CIFAR's binary archive is downloaded.

    Returns:
      The folder of the prepared set.

    Raises:
      UserError: the set is unknown, or an archive is missing, damaged or can't be downloaded.
    """
    if name not in SETS:
        raise unknown("data set to prepare", name, SETS)
    import tensorflow_datasets as tfds

    root = Path(data_dir or default_folder()).expanduser()
    registered: Any = tfds.builder_cls(name)
    folder = root / name / str(registered.VERSION)
    if folder.exists():
        if _is_array_record(folder):
            return folder
        raise UserError(
            f"{folder} exists, but not in array_record format; delete it or choose another "
            f"--data_dir."
        )
    given = [Path(file).expanduser() for file in files]
    if name == "imagenet2012":
        contents = archives.read_imagenet(given)
    else:
        if len(given) > 1:
            raise UserError(f"{name} is prepared from one archive, but {len(given)} were given.")
        archive = given[0] if given else _download(registered, name, root / "downloads")
        contents = archives.read_cifar(name, archive)
    builder = _create_builder(registered, name, root, contents)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # `_count` reports instead
    # Without a network, looking for a prepared copy would take minutes to fail.
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
    return Path(builder.data_dir)


def _create_builder(registered: Any, name: str, root: Path, contents: archives.Contents) -> Any:
    """TFDS's builder of the set, for records whose images are already encoded."""

    def info(self):
        found = registered._info(self)
        # TFDS would look for the set's metadata in its bucket, which it has disabled, and leave an
        # empty temporary folder behind.
        found.initialize_from_bucket = lambda: None
        return found

    def split_generators(self, dl_manager):
        for feature, names in contents.class_names.items():
            self.info.features[feature].names = names
        return {
            split: _count(f"preparing {name} {split}", records())
            for split, records in contents.splits.items()
        }

    members = {
        "name": name,
        "pkg_dir_path": registered.pkg_dir_path,
        "_info": info,
        "_split_generators": split_generators,
        "__module__": registered.__module__,
    }
    created: Any = types.new_class(
        registered.__name__, (registered,), {"skip_registration": True}, lambda x: x.update(members)
    )
    return created(data_dir=str(root), file_format="array_record")


def _count(what: str, records: Iterator) -> Iterator:
    """Yields the records; reports how many, except in a terminal, where TFDS shows bars."""
    if sys.stderr.isatty():
        yield from records
        return
    with Progress(what, None, "examples") as progress:
        for record in records:
            yield record
            progress.update(1)


def _is_array_record(folder: Path) -> bool:
    try:
        info = json.loads((folder / "dataset_info.json").read_text())
    except (OSError, ValueError):
        return False
    return info.get("fileFormat") == "array_record"


def _download(registered: Any, name: str, folder: Path) -> Path:
    """Downloads a set's only archive if `folder` lacks it, and verifies its SHA-256 checksum."""
    ((url, info),) = registered.url_infos.items()
    path = folder / url.rpartition("/")[2]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, part.open("wb") as file:
                _copy(answer, file, path.name, int(info.size))
        except (urllib.error.URLError, OSError) as error:
            part.unlink(missing_ok=True)
            reason = getattr(error, "reason", error)
            raise UserError(
                f"{url} can't be downloaded ({reason}); download it on another machine and add "
                f"--archive {path.name}."
            ) from error
        part.replace(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != info.checksum:
        path.unlink()
        raise UserError(
            f"the download {path} of {name} was damaged and has been deleted; try again."
        )
    return path


def _copy(answer: Any, file: Any, name: str, size: int) -> None:
    with Progress(f"downloading {name}", size, "B") as progress:
        while block := answer.read(1 << 20):
            file.write(block)
            progress.update(len(block))
