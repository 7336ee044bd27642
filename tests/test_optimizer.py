"""Learning-rate schedules, and the optimizers against NumPy transcriptions of PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xkd_jax.config import default_config
from xkd_jax.optimizer import OPTIMIZERS, SCHEDULES, create_learning_rate_fn, create_optimizer

EPOCHS, STEPS = 200, 10  # steps an epoch


def rates(steps, learning_rate=0.1, **schedule):
    config = default_config()
    config.schedule.update(schedule)
    fn = create_learning_rate_fn(config.schedule, learning_rate, EPOCHS, STEPS)
    return np.array([fn(step) for step in steps])


def create(name, learning_rate, **options):
    config = default_config()
    config.optimizer.update({"name": name, **options})
    fn = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
    return create_optimizer(config.optimizer, fn)


def descend(optimizer, params, gradients):
    """The parameters after every step."""
    params, steps = jax.tree.map(jnp.asarray, params), []
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        steps.append(jax.device_get(params))
    return steps


def draws(n=5):
    rng = np.random.default_rng(0)
    return rng.normal(size=4), rng.normal(size=(n, 4))


# ---- schedules


@pytest.mark.parametrize("warmup", [0.0, 5.0])
def test_step_schedule_falls_exactly_at_its_epochs(warmup):
    """The paper's: x0.1 at 100 and 150 of 200 epochs; a warm-up moves neither."""
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


def test_linear_ends_at_zero_and_constant_stays():
    np.testing.assert_allclose(rates([0, 500, 1500, 2000], name="linear"), [0.1, 0.075, 0.025, 0])
    np.testing.assert_allclose(rates([0, 1000, 2000], name="constant"), 0.1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_climbs_linearly_from_zero(name):
    at = rates([0, 10, 25, 49, 50], name=name, warmup_epochs=5.0)
    np.testing.assert_allclose(at, [0, 0.02, 0.05, 0.098, 0.1], atol=1e-7)


# ---- optimizers


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_pytorchs(momentum, nesterov):
    """torch.optim.SGD: L2 decay, then momentum, and the rate outside of the buffer."""
    start, gradients = draws()
    schedule = [0.5, 0.5, 0.1, 0.1, 0.02]
    optimizer = create(
        "sgd",
        lambda step: jnp.asarray(schedule)[step],
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=0.01,
    )
    ours = descend(optimizer, np.float32(start), np.float32(gradients))
    p, buffer = start.copy(), None
    for rate, gradient, result in zip(schedule, gradients, ours, strict=True):
        g = gradient + 0.01 * p
        buffer = g if buffer is None else momentum * buffer + g
        p = p - rate * (g + momentum * buffer if nesterov else buffer)
        np.testing.assert_allclose(result, p, rtol=1e-5, atol=1e-6)


def np_adam(start, gradients, rate, l2, decoupled):
    """torch.optim.Adam with `l2`, torch.optim.AdamW with `decoupled` weight decay."""
    p, m, v = start.copy(), 0, 0
    for t, g in enumerate(gradients, 1):
        p = p - rate * decoupled * p
        g = g + l2 * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        yield p


@pytest.mark.parametrize(("name", "l2", "decoupled"), [("adam", 0.3, 0), ("adamw", 0, 0.3)])
def test_adam_adds_weight_decay_to_the_gradient_and_adamw_decouples_it(name, l2, decoupled):
    start, gradients = draws()
    ours = descend(create(name, 0.1, weight_decay=0.3), np.float32(start), np.float32(gradients))
    for result, p in zip(ours, np_adam(start, gradients, 0.1, l2, decoupled), strict=True):
        np.testing.assert_allclose(result, p, rtol=1e-4, atol=1e-5)


def test_clipping_is_by_the_norm_of_all_gradients_together():
    params = {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
    plain = {"momentum": 0.0, "weight_decay": 0.0}
    optimizer = create("sgd", 1.0, clip_norm=1.0, **plain)
    large = {"a": np.float32([3]), "b": np.float32([-4])}  # norm 5
    (after,) = descend(optimizer, params, [large])
    np.testing.assert_allclose([after["a"][0], after["b"][0]], [-0.6, 0.8], rtol=1e-6)
    small = {"a": np.float32([0.3]), "b": np.float32([-0.4])}
    (after,) = descend(optimizer, params, [small])
    np.testing.assert_allclose([after["a"][0], after["b"][0]], [-0.3, 0.4], rtol=1e-6)
    (after,) = descend(create("sgd", 1.0, clip_norm=0.0, **plain), params, [large])
    np.testing.assert_allclose([after["a"][0], after["b"][0]], [-3, 4], rtol=1e-6)


def test_clipping_comes_before_weight_decay():
    """As PyTorch's clip_grad_norm_ before the optimizer's step."""
    optimizer = create("sgd", 1.0, momentum=0.0, weight_decay=0.1, clip_norm=1.0)
    (after,) = descend(optimizer, np.float32([10]), [np.float32([5])])
    np.testing.assert_allclose(after, [10 - 1 - 1], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_downhill_and_decays(name):
    start = np.float32([2, -3])
    gradients = [np.float32([1, -1])] * 3
    after = descend(create(name, 0.1, weight_decay=0.0), start, gradients)[-1]
    assert (np.abs(after) < np.abs(start)).all()
    decayed = descend(create(name, 0.1, weight_decay=0.5), start, gradients)[-1]
    assert not np.allclose(decayed, after)
