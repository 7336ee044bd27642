"""Several methods at once: `config.method.name = "cakd+logits"` adds their losses."""

import dataclasses
from typing import Any

import jax
from typing_extensions import override

from xkd_jax.errors import UserError
from xkd_jax.methods.base import Method, MethodLoss


@dataclasses.dataclass(frozen=True)
class Sum(Method):
    """The sum of several methods' losses, each with its own options, parameters and state.

    The label term's weight is the smallest of the parts'.

    Attributes:
      parts: the methods with their names.
    """

    parts: tuple[tuple[str, Method], ...] = ()

    @property
    @override
    def needs_teacher(self) -> bool:
        """Whether any part needs one."""
        return any(method.needs_teacher for _, method in self.parts)

    @property
    @override
    def teacher_batch_stats(self) -> bool:
        """Whether any part needs them; all parts see the same outputs of the teacher."""
        return any(method.teacher_batch_stats for _, method in self.parts)

    @property
    @override
    def rates(self) -> Any:
        """The parts' by name."""
        return {name: method.rates for name, method in self.parts}

    @property
    @override
    def hard_labels(self) -> bool:
        """Whether any part needs them."""
        return any(method.hard_labels for _, method in self.parts)

    @property
    @override
    def detection(self) -> bool:
        """Whether all parts can."""
        return all(method.detection for _, method in self.parts)

    @property
    @override
    def adversary_period(self) -> int:
        """The period of the only part with an adversary; 0 if there is none."""
        return max(method.adversary_period for _, method in self.parts)

    @property
    @override
    def adversary_clock(self) -> str:
        """The clock of the only part with an adversary."""
        return self._adversarial().adversary_clock

    def _adversarial(self) -> Method:
        return next(method for _, method in self.parts if method.adversary_period)

    @override
    def check(self, teacher_out, student_out):
        if sum(method.adversary_period > 0 for _, method in self.parts) > 1:
            raise UserError("two methods with an adversary can't be combined; keep one of them.")
        for _, method in self.parts:
            method.check(teacher_out, student_out)

    @override
    def describe(self, teacher_out, student_out):
        parts = (method.describe(teacher_out, student_out) for _, method in self.parts)
        return "; ".join(part for part in parts if part)

    @property
    @override
    def first_phase(self) -> float:
        """The longest first phase of any part; parts without one are inactive during it."""
        return max(method.first_phase for _, method in self.parts)

    @override
    def moves(self, progress):
        """The student is frozen only if every active method freezes it."""
        moves = {name: method.moves(progress) for name, method in self.parts}
        early = [moves[name]["student"] for name, method in self.parts if method.first_phase]
        return {
            "student": jax.numpy.any(jax.numpy.asarray(early)) if early else True,
            "method": {name: part["method"] for name, part in moves.items()},
        }

    @override
    def label_logits(self, student_out):
        """The logits of the first part that overrides the default ones."""
        usual = student_out["logits"]
        found = (method.label_logits(student_out) for _, method in self.parts)
        return next((logits for logits in found if logits is not usual), usual)

    @override
    def init(self, key, teacher_out, student_out, labels=()):
        params, state = {}, {}
        for i, (name, method) in enumerate(self.parts):
            part_key = jax.random.fold_in(key, i)
            params[name], state[name] = method.init(part_key, teacher_out, student_out, labels)
        return params, state

    @override
    def init_adversary(self, key, teacher_out, student_out):
        return self._adversarial().init_adversary(key, teacher_out, student_out)

    @override
    def loss(self, params, state, teacher_out, student_out, batch, key, progress, adversary=None):
        total, new_state, metrics, judged = jax.numpy.zeros(()), {}, {}, None
        for i, (name, method) in enumerate(self.parts):
            part_key = jax.random.fold_in(key, i)
            inputs = teacher_out, student_out, batch, part_key, progress
            own = adversary if method.adversary_period else None  # a cakd can be without one
            part = method.loss(params[name], state[name], *inputs, own)
            value = part.value
            if self.first_phase and not method.first_phase:
                value = jax.numpy.where(progress < 0, 0.0, value)
            total, metrics = total + value, metrics | part.metrics
            new_state[name] = part.state
            if method.adversary_period:
                judged = part.judged
        return MethodLoss(total, new_state, metrics, judged)

    @override
    def adversary_loss(self, adversary, judged):
        return self._adversarial().adversary_loss(adversary, judged)
