"""Detection of non-finite losses, gradients and states."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from xkd_jax.data.loader import Order
from xkd_jax.data.order import batch_indices
from xkd_jax.errors import UserError
from xkd_jax.reporting import nan_guard


@pytest.fixture
def guard(tmp_path):
    trained = {"student": {"conv": {"kernel": 0, "bias": 0}}, "method": [0, 0]}
    return nan_guard.Guard(tmp_path, nan_guard.names(trained), Order(64, 16, seed=5))


def test_flags_have_the_order_of_the_names():
    tree = {"b": {"y": jnp.array([1.0, jnp.inf])}, "a": [jnp.ones(3), jnp.array(jnp.nan)]}
    assert nan_guard.names(tree) == ["a/0", "a/1", "b/y"]
    np.testing.assert_array_equal(nan_guard.flags(tree), [True, False, False])


def test_a_good_step_passes(guard, tmp_path):
    guard.check(7, {"loss": np.float32(2), nan_guard.FLAGS: np.ones(4, bool)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_the_run(guard, loss):
    message = rf"Non-finite values at step 7: loss {loss}; gradients all finite; examples "
    with pytest.raises(UserError, match=message):
        guard.check(7, {"loss": np.float32(loss), nan_guard.FLAGS: np.ones(4, bool)})


def test_the_parameters_and_the_examples_are_named(guard, tmp_path):
    good = np.array([True, False, True, False])
    indices = batch_indices(64, 16, 5, 6).tolist()  # the seventh step
    with pytest.raises(UserError, match=r"gradients method/1, student/conv/kernel; ex") as error:
        guard.check(7, {"loss": np.float32(2), nan_guard.FLAGS: good})
    assert f"examples {', '.join(map(str, indices[:8]))} and 8 more" in str(error.value)
    assert json.loads((tmp_path / nan_guard.REPORT).read_text()) == {
        "step": 7,
        "loss": "2.0",
        "gradients": ["method/1", "student/conv/kernel"],
        "examples": indices,
    }


def test_a_state_is_checked_except_for_the_methods_state():
    state = {"step": jnp.array(3), "params": {"a": jnp.ones(2), "b": jnp.ones(2)}}
    nan_guard.check_state(3, state | {"method_state": {"unset": jnp.array(-jnp.inf)}})
    state["params"]["b"] = jnp.array([0, jnp.nan])
    with pytest.raises(UserError, match=r"after step 3: params/b; the checkpoint isn't saved"):
        nan_guard.check_state(3, state)
