"""The input pipeline: training batches from the devices' own memory or from the host's workers.

Both loaders yield the same examples in the same order, a pure function of the seed and the step:
nothing else is needed to resume, even in the middle of an epoch. The rest of `xkd_jax.data` doesn't
import JAX.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from xkd_jax.data.decode import decode_crop
from xkd_jax.data.detection_split import DetectionSplit, PaddedImages
from xkd_jax.data.encoded import EncodedImages
from xkd_jax.data.order import batch_indices, batch_views, view_generator
from xkd_jax.data.source import Examples, Split
from xkd_jax.distributed import sharding

Batch = dict[str, jax.Array]
_ENDLESS = 2**62  # examples; grain can't count up to int64's largest number in batches of one


def create_loader(
    split: Split,
    mesh: Mesh,
    order: "Order",
    crop_scale: tuple[float, float],
    workers: int,
    size: int = 0,
) -> "DeviceLoader | HostLoader":
    """The loader for a split: `HostLoader` if its images are encoded, else `DeviceLoader`."""
    if isinstance(split.images, EncodedImages):
        return HostLoader(split, mesh, order, crop_scale, workers, size)
    return DeviceLoader(split, mesh, order)


def batch_shapes(
    split: Split, mesh: Mesh, batch_size: int, size: int = 0, fixed: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """The loader's `batches`, as shapes with their shardings.

    Args:
      split: as for `create_loader`.
      mesh: as for `create_loader`.
      batch_size: the number of examples.
      size: as for `HostLoader`.
      fixed: whether the order has fixed views.
    """
    shapes = {"index": jax.ShapeDtypeStruct((batch_size,), np.int32)}
    if fixed:
        shapes["view"] = shapes["index"]
    if isinstance(split.images, EncodedImages):
        side = size or split.images.shape[1]
        shapes["image"] = jax.ShapeDtypeStruct((batch_size, side, side, 3), np.uint8)
        shapes["label"] = shapes["index"]
    return sharding.shaped(shapes, sharding.over_batch(mesh))


def resident_shapes(split: Split | DetectionSplit, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The loader's `arrays`, as shapes with their shardings; empty if they stay on the host."""
    if isinstance(split.images, EncodedImages | PaddedImages):
        return {}
    count, *shape = split.images.shape
    count += -count % mesh.shape["data"]
    shapes = {
        "image": jax.ShapeDtypeStruct((count, *shape), np.uint8),
        "label": jax.ShapeDtypeStruct((count,), np.int32),
    }
    return sharding.shaped(shapes, sharding.over_batch(mesh))


@dataclasses.dataclass(frozen=True)
class Order:
    """Which examples a step sees: the arguments of `batch_indices` except the step.

    `views` is the number of fixed views of every example, see `augment.fixed`; 0: a new view every
    time.
    """

    num_examples: int
    batch_size: int
    seed: int
    repeats: int = 1
    views: int = 0

    def indices(self, step: int) -> np.ndarray:
        """int32 [batch_size]."""
        return batch_indices(self.num_examples, self.batch_size, self.seed, step, self.repeats)

    def view(self, step: int) -> np.ndarray:
        """The fixed view of each example, int32 [batch_size]."""
        return batch_views(self.num_examples, self.batch_size, step, self.repeats, self.views)

    def generator(self, step: int, place: int) -> np.random.Generator:
        """The random numbers of the example at a place in a batch."""
        # A stream for every example that the run ever sees, whichever worker has its turn; the
        # high bit keeps clear of the streams that the order comes from.
        number = step * self.batch_size + place
        key = np.array([self.seed, 2**63 + number], np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


class DeviceLoader:
    """The whole split is stored on the devices as uint8; a batch is the indices of its examples.

    Attributes:
      arrays: `image` [n, H, W, 3] and `label` [n], sharded over the mesh's `data` axis; n is padded
        to a multiple of the axis with examples that no index points to.
    """

    def __init__(self, split: Split, mesh: Mesh, order: Order):
        """Copies the split to the devices."""
        self._order = order
        self._sharding = sharding.over_batch(mesh)
        padding = -len(split) % mesh.shape["data"]
        rows = np.minimum(np.arange(len(split) + padding), len(split) - 1)
        arrays = {"image": split.images, "label": split.labels}
        if padding:
            arrays = {name: array[rows] for name, array in arrays.items()}
        self.arrays = sharding.put(arrays, self._sharding)

    def batches(self, start: int) -> Iterator[Batch]:
        """The batches of the steps from `start` on: `index` [N] and, if fixed, `view` [N]."""
        for step in itertools.count(start):
            yield sharding.put(self._read(step), self._sharding)

    def stack(self, steps: range, size: int) -> Batch:
        """The batches of `steps`, counted from 0, as [size, N]; what is left of `size` is zero."""
        rows = [self._read(step) for step in steps]
        empty = jax.tree.map(np.zeros_like, rows[0])
        rows += [empty] * (size - len(rows))
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
        return sharding.put(stacked, sharding.behind(self._sharding))

    def _read(self, step: int) -> dict[str, np.ndarray]:
        batch = {"index": self._order.indices(step)}
        if self._order.views:
            batch["view"] = self._order.view(step)
        return batch


class HostLoader:
    """Workers decode and crop; uint8 batches are copied to the devices during the previous step.

    Attributes:
      arrays: empty.
    """

    def __init__(
        self,
        split: Split,
        mesh: Mesh,
        order: Order,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        workers: int = 0,
        size: int = 0,
    ):
        """Nothing is read yet.

        Args:
          split: with `EncodedImages`.
          mesh: where batches go.
          order: of the examples.
          crop_scale: the share of an image's area that a crop takes, at least and at most.
          workers: processes that decode; 0 decodes in threads of this one.
          size: side of the crops, pixels; 0: the size of the split's images.
        """
        assert isinstance(split.images, EncodedImages)
        self.arrays: dict[str, jax.Array] = {}
        self._sharding, self._workers = sharding.over_batch(mesh), workers
        size = size or split.images.shape[1]
        self._load = _Load(split.images.examples, size, crop_scale, order)

    def batches(self, start: int) -> Iterator[Batch]:
        """The batches of the steps from `start` on: `image` [N, H, W, 3], `label`, `index` [N].

        With fixed views, also `view` [N].
        """
        return read_batches(
            self._load, self._load.order.batch_size, self._sharding, self._workers, start
        )


def read_batches(
    load: Callable[[int, int], dict[str, np.ndarray]],
    batch_size: int,
    place: NamedSharding,
    workers: int,
    start: int,
) -> Iterator[Batch]:
    """Batches that grain's workers read; each is copied to the devices during the previous step.

    Args:
      load: from a step and a place in its batch to the example; picklable.
      batch_size: the examples of a batch, of which this process reads its share.
      place: the sharding of the batches.
      workers: processes that read; 0 reads in threads of this one.
      start: the first step.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's workers ask for its flags, in a notebook too
        flags.FLAGS.mark_as_parsed()
    local = batch_size // jax.process_count()
    first = jax.process_index() * local
    positions = grain.MapDataset.range(start * local, _ENDLESS)
    # An element is a batch here: grain's own 16 threads and 500 elements would hold gigabytes.
    threads = os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = positions.map(_AtPosition(load, local, first)).batch(local).to_iter_dataset(options)
    if workers:
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options)
    ahead: Batch | None = None
    for examples in dataset:
        batch = {
            name: jax.make_array_from_process_local_data(place, array)
            for name, array in examples.items()
        }
        if ahead is not None:
            yield ahead
        ahead = batch


@dataclasses.dataclass(frozen=True)
class _AtPosition:
    """From a position in this process's sequence of examples to what `load` makes of it."""

    load: Callable[[int, int], dict[str, np.ndarray]]
    local: int
    first: int

    def __call__(self, position: int) -> dict[str, np.ndarray]:
        step, place = divmod(position, self.local)
        return self.load(step, self.first + place)


@dataclasses.dataclass(frozen=True)
class _Load:
    """From a step and a place in its batch to the example, cropped at random."""

    examples: Examples
    size: int
    crop_scale: tuple[float, float]
    order: Order

    def __call__(self, step: int, place: int) -> dict[str, np.ndarray]:
        index = int(self.order.indices(step)[place])
        rng = self.order.generator(step, place)
        example: dict[str, np.ndarray] = {}
        if self.order.views:
            example["view"] = self.order.view(step)[place]
            rng = view_generator(int(example["view"]), index)
        image, label, name = self.examples[index]
        return example | {
            "image": decode_crop(image, rng, self.size, self.crop_scale, name=name),
            "label": np.asarray(label, np.int32),
            "index": np.asarray(index, np.int32),
        }
