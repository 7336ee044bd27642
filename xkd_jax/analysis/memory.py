"""What a run takes of each device's memory, told before its first step."""

import math
from typing import Any

import jax

from xkd_jax.errors import UserError

GIB = 2**30


def parts(state: Any, teacher: Any, resident: Any) -> dict[str, int]:
    """Bytes on each device of the arrays that persist from step to step, by name.

    Args:
      state: a `TrainState` of arrays, or of shapes with their shardings, as are the following.
      teacher: the teacher's variables.
      resident: the training split, if it is stored on the devices.
    """
    groups = {
        "teacher": teacher,
        "student": (state.params["student"], state.batch_stats, state.ema),
        "method": (state.params["method"], state.method_state, state.params["adversary"]),
        "optimizer": state.opt_state,
        "data": resident,
    }
    return {name: sum(map(_share, jax.tree.leaves(tree))) for name, tree in groups.items()}


def _share(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def temporaries(compiled: jax.stages.Compiled) -> int:
    """Bytes that a step needs while it runs: activations, gradients, results beside old ones."""
    memory: Any = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def describe(sizes: dict[str, int], limit: int | None) -> str:
    """One line about bytes by name, after a look at whether they fit into `limit`.

    Raises:
      UserError: they don't.
    """
    total = sum(sizes.values())
    if limit and total > limit:
        raise too_large(f"a step takes {total / GIB:.1f} GiB of a device's {limit / GIB:.1f} GiB")
    of_limit = f" of {limit / GIB:.1f}" if limit else ""
    each = ", ".join(f"{name} {size / GIB:.3f}" for name, size in sizes.items())
    return f"memory of each device, GiB: {each}; together {total / GIB:.2f}{of_limit}."


def device_limit() -> int | None:
    """The bytes of a device's memory, where it tells."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def too_large(what: str) -> UserError:
    """The error for a step that doesn't fit, with the three things to change."""
    return UserError(
        f"{what}; take a smaller batch_size or more parts with accumulate, remat=True or "
        "mesh.student='fsdp', or mesh.teacher='fsdp'."
    )
