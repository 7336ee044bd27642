"""Detects non-finite losses, gradients and states; names the step, the parameters and examples."""

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

FLAGS = "finite"  # name of the metric that holds the `flags` of a step's gradients
REPORT = "not_finite.json"
ADVICE = "lower optimizer.learning_rate or set optimizer.clip_norm, for example to 2.0."


class Diverged(UserError):
    """Training can't continue: a loss, a gradient or a weight isn't finite.

    Attributes:
      folder: the run's, if it is known which of several it is.
    """

    def __init__(self, text: str, folder: Path | None = None):
        super().__init__(text)
        self.folder = folder


def flags(tree: Any) -> jax.Array:
    """Whether each leaf is entirely finite, bool [num_leaves]."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])


def names(tree: Any) -> list[str]:
    """The path of each leaf, such as "student/conv1/kernel", in the order of `flags`."""
    paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def listed(items: Sequence[Any], count: int = 5) -> str:
    """The first `count` of `items`, and how many more there are."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(map(str, items[:count])) + more


@dataclasses.dataclass(frozen=True)
class Guard:
    """Stops a run at the first step whose loss or gradients aren't finite.

    Attributes:
      folder: the run's folder, where `not_finite.json` is written.
      parameters: the trained parameters' names, in the order of `flags`.
      order: the order of the training examples.
    """

    folder: Path
    parameters: Sequence[str]
    order: Order

    def check(self, step: int, metrics: dict[str, Any]) -> None:
        """Checks a step's metrics, on the host.

        Raises:
          Diverged: the loss or a gradient isn't finite.
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
        raise Diverged(
            f"Non-finite values at step {step}: loss {loss}; gradients "
            f"{listed(wrong) or 'all finite'}; examples {listed(examples, 8)} (full list in "
            f"{path}); earlier checkpoints are kept: {ADVICE}",
            self.folder,
        )


def check_state(step: int, state: Any) -> None:
    """Checks a state that is about to be saved.

    The method's state is exempt: it may use infinity for values that aren't known yet.

    Raises:
      Diverged: it contains a non-finite value.
    """
    floats = {
        name: leaf
        for name, leaf in zip(names(state), jax.tree.leaves(state), strict=True)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not name.startswith("method_state/")
    }
    good = jax.device_get(_flags(list(floats.values())))
    if not good.all():
        wrong = [name for name, fine in zip(floats, good, strict=True) if not fine]
        raise Diverged(
            f"Non-finite values after step {step}: {listed(wrong)}; the checkpoint isn't saved: "
            f"{ADVICE}"
        )


_flags = jax.jit(flags)
