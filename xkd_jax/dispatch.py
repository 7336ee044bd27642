"""Several training steps in one program (`config.steps_per_dispatch`).

Starting a program costs the host up to a millisecond. An accelerator that computes a step faster
than that waits; a program that loops over several steps keeps it busy. On a CPU it is the other way
round: XLA compiles convolutions inside a loop without its fast kernels, which makes the
quickstart's plain step nine times slower.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xkd_jax import backend
from xkd_jax.distributed import sharding
from xkd_jax.errors import UserError

# step(state, teacher_variables, resident, batch) -> new state, metrics
Step = Callable[[Any, Any, Any, Any], tuple[Any, Any]]

# FLOPs below which a step takes an accelerator about as long as starting it: a millisecond at 200
# TFLOP/s, which networks for small images reach at most.
_SMALL = 2e11
_MOST = 64  # steps: for as long, a signal to stop has to wait


def check(steps: int, resident: bool, cached: bool) -> None:
    """Checks `config.steps_per_dispatch`.

    Args:
      steps: the config's.
      resident: whether the training images are on the devices.
      cached: whether the teacher's outputs are read from its cache.

    Raises:
      UserError: it is above 1, but something comes from the host in every step.
    """
    if steps > 1 and cached:
        raise UserError(
            f"steps_per_dispatch={steps} doesn't work with teacher.cache, which is read for every "
            "step; set one of them to its default."
        )
    if steps > 1 and not resident:
        raise UserError(
            f"steps_per_dispatch={steps} needs images on the devices, but these come from the "
            'host; set data.feed="resident" if they fit, or steps_per_dispatch=1.'
        )


def choose(steps: int, fed: bool, flops: Callable[[], float]) -> int:
    """The number of steps per dispatch.

    Args:
      steps: `config.steps_per_dispatch`; 0: 1 on a CPU, otherwise as many as add up to `_SMALL`.
      fed: whether every step needs something from the host.
      flops: gives the FLOPs of a step on one device.
    """
    if steps or fed or backend.current() == "cpu":
        return max(steps, 1)
    return max(1, min(_MOST, round(_SMALL / flops())))


def prepare(step: Step, batch: Any, size: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function to compile for `size` steps, and the shapes of its arguments after the data.

    Args:
      step: of one batch.
      batch: its shapes, with shardings.
      size: 1 for `step` itself, otherwise the function is `repeat`'s.
    """
    if size == 1:
        return step, (batch,)
    count = jax.ShapeDtypeStruct((), np.int32)
    return repeat(step, size), (sharding.stacked(batch, size), count)


def repeat(step: Step, size: int) -> Callable[..., tuple[Any, Any]]:
    """A function that takes up to `size` steps in one loop.

    Its arguments are those of `step`, but with the batches of `size` steps, [size, ...], and then
    the number of steps to take. Its metrics have one entry for each step; those of steps that it
    doesn't take are zero.
    """

    def several(state: Any, teacher: Any, resident: Any, batches: Any, count: Any) -> Any:
        def at(i: Any) -> Any:
            return jax.tree.map(lambda array: array[i], batches)

        shapes = jax.eval_shape(step, state, teacher, resident, at(0))[1]
        metrics = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), shapes)

        def body(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            state, new = step(carry[0], teacher, resident, at(i))
            return state, jax.tree.map(lambda all, one: all.at[i].set(one), carry[1], new)

        return jax.lax.fori_loop(0, count, body, (state, metrics))

    return several
