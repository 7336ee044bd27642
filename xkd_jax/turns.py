"""Which parts of the training state are updated in a step."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from xkd_jax.state import TrainState

if TYPE_CHECKING:
    from xkd_jax.distiller import Distiller


def moves(distiller: "Distiller", state: TrainState, grads: dict[str, Any]) -> dict[str, Any]:
    """Which parts are updated in this step; the rest is frozen: no weight decay, no momentum.

    Args:
      distiller: everything that is constant.
      state: the state before the step.
      grads: gradients by part.

    Returns:
      For "student", "method", "adversary" and "batch_stats", the `moves` argument of
      `optim.select`.
    """
    method, progress = distiller.method, epochs(distiller, state)
    moving = dict(method.moves(progress))
    moving["batch_stats"] = moving["student"]
    if method.first_phase:
        # Layers that the first phase's loss doesn't reach: weight decay alone would shrink them.
        moving["student"] = jax.tree.map(
            lambda g: moving["batch_stats"] & ((progress >= 0) | jnp.any(g != 0)), grads["student"]
        )
    frozen = distiller.task.frozen(distiller.student, grads["student"])
    if frozen is not None:
        moving["student"] = jax.tree.map(
            lambda still, move: move & (not still),
            frozen, jax.tree.broadcast(moving["student"], frozen),
        )  # fmt: skip
    moving["adversary"] = adversarys_turn(distiller, state)
    return moving


def epochs(distiller: "Distiller", state: TrainState) -> jax.Array:
    """Fractional epochs since the main phase began; negative in the method's first phase."""
    return state.step / distiller.steps_per_epoch - distiller.method.first_phase


def adversarys_turn(distiller: "Distiller", state: TrainState) -> Any:
    """Whether the adversary is updated in this step."""
    method, clock = distiller.method, state.step
    if method.adversary_period <= 1:
        return method.adversary_period == 1
    if method.adversary_clock == "epoch":
        clock = state.step // distiller.steps_per_epoch
    return clock % method.adversary_period == 0
