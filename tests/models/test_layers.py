import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from xkd_jax.models.layers import BatchNorm, Conv, drop_path, max_pool

pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def norm_variables(channels):
    return {
        "params": {"scale": normal(channels, seed=1), "bias": normal(channels, seed=2)},
        "batch_stats": {"mean": normal(channels, seed=3), "var": normal(channels, seed=4) ** 2},
    }


def test_batch_norm_in_training_is_the_papers():
    x, variables = 3 * normal(2, 4, 5, 3) + 2, norm_variables(3)
    y, new = BatchNorm(momentum=0.3).apply(variables, x, True, mutable=["batch_stats"])
    x, params, old = np.asarray(x, np.float64), variables["params"], variables["batch_stats"]
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    want = (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_allclose(
        new["batch_stats"]["mean"], 0.7 * old["mean"] + 0.3 * mean, rtol=1e-5
    )
    # PyTorch keeps the unbiased variance, of 40 values here.
    np.testing.assert_allclose(
        new["batch_stats"]["var"], 0.7 * old["var"] + 0.3 * var * 40 / 39, rtol=1e-5
    )


def test_batch_norm_in_evaluation_reads_the_statistics():
    x, variables = normal(2, 4, 5, 3), norm_variables(3)
    stats, params = variables["batch_stats"], variables["params"]
    want = (x - stats["mean"]) / jnp.sqrt(stats["var"] + 0.1) * params["scale"] + params["bias"]
    y = BatchNorm(epsilon=0.1).apply(variables, x)
    np.testing.assert_allclose(y, want, atol=1e-5)


def test_batch_norms_derivative_is_the_automatic_one():
    x, variables, weights = normal(3, 4, 2, 5), norm_variables(5), normal(3, 4, 2, 5, seed=9)

    def ours(x, params):
        y, _ = BatchNorm().apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y) * weights)

    def automatic(x, params):
        y = (x - x.mean((0, 1, 2))) * jax.lax.rsqrt(x.var((0, 1, 2)) + 1e-5)
        return jnp.sum(jnp.sin(y * params["scale"] + params["bias"]) * weights)

    grads, want = (jax.grad(f, (0, 1))(x, variables["params"]) for f in (ours, automatic))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_batch_norm_computes_statistics_in_float32():
    x = (100 + normal(64, 8, 8, 2)).astype(jnp.bfloat16)
    variables = {
        "params": {"scale": jnp.ones(2), "bias": jnp.zeros(2)},
        "batch_stats": {"mean": jnp.zeros(2), "var": jnp.ones(2)},
    }
    norm = BatchNorm(momentum=1.0, dtype=jnp.bfloat16)
    y, new = norm.apply(variables, x, True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    full = np.asarray(x, np.float64)
    np.testing.assert_allclose(new["batch_stats"]["mean"], full.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], full.var((0, 1, 2)), rtol=1e-2)


def test_constant_channels_become_the_bias():
    variables = norm_variables(2)
    y, _ = BatchNorm().apply(variables, jnp.full((4, 2), 7.3), True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, jnp.tile(variables["params"]["bias"], (4, 1)), atol=1e-2)


def test_conv_pads_as_pytorch_does():
    # On 6 pixels with stride 2, "SAME" pads on the right alone; PyTorch on both sides.
    x = jnp.arange(6.0).reshape(1, 1, 6, 1)
    kernel = {"params": {"kernel": jnp.ones((1, 3, 1, 1))}}
    ours = Conv(1, (1, 3), (1, 2)).apply(kernel, x)
    np.testing.assert_array_equal(jnp.ravel(ours), [1, 6, 12])
    same = Conv(1, (1, 3), (1, 2), padding="SAME").apply(kernel, x)
    np.testing.assert_array_equal(jnp.ravel(same), [3, 9, 9])
    bias = {"params": {**kernel["params"], "bias": jnp.ones(1)}}
    valid = Conv(1, (1, 3), padding=0, use_bias=True).apply(bias, x)
    np.testing.assert_array_equal(jnp.ravel(valid), [4, 7, 10, 13])


def test_max_pool_pads_with_less_than_anything():
    x = -jnp.arange(1.0, 10.0).reshape(1, 3, 3, 1)
    np.testing.assert_array_equal(max_pool(x, 3, 2, padding=1)[0, :, :, 0], [[-1, -2], [-4, -5]])


class Dropper(nn.Module):
    @nn.compact
    def __call__(self, x, rate, train=True):
        return drop_path(self, x, rate, train)


@pytest.mark.parametrize("rate", [0.25, jnp.float32(0.25)])
def test_drop_path_drops_samples_and_keeps_the_mean(rate):
    x = jnp.ones((4000, 2, 2))
    y = Dropper().apply({}, x, rate, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert (y.reshape(4000, 4) == y.reshape(4000, 4)[:, :1]).all()
    np.testing.assert_allclose(y.mean(), 1, atol=0.03)


def test_drop_path_needs_no_key_where_nothing_drops():
    x = normal(3, 2)
    assert jnp.array_equal(Dropper().apply({}, x, 0.0), x)
    assert jnp.array_equal(Dropper().apply({}, x, 0.5, train=False), x)
