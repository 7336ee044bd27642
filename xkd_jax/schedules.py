"""Learning-rate schedules by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from xkd_jax.errors import UserError

SCHEDULES = ("step", "cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class ScheduleOptions:
    """`config.schedule`.

    Attributes:
      name: how the rate falls; see `SCHEDULES`.
      boundaries: epochs at which "step" multiplies the rate by `factor`.
      factor: see `boundaries`.
      end_factor: final rate of "cosine" and "linear", as a fraction of the peak rate.
      warmup_epochs: length of the linear warm-up, which counts towards the run's epochs; may be
        fractional.
      warmup_steps: the same in steps, instead of epochs, as detectors are warmed up; 0: as
        `warmup_epochs` says.
      warmup_factor: rate at the start of the warm-up, as a fraction of the peak rate.
    """

    name: str = "step"
    boundaries: tuple[float, ...] = (100, 150)
    factor: float = 0.1
    end_factor: float = 0.0
    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    warmup_factor: float = 0.0

    def __post_init__(self):
        check_range("schedule.factor", self.factor, 0)
        check_range("schedule.end_factor", self.end_factor, 0, 1)
        check_range("schedule.warmup_epochs", self.warmup_epochs, 0)
        check_range("schedule.warmup_steps", self.warmup_steps, 0)
        check_range("schedule.warmup_factor", self.warmup_factor, 0, 1)
        if self.warmup_epochs and self.warmup_steps:
            raise UserError(
                f"schedule.warmup_epochs={self.warmup_epochs} and "
                f"schedule.warmup_steps={self.warmup_steps} both give the length of the warm-up; "
                "set one of them to 0."
            )
        numbers = all(isinstance(epoch, int | float) for epoch in self.boundaries)
        rising = numbers and list(self.boundaries) == sorted(set(self.boundaries))
        if not rising or min(self.boundaries, default=1) <= 0:
            raise UserError(
                f"schedule.boundaries are {tuple(self.boundaries)}, but must be increasing epochs "
                "above 0."
            )


def create_learning_rate_fn(
    schedule: Mapping[str, Any],
    learning_rate: float,
    epochs: int,
    steps_per_epoch: int,
    first_steps: int = 0,
) -> optax.Schedule:
    """The learning rate as a function of the step.

    Args:
      schedule: fields of `ScheduleOptions`. "step" multiplies by `factor` at every epoch of
        `boundaries` (the paper: x0.1 at 100 and 150); "cosine" and "linear" decay to `end_factor`
        times the peak rate at the end.
      learning_rate: peak learning rate.
      epochs: length of the training proper.
      steps_per_epoch: number of full batches per epoch.
      first_steps: length of the method's first phase, which precedes it, at the peak rate.

    Raises:
      UserError: an option is out of range, or the warm-up lasts longer than the run.
    """
    options = ScheduleOptions(**schedule)
    if options.warmup_epochs >= epochs:
        raise UserError(
            f"schedule.warmup_epochs is {options.warmup_epochs}, but must be below the run's "
            f"epochs, {epochs}."
        )
    if options.warmup_steps >= epochs * steps_per_epoch:
        raise UserError(
            f"schedule.warmup_steps is {options.warmup_steps}, but must be below the run's steps, "
            f"{epochs * steps_per_epoch}."
        )
    warmup = options.warmup_steps or round(options.warmup_epochs * steps_per_epoch)
    rest = max(1, epochs * steps_per_epoch - warmup)
    if options.name == "step":
        scales = {
            round(epoch * steps_per_epoch) - warmup: options.factor for epoch in options.boundaries
        }
        main = optax.piecewise_constant_schedule(learning_rate, scales)
    elif options.name == "cosine":
        main = optax.cosine_decay_schedule(learning_rate, rest, options.end_factor)
    elif options.name == "linear":
        main = optax.linear_schedule(learning_rate, options.end_factor * learning_rate, rest)
    else:
        main = optax.constant_schedule(learning_rate)
    if warmup:
        climb = optax.linear_schedule(options.warmup_factor * learning_rate, learning_rate, warmup)
        main = optax.join_schedules([climb, main], [warmup])
    if not first_steps:
        return main
    return optax.join_schedules([optax.constant_schedule(learning_rate), main], [first_steps])


def check_range(field: str, value: float, low: float, high: float = float("inf")) -> None:
    """Refuses the value of a field outside of [low, high].

    Raises:
      UserError: it is outside.
    """
    if not low <= value <= high:
        wanted = f"in [{low}, {high}]" if high < float("inf") else f"at least {low}"
        raise UserError(f"{field} is {value}, but must be {wanted}.")
