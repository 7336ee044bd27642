"""Attentive feature distillation, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import cnn, gradient_fn, init, pair, reached, vit
from xkd_jax.methods.afd import AFD, ChannelAttention, attended_distance

pytestmark = pytest.mark.usefixtures("quick_compilation")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def expected_distance(student, teacher, rho):
    total = 0.0
    for s, t, weights in zip(np.float64(student), np.float64(teacher), rho, strict=True):
        for c, weight in enumerate(weights):
            lengths = (np.sqrt(np.sum(m[..., c] ** 2)) for m in (s, t))
            # An all-zero channel (after a ReLU) stays zero.
            a, b = (m[..., c] / (n or 1) for m, n in zip((s, t), lengths, strict=True))
            total += weight * np.mean((a - b) ** 2)
    return total / len(student)


def expected_rho(teacher, params):
    one, two = params["params"]["Dense_0"], params["params"]["Dense_1"]
    x = np.float64(teacher).mean((1, 2)) @ one["kernel"] + one["bias"]
    x = np.maximum(x, 0) @ two["kernel"] + two["bias"]
    gates = 1 / (1 + np.exp(-x))
    return gates / gates.sum(-1, keepdims=True)


def test_channels_are_compared_at_length_1_and_weighted():
    student, teacher = draw(0, 3, 2, 4, 5), draw(1, 3, 2, 4, 5)
    rho = np.random.default_rng(2).dirichlet(np.ones(5), 3)
    expected = expected_distance(student, teacher, rho)
    np.testing.assert_allclose(attended_distance(student, teacher, rho), expected, rtol=1e-5)
    # The scale of a channel doesn't matter, but its sign does.
    scaled = student * np.array([1, 5, 0.1, 2, 3], np.float32)
    np.testing.assert_allclose(attended_distance(scaled, teacher, rho), expected, rtol=1e-5)
    np.testing.assert_allclose(attended_distance(teacher, teacher, rho), 0, atol=1e-12)
    np.testing.assert_allclose(attended_distance(-teacher, teacher, rho), 4 / 8, rtol=1e-5)


def test_a_channel_without_attention_may_differ():
    student, teacher = draw(0, 2, 3, 3, 2), draw(1, 2, 3, 3, 2)
    student[..., 1] = teacher[..., 1]
    np.testing.assert_allclose(attended_distance(student, teacher, np.eye(2)[[1, 1]]), 0)
    assert attended_distance(student, teacher, np.eye(2)[[0, 0]]) > 0.01


def test_attention_is_squeeze_and_excitation_with_sum_1():
    teacher, module = 10 * draw(0, 3, 2, 2, 5), ChannelAttention()
    variables = module.init(jax.random.key(0), teacher)
    rho = module.apply(variables, teacher)
    np.testing.assert_allclose(rho, expected_rho(teacher, variables), rtol=1e-4)
    np.testing.assert_allclose(np.sum(rho, -1), 1, rtol=1e-5)
    vanishing = jax.tree.map(lambda leaf: -1e3 * jnp.abs(leaf), variables)
    assert np.all(np.isfinite(module.apply(vanishing, teacher)))


def test_the_loss_is_the_mean_over_levels():
    teacher = cnn(0, sides=(8, 4, 4, 2))
    student = cnn(1, sides=(8, 4, 2, 2), widths=(3, 4, 5, 9))
    method = AFD(weight=2.0)
    params, state = init(method, teacher, student)
    assert state == {}
    assert [name for name in params if "regressor" in params[name]] == ["stage4"]
    distances = []
    for name, level in params.items():
        t, s = np.float64(teacher[name]), np.float64(student[name])
        if name == "stage3":
            t = t.reshape(4, 2, 2, 2, 2, 5).mean((2, 4))
        if "regressor" in level:
            s = s @ np.float64(level["regressor"]["params"]["conv"]["kernel"][0, 0])
            s = (s - s.mean((0, 1, 2))) / np.sqrt(s.var((0, 1, 2)) + 1e-5)
        distances.append(expected_distance(s, t, expected_rho(t, level["attention"])))
    assert len(distances) == 4
    args = params, {}, teacher, student, {}, jax.random.key(0), jnp.zeros(())
    loss, _, metrics, _ = jax.jit(method.loss)(*args)
    np.testing.assert_allclose(loss, 2 * np.mean(distances), rtol=1e-5)
    np.testing.assert_allclose(metrics["afd"], np.mean(distances), rtol=1e-5)


def test_tokens_are_standardised_maps():
    outs = vit(0, depth=1, side=2), vit(1, depth=1, side=2)
    params, _ = init(AFD(), *outs)
    maps = []
    for out in outs:
        tokens = np.float64(out["block01"])
        tokens = tokens - tokens.mean(-1, keepdims=True)
        tokens /= np.sqrt(np.mean(tokens**2, -1, keepdims=True) + 1e-6)
        maps.append(tokens.reshape(4, 2, 2, 8))
    rho = expected_rho(maps[0], params["block01"]["attention"])
    metrics = AFD().loss(params, {}, *outs, {}, jax.random.key(0), jnp.zeros(())).metrics
    np.testing.assert_allclose(metrics["afd"], expected_distance(*maps[::-1], rho), rtol=1e-5)


@pytest.mark.parametrize("name", ["ViT to CNN", "Swin to ViT"])
def test_networks_of_all_kinds_learn(name):
    outs, method = pair(name), AFD(weight=1.0)
    method.check(*outs)
    params, _ = init(method, *outs)
    gradient = gradient_fn(method, *outs)
    loss, (grads, teacher, student) = jax.device_get(gradient(params, *outs))
    assert reached(teacher) == set()
    assert len(reached(student)) >= 2
    for level in grads.values():
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(level["attention"]))
    stepped = outs[1] | {name: outs[1][name] - 0.1 * student[name] for name in reached(student)}
    assert gradient(params, outs[0], stepped)[0] < loss
