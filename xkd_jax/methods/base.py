"""The interface of a distillation method.

A method is a frozen dataclass: its fields are the options that `config.method.<name>` can set, its
methods are pure functions. It keeps nothing: what it trains and what it carries from step to step
live in the training state.
"""

import dataclasses
from typing import Any

import jax
from flax import linen as nn

Outputs = dict[str, Any]  # a network's `out`: see the README's table of keys
Tree = Any  # a pytree of arrays


def apply(module: nn.Module, variables: Tree, *args, **kwargs) -> Any:
    """`module.apply`, for a module with immutable variables: returns what the module returns."""
    return module.apply(variables, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method that adds nothing to the label term: plain supervised training.

    Attributes:
      multi_view: whether the student sees the multi-view generator's images (`views.multi_view`).
    """

    multi_view: bool = False

    # What the loop needs to know before it traces anything; not options.
    needs_teacher = False
    adversary_period = 0  # the adversary is updated when the clock is a multiple of it; 0: none
    adversary_clock = "step"  # or "epoch": at every step of such an epoch

    def check(self, teacher_out: Outputs, student_out: Outputs) -> None:
        """Raises a UserError if this teacher or student can't take part; outputs are shapes."""

    def init(self, key: jax.Array, teacher_out: Outputs, student_out: Outputs) -> tuple[Tree, Tree]:
        """What the method trains beside the student, and the state that it carries."""
        del key, teacher_out, student_out
        return {}, {}

    def loss(
        self,
        params: Tree,
        state: Tree,
        teacher_out: Outputs,
        student_out: Outputs,
        batch: dict[str, jax.Array],
        key: jax.Array,
        progress: jax.Array,
        adversary: Tree = None,
    ) -> tuple[jax.Array, Tree, dict[str, jax.Array]]:
        """The term that is added to the label term.

        Args:
          params: what the method trains.
          state: what it carries.
          teacher_out: the teacher's outputs, without gradient.
          student_out: the student's outputs.
          batch: `label` [N] and `index` [N], the examples' places in the data set.
          key: this step's key.
          progress: epochs trained so far, fractional.
          adversary: the adversary's parameters, without gradient.

        Returns:
          The loss (a float32 scalar), the new state, metrics by name.
        """
        del params, teacher_out, student_out, batch, key, progress, adversary
        return jax.numpy.zeros(()), state, {}

    def init_adversary(self, key: jax.Array, teacher_out: Outputs, student_out: Outputs) -> Tree:
        """The adversary's parameters."""
        del key, teacher_out, student_out
        return {}

    def adversary_loss(
        self,
        adversary: Tree,
        params: Tree,
        teacher_out: Outputs,
        student_out: Outputs,
        key: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The adversary's own loss and its metrics; only `adversary` receives a gradient."""
        raise TypeError(f"{type(self).__name__} has no adversary")
