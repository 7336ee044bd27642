"""The exponential moving average of the student: what is evaluated and saved when it is on."""

from typing import Any

import jax
import jax.numpy as jnp


def init(variables: Any) -> Any:
    """The average before the first step: a copy, so that both can be donated.

    Args:
      variables: any tree of float arrays: `params` and `batch_stats`.
    """
    return jax.tree.map(jnp.copy, variables)


def update(
    average: Any, variables: Any, decay: float, step: jax.Array | int, warmup: bool = False
) -> Any:
    """The average after a step: `average + (1 - decay_t) (variables - average)`.

    `decay_t` is 0 at the first step, so that the random start leaves no trace, and `decay` from
    then on, as in timm's `ModelEmaV3` (Ross Wightman, Apache-2.0). With `warmup` it climbs, as
    there, as `1 - (1 + step)^(-2/3)` until it reaches `decay`: 0.9 after 31 steps, 0.999 after
    31,622; short runs gain.

    Args:
      average: from `init` or the step before.
      variables: what the step made; the same structure.
      decay: in [0, 1).
      step: how many steps came before this one.
      warmup: see above.
    """
    step = jnp.asarray(step, jnp.float32)
    decay_t = jnp.where(step > 0, decay, 0.0)
    if warmup:
        decay_t = jnp.minimum(decay, 1 - (1 + step) ** (-2 / 3))
    return jax.tree.map(lambda old, new: old + (1 - decay_t) * (new - old), average, variables)
