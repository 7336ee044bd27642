import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xkd_jax import backend
from xkd_jax.models.convolution import convolve

pytestmark = pytest.mark.usefixtures("quick_compilation")

# x [N, H, W, C], kernel [kh, kw, C / groups, features], stride, padding, groups.
CASES = {
    "1x1": ((2, 5, 6, 3), (1, 1, 3, 4), (1, 1), "SAME", 1),
    "1x1 strided": ((2, 5, 6, 3), (1, 1, 3, 4), (2, 3), ((0, 0), (0, 0)), 1),
    "1x1 padded": ((2, 5, 6, 3), (1, 1, 3, 4), (1, 1), ((1, 0), (0, 1)), 1),
    "3x3": ((2, 5, 6, 3), (3, 3, 3, 4), (1, 1), ((1, 1), (1, 1)), 1),
    "grouped": ((2, 5, 6, 4), (3, 3, 2, 6), (2, 2), ((1, 1), (1, 1)), 2),
    "bundles": ((1, 5, 6, 40), (3, 3, 8, 10), (1, 1), ((1, 1), (1, 1)), 5),
    "the most bundles": ((1, 3, 3, 800), (1, 1, 32, 50), (1, 1), ((0, 0), (0, 0)), 25),
    "depthwise": ((2, 5, 6, 3), (3, 3, 1, 3), (1, 1), ((1, 1), (1, 1)), 3),
    "depthwise, two filters a channel": ((2, 5, 6, 3), (3, 3, 1, 6), (1, 1), ((1, 1), (1, 1)), 3),
    "depthwise strided": ((2, 8, 7, 3), (3, 3, 1, 3), (2, 2), ((1, 1), (1, 1)), 3),
    "depthwise SAME": ((2, 8, 7, 3), (5, 3, 1, 3), (2, 3), "SAME", 3),
    "depthwise uneven": ((1, 9, 9, 2), (5, 5, 1, 2), (2, 2), ((3, 0), (1, 4)), 2),
    "depthwise unpadded": ((1, 6, 9, 2), (2, 4, 1, 2), (3, 2), "VALID", 2),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow) if c == "the most bundles" else c for c in CASES],
)
def test_every_way_is_xlas_convolution(case):
    shape, kernel_shape, stride, padding, groups = CASES[case]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    # Outputs of about 1: gradients of sines of larger ones differ by more than the tolerance.
    kernel = rng.normal(size=kernel_shape) / np.sqrt(np.prod(kernel_shape[:3]))
    kernel = jnp.asarray(kernel, jnp.float32)

    def run(x, kernel):
        y = convolve(x, kernel, stride, padding, groups)
        weights = jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape) / y.size
        return jnp.sum(jnp.sin(y) * weights), y

    value_and_grad = jax.value_and_grad(run, (0, 1), has_aux=True)
    ours = jax.jit(value_and_grad)(x, kernel)
    with backend.assume("tpu"):
        # Another function than above: jit would remember that one's trace.
        theirs = jax.jit(lambda x, kernel: value_and_grad(x, kernel))(x, kernel)  # noqa: PLW0108
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["1x1", "1x1 strided", "depthwise", "depthwise SAME"])
def test_slow_ones_are_written_out_on_a_cpu(case):
    shape, kernel_shape, stride, padding, groups = CASES[case]

    def text():
        args = jnp.zeros(shape), jnp.zeros(kernel_shape)
        return str(jax.make_jaxpr(lambda x, k: convolve(x, k, stride, padding, groups))(*args))

    assert "conv_general_dilated" not in text()
    with backend.assume("tpu"):
        assert "conv_general_dilated" in text()


def test_bfloat16_stays():
    x, kernel = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 1, 2), jnp.bfloat16)
    grads = jax.grad(lambda x, k: convolve(x, k, groups=2).sum(), (0, 1))(x, kernel)
    assert [leaf.dtype for leaf in grads] == [jnp.bfloat16] * 2
