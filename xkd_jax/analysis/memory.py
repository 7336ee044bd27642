"""The memory that a run needs on each device, known before its first step."""

import math
from typing import Any

import jax

from xkd_jax.errors import UserError

GIB = 2**30


def parts(state: Any, teacher: Any, resident: Any) -> dict[str, int]:
    """Bytes per device of the arrays that persist from step to step, by name.

    Args:
      state: a `TrainState` of arrays, or of `jax.ShapeDtypeStruct`s with shardings; the same holds
        for the next two.
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
    """Bytes that a step needs temporarily: activations, gradients, outputs that aren't donated."""
    memory: Any = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def describe(sizes: dict[str, int], limit: int | None) -> str:
    """One line about memory by name, in GiB.

    Args:
      sizes: bytes by name.
      limit: bytes of a device's memory, if known.

    Raises:
      UserError: the sum exceeds `limit`.
    """
    total = sum(sizes.values())
    if limit and total > limit:
        raise too_large(
            f"a step needs {total / GIB:.1f} GiB, but a device has {limit / GIB:.1f} GiB"
        )
    of_limit = f" / {limit / GIB:.1f}" if limit else ""
    each = ", ".join(f"{name} {size / GIB:.3f}" for name, size in sizes.items())
    return f"Per-device memory (GiB): {each}; total {total / GIB:.2f}{of_limit}."


def device_limit() -> int | None:
    """The bytes of a device's memory, if it reports them."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def too_large(what: str) -> UserError:
    """The error for a step that doesn't fit, with the settings that save memory."""
    return UserError(
        f"{what}; decrease batch_size, increase accumulate, or set remat=True, "
        "mesh.student='fsdp' or mesh.teacher='fsdp'."
    )
