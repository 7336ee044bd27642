"""The interface of a distillation method.

A method is a frozen dataclass: its fields are the options that `config.method.<name>` can set, its
methods are pure functions. It keeps nothing: what it trains and what it carries from step to step
live in the training state.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
from flax import linen as nn

from xkd_jax.errors import UserError

Outputs = dict[str, Any]  # a network's `out`: see the README's table of keys
Tree = Any  # a pytree of arrays


class PairError(UserError):
    """A method can't learn from this teacher, or with this student; the message says why."""


class MethodLoss(NamedTuple):
    """What `Method.loss` returns.

    Attributes:
      value: the term added to the label term, a float32 scalar.
      state: the method's new state.
      metrics: scalars by name.
      judged: what the adversary judges; handed to `Method.adversary_loss` without gradient.
    """

    value: jax.Array
    state: Tree
    metrics: dict[str, jax.Array]
    judged: Any = None


def apply(module: nn.Module, variables: Tree, *args, **kwargs) -> Any:
    """`module.apply`, for a module with immutable variables: returns what the module returns."""
    return module.apply(variables, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method that adds nothing to the label term: plain supervised training.

    Attributes:
      multi_view: whether the student sees the multi-view generator's images (`views.multi_view`).
      label_weight: of the label term, the cross-entropy, beside this method's own.
    """

    multi_view: bool = False
    label_weight: float = 1.0

    # What the loop needs to know before it traces anything; not options.
    needs_teacher = False
    # What the original authors set for ImageNet, where it differs from the defaults, which are
    # theirs for CIFAR-100.
    imagenet: ClassVar[Mapping[str, Any]] = {}
    adversary_period = 0  # the adversary is updated when the clock is a multiple of it; 0: none
    adversary_clock = "step"  # or "epoch": at every step of such an epoch

    @property
    def first_phase(self) -> float:
        """Epochs before the training proper in which the method works without the label term.

        They come on top of `config.epochs`, and `progress` is negative in them.
        """
        return 0

    def moves(self, progress: jax.Array) -> dict[str, Any]:
        """Which parameters are trained at this point; the others are frozen.

        Args:
          progress: as for `loss`.

        Returns:
          "student": a boolean, which may be traced; "method": a boolean, or a tree of booleans
          that is a prefix of the tree of the method's parameters.
        """
        del progress
        return {"student": True, "method": True}

    def label_logits(self, student_out: Outputs) -> jax.Array:
        """The logits [N, K] that the label term is about."""
        return student_out["logits"]

    def check(self, teacher_out: Outputs, student_out: Outputs) -> None:
        """Says whether this teacher and this student can take part; outputs are shapes.

        Raises:
          PairError: they can't, with this method.
          UserError: an option has a wrong value.
        """

    def init(
        self, key: jax.Array, teacher_out: Outputs, student_out: Outputs, labels: Any = ()
    ) -> tuple[Tree, Tree]:
        """What the method trains beside the student, and the state that it carries.

        Args:
          key: for random values.
          teacher_out: the teacher's outputs for one image, zeros.
          student_out: the student's.
          labels: of the training set, an array or the like [n].

        Returns:
          The parameters and the state. The arrays under a key `bank` anywhere in the state have
          a row for each example and are split over the devices.
        """
        del key, teacher_out, student_out, labels
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
    ) -> MethodLoss:
        """The term that is added to the label term.

        Args:
          params: what the method trains.
          state: what it carries.
          teacher_out: the teacher's outputs, without gradient.
          student_out: the student's outputs.
          batch: `label` [N] and `index` [N], the examples' places in the data set.
          key: this step's key.
          progress: epochs trained so far, fractional; negative in the first phase.
          adversary: the adversary's parameters, without gradient.
        """
        del params, teacher_out, student_out, batch, key, progress, adversary
        return MethodLoss(jax.numpy.zeros(()), state, {})

    def init_adversary(self, key: jax.Array, teacher_out: Outputs, student_out: Outputs) -> Tree:
        """The adversary's parameters."""
        del key, teacher_out, student_out
        return {}

    def adversary_loss(
        self, adversary: Tree, judged: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The adversary's own loss and its metrics.

        Args:
          adversary: its parameters, which alone receive a gradient.
          judged: from the `MethodLoss` of the same step.
        """
        raise TypeError(f"{type(self).__name__} has no adversary")


def weighted_sum(
    terms: dict[str, tuple[Any, jax.Array]], state: Tree, judged: Any = None
) -> MethodLoss:
    """The sum of `terms`, (weight, term) by name, each of them reported plain and weighted."""
    metrics = {name: value for name, (_, value) in terms.items()}
    metrics |= {f"{name}_weighted": weight * value for name, (weight, value) in terms.items()}
    total = sum((weight * value for weight, value in terms.values()), jax.numpy.zeros(()))
    return MethodLoss(total, state, metrics, judged)
