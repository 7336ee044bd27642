"""Image-classification sets of TensorFlow Datasets, read from array_record without TensorFlow."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from xkd_jax.augment import normalization
from xkd_jax.data import prepare
from xkd_jax.data.source import Example, sha256
from xkd_jax.errors import UserError

_IMAGENET = normalization.IMAGENET_MEAN, normalization.IMAGENET_STD  # for any other set
_STATISTICS = {
    "cifar10": (normalization.CIFAR10_MEAN, normalization.CIFAR10_STD),
    "cifar100": (normalization.CIFAR100_MEAN, normalization.CIFAR100_STD),
    "fashion_mnist": (normalization.FASHION_MNIST_MEAN, normalization.FASHION_MNIST_STD),
}


class TfdsFolder:
    """A prepared TFDS set: DATA_DIR/NAME/VERSION with array_record files."""

    def __init__(self, name: str, data_dir: str = ""):
        """Finds the prepared set by its files; TFDS itself might wait minutes for the network.

        Args:
          name: TFDS's name, with the config if it has any ("cifar100", "imagenet_resized/32x32").
          data_dir: TFDS's data folder; "" is its default ($TFDS_DATA_DIR, ~/tensorflow_datasets).

        Raises:
          UserError: the set is missing, damaged or not in array_record format.
        """
        root = data_dir or prepare.default_folder()
        self._name = name
        folder = Path(root).expanduser() / name
        versions = [path.parent for path in folder.glob("*/dataset_info.json")]
        if not versions:
            raise UserError(f"TFDS's {name} is not in {root}; {_how_to_get(name, root)}")
        self.mean, self.std = _STATISTICS.get(name, _IMAGENET)
        self._folder = max(versions, key=_version)
        try:
            info = json.loads((self._folder / "dataset_info.json").read_text())
            self._sizes = {
                split["name"]: sum(int(length) for length in split["shardLengths"])
                for split in info["splits"]
            }
        except (OSError, ValueError, KeyError) as error:
            raise _damaged(self._folder, "dataset_info.json", error) from error
        if info.get("fileFormat") != "array_record":
            raise UserError(
                f"{self._folder} is in {info.get('fileFormat', 'tfrecord')} format, which only "
                f"TensorFlow reads; {_how_to_get(name, root)}"
            )

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of examples of each named split."""
        return self._sizes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class, indexed by label.

        Raises:
          UserError: the set is not one of labelled images.
        """
        return self._class_names

    @functools.cached_property
    def _class_names(self) -> tuple[str, ...]:
        features: Any = self._builder().info.features
        return tuple(features["label"].names)

    def examples(self, split: str, start: int, stop: int) -> "TfdsExamples":
        """The examples [start, stop) of a named split, none of them decoded.

        Raises:
          UserError: the set is not one of labelled images.
        """
        about = self._name, self._folder.name, sorted(self._sizes.items()), self.class_names
        return TfdsExamples(self._folder, split, start, stop, len(self.class_names), str(about))

    def _builder(self) -> Any:
        """TFDS's reader of the folder, once the set is known to have images and labels."""
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder_from_directory(self._folder)
            features: Any = builder.info.features
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise _damaged(self._folder, "features.json", error) from error
        if not (
            isinstance(features, tfds.features.FeaturesDict)
            and isinstance(dict(features).get("image"), tfds.features.Image)
            and isinstance(dict(features).get("label"), tfds.features.ClassLabel)
        ):
            raise UserError(
                f"TFDS's {self._name} is not an image-classification set: it lacks the features "
                f"'image' and 'label'; use a set such as cifar100."
            )
        return builder


class TfdsExamples:
    """Records, read on access; a copy in another process reopens the files."""

    def __init__(
        self, folder: Path, split: str, start: int, stop: int, num_classes: int, about: str
    ):
        """Opens nothing yet.

        Args:
          folder: the folder of the prepared set.
          split: the name of the split.
          start: the index of the first example.
          stop: the index after the last example.
          num_classes: labels must be below this.
          about: identifies the prepared set, wherever it is stored.
        """
        self._folder, self._split, self._range = folder, split, range(start, stop)
        self._num_classes, self._about = num_classes, about

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> Example:
        # Parsed here: TFDS decodes every feature of the record and takes five times as long.
        from tensorflow_datasets.proto import tf_example_pb2

        messages: Any = tf_example_pb2
        at = self._range[index]
        try:
            record = messages.Example.FromString(self._records[at]).features.feature
            image = record["image"].bytes_list.value[0]
            label = record["label"].int64_list.value[0]
        except (OSError, ValueError, RuntimeError, IndexError, DecodeError) as error:
            raise _damaged(self._folder, f"split {self._split}", error) from error
        name = f"{self._folder} {self._split}[{at}]"
        if not 0 <= label < self._num_classes:
            raise UserError(
                f"{name} has the label {label}, which is not within 0..{self._num_classes - 1}; "
                f"use a split with labels."
            )
        return Example(image, label, name)

    @property
    def labels(self) -> np.ndarray:
        """int32 [n]; reads all records on first access."""
        return self._labels

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        return np.array([example.label for example in self], np.int32)

    def faults(self) -> dict[int, str]:
        """Always empty: records have checksums, which are verified when they are read."""
        return {}

    def digest(self, kept: np.ndarray | None = None) -> str:
        """A digest of the set's name, version, sizes and class names: labels are slow to read."""
        whole = np.arange(len(self))
        indices = self._range.start + (whole if kept is None else whole[kept])
        return sha256(self._about.encode(), self._split.encode(), indices.astype("<i8").tobytes())

    @functools.cached_property
    def _records(self) -> Any:
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder_from_directory(self._folder)
        return builder.as_data_source(split=self._split).data_source

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_records"}


def _damaged(folder: Path, what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{folder} is damaged ({what}: {reason}); delete it and prepare it again.")


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.split(".") if part.isdigit())


def _how_to_get(name: str, root: str) -> str:
    if name in prepare.SETS:
        return f"prepare it with: {prepare.command(name, root)}"
    # Reading does not need TensorFlow, but TFDS encodes images with it.
    return (
        f"prepare it (needs the network) with: pip install tensorflow && "
        f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, '
        f"data_dir={root!r}, file_format='array_record').download_and_prepare()\""
    )
