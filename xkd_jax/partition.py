"""The device mesh, and how arrays lie on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xkd_jax.errors import UserError


def create_mesh(data: int, model: int) -> Mesh:
    """A mesh with the axes `data` and `model`; -1 takes the devices that are left.

    Raises:
      UserError: the machine's devices can't be laid out so.
    """
    devices = jax.device_count()
    if data == -1 and model > 0 and devices % model == 0:
        data = devices // model
    if data < 1 or model < 1 or data * model != devices:
        raise UserError(
            f"mesh.data={data} times mesh.model={model} is not the {devices} device(s) here; "
            "set mesh.data=-1 to use all of them."
        )
    # Explicit axes, the default since JAX 0.9, refuse the reshapes of Linen's Transformers.
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is split over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays, the same in every process, to global arrays on the devices."""

    def put_array(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put_array, tree)
