"""The interface of a distillation method.

A method is a frozen dataclass: its fields are the options that `config.method.<name>` can set, and
its methods are pure functions. Its parameters, and the state that it carries from step to step, are
part of the training state.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
from flax import linen as nn

from xkd_jax.errors import UserError

# A network's `out`, see docs/interfaces.md, and `side`, of its images in pixels.
Outputs = dict[str, Any]
Tree = Any  # a pytree of arrays


class PairError(UserError):
    """The method does not support this teacher or this student; the message says why."""


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
    """`module.apply`, whose return type depends on its arguments, typed as Any."""
    return module.apply(variables, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method that adds nothing to the label term: plain supervised training.

    Attributes:
      multi_view: whether the student sees the views of `multiview.multi_view`.
      label_weight: weight of the label term, the cross-entropy that is added to this method's loss.
    """

    multi_view: bool = False
    label_weight: float = 1.0

    # Static properties that the training loop reads before tracing; not options.
    needs_teacher = False
    hard_labels = False  # whether the loss needs one class per image: no mixup, no CutMix
    detection = False  # whether the method can teach detectors, see `tasks.detection`
    # The original authors' ImageNet settings, where they differ from the defaults, which are their
    # CIFAR-100 settings.
    imagenet: ClassVar[Mapping[str, Any]] = {}
    # Whether a CNN teacher's batch normalisation uses the batch's statistics, as in training; the
    # running ones stay unchanged.
    teacher_batch_stats = False
    # What the learning rate of the method's parameters is multiplied by: a number, or a tree of
    # numbers that is a prefix of the tree of the parameters.
    rates: ClassVar[Any] = 1.0
    adversary_period = 0  # the adversary is updated when the clock is a multiple; 0: no adversary
    adversary_clock = "step"  # or "epoch": at every step of such an epoch

    @property
    def first_phase(self) -> float:
        """The number of initial epochs without the label term.

        They are added to `config.epochs`, and `progress` is negative during them.
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
        """The logits [N, K] that the label term is computed from."""
        return student_out["logits"]

    def check(self, teacher_out: Outputs, student_out: Outputs) -> None:
        """Checks this teacher, this student and the options; the outputs may be shapes.

        Raises:
          PairError: the method does not support this teacher or this student.
          UserError: an option has an invalid value.
        """

    def describe(self, teacher_out: Outputs, student_out: Outputs) -> str:
        """How the method applies to this pair, in one line for the user; "" if that is obvious.

        The arguments are those of `check`, which has passed.
        """
        del teacher_out, student_out
        return ""

    def init(
        self, key: jax.Array, teacher_out: Outputs, student_out: Outputs, labels: Any = ()
    ) -> tuple[Tree, Tree]:
        """The method's own parameters and its initial state.

        Args:
          key: for random initialisation.
          teacher_out: the teacher's outputs for one image; zeros.
          student_out: the student's outputs for one image; zeros.
          labels: the training set's labels, array-like [n].

        Returns:
          The parameters and the state. Arrays under a key `bank` anywhere in the state have one
          row per example and are sharded over the devices.
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
          params: the method's parameters.
          state: the method's state.
          teacher_out: the teacher's outputs, without gradient.
          student_out: the student's outputs.
          batch: `label` [N] and `index` [N], the examples' indices in the training set.
          key: this step's key.
          progress: epochs trained so far, fractional; negative in the first phase.
          adversary: the adversary's parameters, without gradient.
        """
        del params, teacher_out, student_out, batch, key, progress, adversary
        return MethodLoss(jax.numpy.zeros(()), state, {})

    def init_adversary(self, key: jax.Array, teacher_out: Outputs, student_out: Outputs) -> Tree:
        """The adversary's initial parameters."""
        del key, teacher_out, student_out
        return {}

    def adversary_loss(
        self, adversary: Tree, judged: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The adversary's own loss and its metrics.

        Args:
          adversary: its parameters; nothing else receives a gradient.
          judged: from this step's `MethodLoss`.
        """
        raise TypeError(f"{type(self).__name__} has no adversary")


def split_static(out: Outputs) -> tuple[Outputs, dict[str, Any]]:
    """The arrays (or their shapes) among a network's outputs, and the rest, such as the grid."""
    arrays = {name: value for name, value in out.items() if hasattr(value, "dtype")}
    return arrays, {name: value for name, value in out.items() if name not in arrays}


def arrays_of(function: Callable[..., Outputs], static: dict[str, Any]) -> Callable[..., Outputs]:
    """`function` as JAX can trace it: its result's entries that are no arrays go to `static`."""

    def arrays(*args: Any) -> Outputs:
        found, rest = split_static(function(*args))
        static.update(rest)
        return found

    return arrays


def weighted_sum(
    terms: dict[str, tuple[Any, jax.Array]], state: Tree, judged: Any = None
) -> MethodLoss:
    """The sum of `terms`, (weight, term) by name, each of them reported plain and weighted.

    A term of weight 0 is neither reported nor computed: XLA would keep it, as 0 times infinity is
    not 0.
    """
    terms = {
        name: (weight, value)
        for name, (weight, value) in terms.items()
        if isinstance(weight, jax.Array) or weight != 0
    }
    metrics = {name: value for name, (_, value) in terms.items()}
    metrics |= {f"{name}_weighted": weight * value for name, (weight, value) in terms.items()}
    total = sum((weight * value for weight, value in terms.values()), jax.numpy.zeros(()))
    return MethodLoss(total, state, metrics, judged)
