"""Learning-rate schedules, compared with their formulas."""

import numpy as np
import pytest

from xkd_jax.errors import UserError
from xkd_jax.schedules import SCHEDULES, ScheduleOptions, create_learning_rate_fn

EPOCHS, STEPS = 200, 10  # steps per epoch


def rates(steps, learning_rate=0.1, **schedule):
    fn = create_learning_rate_fn(schedule, learning_rate, EPOCHS, STEPS)
    return np.array([fn(step) for step in steps])


@pytest.mark.parametrize("warmup", [0.0, 5.0])
def test_step_schedule_falls_exactly_at_its_epochs(warmup):
    """The paper's schedule: x0.1 at 100 and 150 of 200 epochs; a warm-up doesn't shift them."""
    at = rates([999, 1000, 1499, 1500, 1999], warmup_epochs=warmup)
    np.testing.assert_allclose(at, [0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-5)
    at = rates([299, 300, 1999], boundaries=(30,), factor=0.5, warmup_epochs=warmup)
    np.testing.assert_allclose(at, [0.1, 0.05, 0.05], rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 20])
def test_cosine_ends_at_zero(warmup):
    first, total = warmup * STEPS, EPOCHS * STEPS
    steps = np.array([first, 700, (first + total) // 2, total - 1, total])
    at = rates(steps, name="cosine", warmup_epochs=float(warmup))
    angle = np.pi * (steps - first) / (total - first)
    np.testing.assert_allclose(at, 0.05 * (1 + np.cos(angle)), atol=1e-7)
    assert at[3] > at[4] == 0


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_end_is_a_part_of_the_highest_rate(name):
    at = rates([0, 1000, 2000, 2100], name=name, end_factor=0.2)
    np.testing.assert_allclose(at, [0.1, 0.06, 0.02, 0.02], rtol=1e-5)


def test_linear_ends_at_zero_and_constant_stays():
    np.testing.assert_allclose(rates([0, 500, 1500, 2000], name="linear"), [0.1, 0.075, 0.025, 0])
    np.testing.assert_allclose(rates([0, 1000, 2000], name="constant"), 0.1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_climbs_linearly_from_zero(name):
    at = rates([0, 10, 25, 49, 50], name=name, warmup_epochs=5.0)
    np.testing.assert_allclose(at, [0, 0.02, 0.05, 0.098, 0.1], atol=1e-7)


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(
        UserError, match=r"warmup_epochs is 200, but .* below the run's epochs, 200"
    ):
        rates([0], warmup_epochs=200)


def test_a_warm_up_in_steps_begins_at_a_part_of_the_rate():
    """torchvision's references for detection: a thousandth at the first of 1,000 steps."""
    detection = {"boundaries": (150,), "warmup_steps": 1000, "warmup_factor": 1e-3}
    steps = np.array([0, 1, 500, 999, 1000, 1499, 1500])
    factors = np.minimum(1, 1e-3 + (1 - 1e-3) * steps / 1000)  # torch.optim's LinearLR
    factors[steps >= 1500] *= 0.1
    np.testing.assert_allclose(rates(steps, 0.02, **detection), 0.02 * factors, rtol=1e-4)


def test_a_warm_up_longer_than_the_run_or_given_twice_is_refused():
    with pytest.raises(UserError, match=r"warmup_steps is 2000, but .* the run's steps, 2000"):
        rates([0], warmup_steps=2000)
    with pytest.raises(UserError, match=r"warmup_epochs=1.0 and .*warmup_steps=5 both give"):
        rates([0], warmup_steps=5, warmup_epochs=1.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"end_factor": 2}, "schedule.end_factor is 2, but must be in [0, 1]."),
        ({"factor": -1}, "schedule.factor is -1, but must be at least 0."),
        ({"warmup_factor": 1.5}, "schedule.warmup_factor is 1.5, but must be in [0, 1]."),
        (
            {"boundaries": (9, 3)},
            "schedule.boundaries are (9, 3), but must be increasing epochs above 0.",
        ),
    ],
)
def test_options_out_of_range_are_named(options, says):
    with pytest.raises(UserError) as error:
        ScheduleOptions(**options)
    assert str(error.value) == says
