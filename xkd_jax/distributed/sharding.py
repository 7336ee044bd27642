"""The device mesh and the shardings of arrays."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Minimum number of elements of a sharded leaf: smaller ones aren't worth a collective.
SPLIT_FROM = 2**18
# Bytes above which "auto" shards a teacher: an eighth of the smallest chip's memory, 16 GiB.
# Gathering ViT-L, 1.1 GiB, in every step would cost 7% of the speed (docs/scaling.md).
AUTO_SPLIT = 2**31


def create_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with one axis, `data`.

    Args:
      devices: the devices to use; all of `jax.devices()` if not given.
    """
    devices = jax.devices() if devices is None else devices
    # Explicit axes, the default since JAX 0.9, don't support the reshapes of Linen's Transformers.
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def split_large(mesh: Mesh, tree: Any) -> Any:
    """The shardings of weights under FSDP (arXiv:2304.11277).

    Each leaf of at least `SPLIT_FROM` elements is split over `data` along its longest divisible
    axis; the rest is replicated.

    Args:
      mesh: the devices.
      tree: arrays or shapes.
    """
    shares = mesh.shape["data"]

    def place(leaf: Any) -> NamedSharding:
        axes = [axis for axis, length in enumerate(leaf.shape) if length % shares == 0]
        if leaf.size < SPLIT_FROM or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "data"))

    return jax.tree.map(place, tree)


@dataclasses.dataclass(frozen=True)
class Shardings:
    """The shardings of a step's inputs.

    Attributes:
      state: a `TrainState` of shardings.
      teacher: shardings in the structure of the teacher's variables.
      batch: the sharding of arrays whose first axis is the batch.
    """

    state: Any
    teacher: Any
    batch: NamedSharding


def of_teacher(mesh: Mesh, variables: Any, rule: str) -> Any:
    """The shardings of the frozen teacher.

    Args:
      mesh: the devices.
      variables: arrays or shapes.
      rule: `config.mesh.teacher`: "replicated"; "fsdp", see `split_large`; or "auto", which is
        "fsdp" for teachers of more than `AUTO_SPLIT` bytes.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
    if rule == "fsdp" or (rule == "auto" and size > AUTO_SPLIT):
        return split_large(mesh, variables)
    return jax.tree.map(lambda _: replicated(mesh), variables)


def of_state(mesh: Mesh, state: Any, student_rule: str) -> Any:
    """The shardings of a `TrainState`: replicated, except for memory banks and an FSDP student.

    Args:
      mesh: the devices.
      state: a `TrainState` of arrays or shapes. Arrays under a key `bank` have a row for each
        example and are split over `data`.
      student_rule: `config.mesh.student`: "replicated"; or "fsdp", which shards the student's
        weights, optimizer state and moving average, see `split_large`.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        if "bank" in names:
            return over_batch(mesh)
        of_student = names[0] == "ema" or names[:2] in (
            ["params", "student"],
            ["opt_state", "student"],
        )
        split = student_rule == "fsdp" and of_student
        return split_large(mesh, leaf) if split else replicated(mesh)

    return jax.tree.map_with_path(place, state)


def shaped(tree: Any, shardings: Any) -> Any:
    """`jax.ShapeDtypeStruct`s with shardings, for ahead-of-time compilation.

    Args:
      tree: a tree of arrays or shapes.
      shardings: one sharding for all leaves, or a tree of them.
    """
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        jax.tree.broadcast(shardings, tree),
    )


def behind(sharding: NamedSharding) -> NamedSharding:
    """The sharding of arrays with another, unsharded axis in front."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


def stacked(tree: Any, size: int) -> Any:
    """The shapes, with shardings, of `size` of these stacked along a new first axis."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (size, *leaf.shape), leaf.dtype, sharding=behind(leaf.sharding)
        ),
        tree,
    )


def shardings(tree: Any) -> Any:
    """The sharding of every leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def is_replicated(shardings: Any) -> bool:
    """Whether every leaf is fully replicated."""
    return all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings))


def take(mesh: Mesh, tree: Any, indices: jax.Array) -> Any:
    """Inside `jit`: `array[indices]` for arrays and indices that are split over `data`.

    Each row is sent once, in its own dtype, to the device that needs it (all-to-all). By default
    XLA would all-reduce the whole batch to every device, with uint8 converted to 32 bits.

    Args:
      mesh: the devices.
      tree: numeric arrays [n, ...].
      indices: row indices, int32 [N].

    Returns:
      The tree with arrays [N, ...].
    """
    devices = mesh.shape["data"]
    if devices == 1:
        return jax.tree.map(lambda array: array[indices], tree)

    def exchange(tree: Any, indices: jax.Array) -> Any:
        wanted = jax.lax.all_gather(indices, "data", tiled=True)

        def of_array(rows: jax.Array) -> jax.Array:
            at = wanted - jax.lax.axis_index("data") * len(rows)
            here = ((at >= 0) & (at < len(rows))).reshape(-1, *[1] * (rows.ndim - 1))
            found = jnp.where(here, rows[jnp.clip(at, 0, len(rows) - 1)], 0)
            found = jax.lax.all_to_all(found, "data", 0, 0, tiled=True)
            # For each row, all devices but one have sent zeros.
            return jnp.sum(found.reshape(devices, -1, *rows.shape[1:]), 0, dtype=rows.dtype)

        return jax.tree.map(of_array, tree)

    spec = PartitionSpec("data")
    return jax.shard_map(exchange, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(tree, indices)


def gather(mesh: Mesh, tree: Any) -> Any:
    """Inside `jit`: all-gathers weights that may be sharded.

    Without it XLA may keep the weights sharded and move activations instead.
    """
    if mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


@dataclasses.dataclass(frozen=True)
class BlockGather:
    """Gathers a network's sharded parameters one block at a time (`xkd_jax.models.scan.Gather`).

    Inside `jit`: a scan over blocks then holds at most one period of unsharded blocks at a time.

    Attributes:
      params: the network's sharded parameters.
      shardings: the sharding of every leaf of `params`.
    """

    params: Any
    shardings: Any

    def stack(self, paths: Sequence[tuple[str, ...]]) -> Any:
        """Stacks the parameters at `paths`, identical trees; each leaf keeps its sharding."""

        def stack_leaves(sharding: NamedSharding, *leaves: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(jnp.stack(leaves), behind(sharding))

        trees = [functools.reduce(operator.getitem, path, self.params) for path in paths]
        shardings = functools.reduce(operator.getitem, paths[0], self.shardings)
        return jax.tree.map(stack_leaves, shardings, *trees)

    def whole(self, params: Any) -> Any:
        """All-gathers a slice of a stack."""
        return gather(jax.tree.leaves(self.shardings)[0].mesh, params)


def to_host(tree: Any, mesh: Mesh) -> Any:
    """Copies global arrays with any sharding to complete host arrays in every process."""
    if not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        tree = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
    return jax.device_get(tree)


def local_rows(tree: Any) -> tuple[np.ndarray, Any]:
    """This process's rows of arrays that are split over their first axis.

    Args:
      tree: arrays [N, ...] with the sharding `over_batch`.

    Returns:
      The rows' indices, int64 [n], and a tree of host arrays [n, ...].
    """

    def shards(array: jax.Array) -> list[tuple[int, np.ndarray]]:
        found = [(x.index[0].start or 0, np.asarray(x.data)) for x in array.addressable_shards]
        return sorted(found, key=operator.itemgetter(0))

    first = shards(jax.tree.leaves(tree)[0])
    indices = np.concatenate([start + np.arange(len(rows)) for start, rows in first])
    return indices, jax.tree.map(lambda x: np.concatenate([rows for _, rows in shards(x)]), tree)


def put(tree: Any, shardings: Any) -> Any:
    """Copies host arrays, the same in every process, to global arrays on the devices.

    Args:
      tree: a tree of arrays.
      shardings: one sharding for all leaves, or a tree of them.
    """

    def put_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put_array, tree, jax.tree.broadcast(shardings, tree))


def put_rows(array: Any, rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """`array[rows]` as a global array; each process only reads the rows of its own devices.

    Args:
      array: [n, ...], in memory or `EncodedImages`; the same in every process.
      rows: row indices, int [N].
      sharding: sharding of the result, over its first axis.
    """

    def read(index: Any) -> np.ndarray:
        return array[rows[index[0]]]

    return jax.make_array_from_callback((len(rows), *array.shape[1:]), sharding, read)
