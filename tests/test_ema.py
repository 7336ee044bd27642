"""The moving average of the weights, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xkd_jax import ema

STEPS = 6


def drawn():
    rng = np.random.default_rng(0)
    return [
        {"params": {"w": rng.normal(size=(2, 3))}, "batch_stats": {"mean": rng.normal(size=3)}}
        for _ in range(STEPS)
    ]


def averages(decay, warmup):
    average, after = ema.init(jax.tree.map(lambda a: jnp.full(a.shape, 100.0), drawn()[0])), []
    step_fn = jax.jit(lambda a, v, step: ema.update(a, v, decay, step, warmup))
    for step, variables in enumerate(drawn()):
        average = step_fn(average, jax.tree.map(jnp.float32, variables), jnp.int32(step))
        after.append(jax.device_get(average))
    return after


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_it_is_the_weighted_sum_of_all_that_was_seen(warmup, decay):
    """Each one's weight is its own (1 - decay) times all later decays; the start's is 0."""
    decays = [0.0] + [decay] * (STEPS - 1)
    if warmup:
        decays = [min(decay, 1 - (1 + step) ** (-2 / 3)) for step in range(STEPS)]
    for step, average in enumerate(averages(decay, warmup)):
        weights = [(1 - decays[i]) * np.prod(decays[i + 1 : step + 1]) for i in range(step + 1)]
        np.testing.assert_allclose(sum(weights), 1)
        wanted = jax.tree.map(
            lambda *seen, weights=weights: np.tensordot(weights, np.array(seen), 1),
            *drawn()[: step + 1],
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), average, wanted
        )


def test_warm_up_follows_young_weights_faster():
    last = drawn()[-1]["params"]["w"]
    cold, warm = (averages(0.9, warmup)[-1]["params"]["w"] for warmup in (False, True))
    assert np.linalg.norm(warm - last) < np.linalg.norm(cold - last)


def test_the_start_is_a_copy_so_that_both_can_be_donated():
    weights = {"w": jnp.ones(3)}

    @jax.jit
    def start():
        return weights, ema.init(weights)

    step = jax.jit(lambda w, a: (w, ema.update(a, w, 0.9, 1)), donate_argnums=(0, 1))
    step(*start())
