"""The device mesh, and how arrays lie on it."""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xkd_jax.errors import UserError

# Elements from which on a leaf is split: below, a share is less than a collective is worth.
SPLIT_FROM = 2**18
# Bytes from which on a teacher is split by "auto": an eighth of the smallest chip's memory, 16 GiB.
# Gathering ViT-L, 1.1 GiB, at every step would take 7% of the speed (docs/scaling.md).
AUTO_SPLIT = 2**31


def create_mesh(data: int, model: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `data` and `model`; -1 takes the devices that are left.

    Args:
      data: devices along `data`.
      model: devices along `model`.
      devices: to take instead of this machine's.

    Raises:
      UserError: the machine's devices can't be laid out so.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1 and model > 0 and len(devices) % model == 0:
        data = len(devices) // model
    if data < 1 or model < 1 or data * model != len(devices):
        raise UserError(
            f"mesh.data={data} times mesh.model={model} is not the {len(devices)} device(s) here; "
            "set mesh.data=-1 to use all of them."
        )
    # Explicit axes, the default since JAX 0.9, refuse the reshapes of Linen's Transformers.
    return jax.make_mesh((data, model), ("data", "model"), (AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def split_large(mesh: Mesh, tree: Any) -> Any:
    """How weights lie on the mesh when each device keeps a share of them (FSDP, arXiv:2304.11277).

    Each leaf of at least `SPLIT_FROM` elements is split over `data` along its longest axis that
    divides; the rest is replicated.

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


def of_teacher(mesh: Mesh, variables: Any, rule: str) -> Any:
    """How the frozen teacher lies on the mesh.

    Args:
      mesh: the devices.
      variables: arrays or shapes.
      rule: `config.mesh.teacher`: "replicated"; "fsdp", which is `split_large`; or "auto", "fsdp"
        for a teacher of more than `AUTO_SPLIT` bytes.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
    if rule == "fsdp" or (rule == "auto" and size > AUTO_SPLIT):
        return split_large(mesh, variables)
    return jax.tree.map(lambda _: replicated(mesh), variables)


def of_state(mesh: Mesh, state: Any, split: Sequence[str] = ()) -> Any:
    """How a training state lies on the mesh: replicated, but for the rows of memory banks.

    Args:
      mesh: the devices.
      state: arrays or shapes; what lies under a key `bank` has a row for each example.
      split: names of its fields that `split_large` lays out.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        if "bank" in names:
            return over_batch(mesh)
        return split_large(mesh, leaf) if names[0] in split else replicated(mesh)

    return jax.tree.map_with_path(place, state)


def shaped(tree: Any, shardings: Any) -> Any:
    """Shapes with their shardings, to compile for: of arrays or shapes, and one or a tree."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        jax.tree.broadcast(shardings, tree),
    )


def shardings(tree: Any) -> Any:
    """Those of arrays, or of shapes from `shaped`."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def take(mesh: Mesh, tree: Any, indices: jax.Array) -> Any:
    """Inside `jit`: rows of arrays that are split over `data`, for a batch that is.

    Each row travels once, as it is, from the device that holds it to the one that wants it. Left
    to itself, XLA sums the whole batch on every device, uint8 in 32 bits.

    Args:
      mesh: the devices.
      tree: arrays [n, ...] of numbers.
      indices: int32 [N], of rows.

    Returns:
      the tree with arrays [N, ...].
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
            # All but one device sent zeros for each.
            return jnp.sum(found.reshape(devices, -1, *rows.shape[1:]), 0, dtype=rows.dtype)

        return jax.tree.map(of_array, tree)

    spec = PartitionSpec("data")
    return jax.shard_map(exchange, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(tree, indices)


def gather(mesh: Mesh, tree: Any) -> Any:
    """Inside `jit`: the whole of weights that may be split, on every device.

    Without it XLA may leave split weights where they are and move the activations instead.
    """
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


@dataclasses.dataclass(frozen=True)
class BlockGather:
    """Gathers a network's sharded parameters one block at a time (`xkd_jax.models.scan.Gather`).

    Inside `jit`: a scan over blocks then holds no more than one period of whole blocks at a time.

    Attributes:
      params: the network's parameters, as they are sharded.
      shardings: the sharding of every leaf of `params`.
    """

    params: Any
    shardings: Any

    def stack(self, paths: Sequence[tuple[str, ...]]) -> Any:
        """The parameters at `paths`, identical trees, stacked; each leaf keeps its sharding."""

        def stack_leaves(sharding: NamedSharding, *leaves: jax.Array) -> jax.Array:
            stacked = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
            return jax.lax.with_sharding_constraint(jnp.stack(leaves), stacked)

        trees = [functools.reduce(operator.getitem, path, self.params) for path in paths]
        shardings = functools.reduce(operator.getitem, paths[0], self.shardings)
        return jax.tree.map(stack_leaves, shardings, *trees)

    def whole(self, params: Any) -> Any:
        """A slice of a stack, gathered onto every device."""
        return gather(jax.tree.leaves(self.shardings)[0].mesh, params)


def to_host(tree: Any, mesh: Mesh) -> Any:
    """Global arrays, split in whatever way, to host arrays, whole in every process."""
    if not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        tree = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(tree)
    return jax.device_get(tree)


def put(tree: Any, shardings: Any) -> Any:
    """Host arrays, the same in every process, to global arrays on the devices.

    Args:
      tree: of arrays.
      shardings: one for all, or a tree of them.
    """

    def put_array(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put_array, tree, jax.tree.broadcast(shardings, tree))


def put_rows(array: Any, rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """`array[rows]` as a global array; each process reads just what its own devices hold.

    Args:
      array: [n, ...], in memory or `EncodedImages`; the same in every process.
      rows: int [N].
      sharding: of the result, over its first axis.
    """

    def read(index: Any) -> np.ndarray:
        return array[rows[index[0]]]

    return jax.make_array_from_callback((len(rows), *array.shape[1:]), sharding, read)
