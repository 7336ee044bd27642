"""The moving average of the weights, and what is frozen in a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.test_optim import create
from xkd_jax.optim import OPTIMIZERS, average, select

SEEN = 6


def drawn():
    rng = np.random.default_rng(0)
    return [
        {"params": {"w": rng.normal(size=(2, 3))}, "batch_stats": {"mean": rng.normal(size=3)}}
        for _ in range(SEEN)
    ]


def averages(decay, warmup):
    averaged, after = jax.tree.map(lambda a: jnp.full(a.shape, 100.0), drawn()[0]), []
    step_fn = jax.jit(lambda a, v, step: average(a, v, decay, step, warmup))
    for step, variables in enumerate(drawn()):
        averaged = step_fn(averaged, jax.tree.map(jnp.float32, variables), jnp.int32(step))
        after.append(jax.device_get(averaged))
    return after


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_is_the_weighted_sum_of_all_that_was_seen(warmup, decay):
    """Each value's weight is its (1 - decay) times all later decays; the initial value's is 0."""
    decays = [0.0] + [decay] * (SEEN - 1)
    if warmup:
        decays = [min(decay, 1 - (1 + step) ** (-2 / 3)) for step in range(SEEN)]
    for step, averaged in enumerate(averages(decay, warmup)):
        weights = [(1 - decays[i]) * np.prod(decays[i + 1 : step + 1]) for i in range(step + 1)]
        np.testing.assert_allclose(sum(weights), 1)
        wanted = jax.tree.map(
            lambda *seen, weights=weights: np.tensordot(weights, np.array(seen), 1),
            *drawn()[: step + 1],
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), averaged, wanted
        )


def test_warm_up_follows_young_weights_faster():
    last = drawn()[-1]["params"]["w"]
    cold, warm = (averages(0.9, warmup)[-1]["params"]["w"] for warmup in (False, True))
    assert np.linalg.norm(warm - last) < np.linalg.norm(cold - last)


# ---- frozen parameters


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_leaves_keep_their_values_and_their_optimizer_state(name):
    """No weight decay or momentum either; afterwards they resume as if there had been no pause."""
    optimizer = create(name, lambda step: 0.1 / (1 + step), weight_decay=0.1)
    params = {"a": np.float32([1, 2]), "b": {"c": np.float32([3, 4])}}
    gradients = jax.tree.map(np.ones_like, params)

    @jax.jit
    def update(params, state, step, moves):
        updates, new = optimizer.update(gradients, state, params, step=step)
        after = optax.apply_updates(params, updates)
        return select(moves, after, params, params), select(moves, new, state, params)

    state = optimizer.init(params)
    frozen, _ = update(params, state, 0, {"a": True, "b": False})
    np.testing.assert_array_equal(frozen["b"]["c"], params["b"]["c"])
    assert not np.array_equal(frozen["a"], params["a"])
    kept, whole = update(params, state, 0, jnp.asarray(False))
    jax.tree.map(np.testing.assert_array_equal, (kept, whole), (params, state))
    # The learning rate is that of the run's step, not of the number of updates.
    resumed, _ = update(kept, whole, 9, jnp.asarray(True))
    direct, _ = update(params, state, 9, True)
    jax.tree.map(np.testing.assert_array_equal, resumed, direct)


def test_select_of_a_part_that_moves_is_what_is_new():
    new = {"w": jnp.ones(2)}
    assert select(True, new, {"w": jnp.zeros(2)}, new) is new
