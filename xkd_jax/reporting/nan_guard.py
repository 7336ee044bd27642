"""Numbers that are not finite: which parameters have them, at which step, from which examples."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from xkd_jax.data.loader import Order
from xkd_jax.distributed import processes
from xkd_jax.errors import UserError
from xkd_jax.weights import write_file

FLAGS = "finite"  # the metric in which a step tells of each gradient whether it is finite
REPORT = "not_finite.json"
ADVICE = "lower optimizer.learning_rate or set optimizer.clip_norm (say 2.0)."


def flags(tree: Any) -> jax.Array:
    """Of each leaf, whether all its numbers are finite; bool [leaves]."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])


def names(tree: Any) -> list[str]:
    """Of each leaf, such as "student/conv1/kernel", in the order of `flags`."""
    paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def listed(items: Sequence[Any], count: int = 5) -> str:
    """The first `count` of `items`, and how many there are beyond them."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(map(str, items[:count])) + more


@dataclasses.dataclass(frozen=True)
class Guard:
    """Stops a run at the first step whose loss or gradients are not finite.

    Attributes:
      folder: the run's; `not_finite.json` is written there.
      parameters: what is trained, the names of the gradients.
      order: of the examples.
    """

    folder: Path
    parameters: Sequence[str]
    order: Order

    def check(self, step: int, metrics: dict[str, Any]) -> None:
        """Looks at a step's metrics, on the host.

        Raises:
          UserError: the loss is not a finite number, or a gradient holds one.
        """
        loss, good = float(metrics["loss"]), metrics[FLAGS]
        if math.isfinite(loss) and good.all():
            return
        wrong = [name for name, fine in zip(self.parameters, good, strict=True) if not fine]
        examples = self.order.indices(step - 1).tolist()
        report = {"step": step, "loss": str(loss), "gradients": wrong, "examples": examples}
        path = self.folder / REPORT
        if processes.is_first():
            write_file(path, (json.dumps(report) + "\n").encode())
        raise UserError(
            f"step {step} isn't finite: its loss is {loss}, its gradients fail at "
            f"{listed(wrong) or 'no parameter'}, its examples are {listed(examples, 8)} (all in "
            f"{path}); the checkpoints from before stay: {ADVICE}"
        )


def check_state(step: int, state: Any) -> None:
    """Looks at a state that is about to be saved.

    Methods' own states are left out: an infinity may stand there for what isn't known yet.

    Raises:
      UserError: a number in it is not finite.
    """
    floats = {
        name: leaf
        for name, leaf in zip(names(state), jax.tree.leaves(state), strict=True)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not name.startswith("method_state/")
    }
    good = jax.device_get(_flags(list(floats.values())))
    if not good.all():
        wrong = [name for name, fine in zip(floats, good, strict=True) if not fine]
        raise UserError(
            f"after step {step} {listed(wrong)} are not finite, and are not saved: {ADVICE}"
        )


_flags = jax.jit(flags)
