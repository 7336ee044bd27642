"""Image-classification sets of TensorFlow Datasets, read from array_record without TensorFlow."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xkd_jax.data.source import IMAGENET_MEAN, IMAGENET_STD, Split
from xkd_jax.errors import UserError

# Mean and standard deviation of the training images, per channel, in units of [0, 1].
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": ((0.2860, 0.2860, 0.2860), (0.3530, 0.3530, 0.3530)),
}
_CHUNK = 4096


class TfdsFolder:
    """A set that TFDS prepared: DATA_DIR/NAME/VERSION with its array_record files."""

    def __init__(self, name: str, data_dir: str = ""):
        """Looks for the prepared set, by its files: TFDS itself would ask the network, for minutes.

        Args:
          name: TFDS's name, with a config where it has one ("cifar100", "imagenet_resized/32x32").
          data_dir: TFDS's data folder; "" is its default ($TFDS_DATA_DIR, ~/tensorflow_datasets).

        Raises:
          UserError: the set is not there, or is not in array_record form.
        """
        root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        self._name = name
        folder = Path(root).expanduser() / name
        versions = [path.parent for path in folder.glob("*/dataset_info.json")]
        if not versions:
            raise UserError(f"TFDS's {name} is not in {root}; {_how_to_get(name, root)}")
        self._folder = max(versions, key=_version)
        try:
            info = json.loads((self._folder / "dataset_info.json").read_text())
            self._sizes = {
                split["name"]: sum(int(length) for length in split["shardLengths"])
                for split in info["splits"]
            }
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged("dataset_info.json", error) from error
        if info.get("fileFormat") != "array_record":
            raise UserError(
                f"{self._folder} is in the form {info.get('fileFormat', 'tfrecord')}, which only "
                f"TensorFlow reads; {_how_to_get(name, root)}"
            )

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of examples of each named split."""
        return self._sizes

    def read(self, split: str, start: int, stop: int) -> Split:
        """Decodes the examples [start, stop) of a named split.

        Raises:
          UserError: a file is missing or damaged, or the set is not one of labelled images of one
            size.
        """
        import tensorflow_datasets as tfds

        builder = self._builder()
        features: Any = builder.info.features
        # Decoded below instead: TFDS warns about OpenCV, and is a little slower.
        decoders = {"image": tfds.decode.SkipDecoding()}
        images, labels = None, np.empty(stop - start, np.int32)
        try:
            records = builder.as_data_source(split=split, decoders=decoders)
            for first in range(start, stop, _CHUNK):
                indices = range(first, min(first + _CHUNK, stop))
                for i, record in zip(indices, records.__getitems__(indices), strict=True):
                    image = _decode(record["image"])
                    if images is None:
                        images = np.empty((stop - start, *image.shape), np.uint8)
                    if image.shape != images.shape[1:]:
                        raise UserError(
                            f"the images of TFDS's {self._name} differ in size "
                            f"({image.shape[:2]} and {images.shape[1:3]}); only sets whose images "
                            f"all have one size can be loaded."
                        )
                    images[i - start] = image
                    labels[i - start] = record["label"]
        except (OSError, ValueError, RuntimeError, IndexError) as error:
            raise self._damaged(f"split {split}", error) from error
        assert images is not None  # parse_split refuses empty ranges
        mean, std = _STATISTICS.get(self._name, (IMAGENET_MEAN, IMAGENET_STD))
        return Split(images, labels, tuple(features["label"].names), mean, std)

    def _builder(self) -> Any:
        """TFDS's reader of the folder, after a look at what the set holds."""
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder_from_directory(self._folder)
            features: Any = builder.info.features
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise self._damaged("features.json", error) from error
        if not (
            isinstance(features, tfds.features.FeaturesDict)
            and isinstance(dict(features).get("image"), tfds.features.Image)
            and isinstance(dict(features).get("label"), tfds.features.ClassLabel)
        ):
            raise UserError(
                f"TFDS's {self._name} does not classify images: it has no features "
                f"'image' and 'label'; use a set such as cifar100."
            )
        return builder

    def _damaged(self, what: str, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:200]
        return UserError(
            f"{self._folder} is damaged ({what}: {reason}); delete it and prepare it again."
        )


def _decode(encoded: bytes) -> np.ndarray:
    """PNG or JPEG bytes -> uint8 [H, W, 3]."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.split(".") if part.isdigit())


def _how_to_get(name: str, root: str) -> str:
    # Decoding needs no TensorFlow, but TFDS encodes with it.
    return (
        f"prepare it (needs the network) with: pip install tensorflow && "
        f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, '
        f"data_dir={root!r}, file_format='array_record').download_and_prepare()\""
    )
