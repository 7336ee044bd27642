import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.models.networks import count_parameters, images, init, shapes, shapes_at_32
from xkd_jax.errors import UserError
from xkd_jax.models.mobilenetv4 import (
    VARIANTS,
    MobileAttention,
    MultiQueryAttention,
    UniversalInvertedResidual,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

# timm's counts of trainable parameters, with 1000 classes.
TIMM_COUNTS = {
    "mobilenetv4_conv_small": 3_774_024,
    "mobilenetv4_conv_medium": 9_715_512,
    "mobilenetv4_hybrid_medium": 11_074_648,
}


def build(name="mobilenetv4_conv_small_32", **args):
    variant = VARIANTS[name]
    return variant.network(**{**variant.args, **args})


def init_like(module, x):
    """Random variables for a module that is called with `x` and `train`."""
    tree = jax.eval_shape(lambda key: module.init(key, x, False), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5), tree)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TIMM_COUNTS)
def test_parameter_count_is_timms(name):
    assert count_parameters(build(name)) == TIMM_COUNTS[name]


@pytest.mark.slow
def test_out_of_32_pixels():
    expected = shapes_at_32(32, 64, 96, 960, pooled=1280)
    assert shapes(build(num_classes=7), images()) == expected


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ({"start": 5, "middle": 3}, {"dw_start", "pw_exp", "dw_mid", "pw_proj"}),
        ({"start": 3, "middle": 0, "layer_scale": 1e-5},
         {"dw_start", "pw_exp", "pw_proj", "layer_scale"}),
        ({"start": 0, "middle": 0}, {"pw_exp", "pw_proj"}),
    ],
)  # fmt: skip
def test_the_depthwise_convolutions_are_optional(args, names):
    block = UniversalInvertedResidual(8, **args)
    params = jax.eval_shape(block.init, jax.random.key(0), images())["params"]
    assert params.keys() == names


@pytest.mark.parametrize("middle", [0, 3])
def test_the_stride_is_that_of_the_last_depthwise_convolution(middle):
    block, x = UniversalInvertedResidual(8, 2, start=3, middle=middle), images()
    strides = {}

    def note(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.module.name in ("dw_start", "dw_mid") and context.method_name == "__call__":
            strides[context.module.name] = args[0].shape[1] // y.shape[1]
        return y

    with nn.intercept_methods(note):
        (y, _), _ = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
    assert y.shape == (2, 16, 16, 8)
    assert strides == ({"dw_start": 1, "dw_mid": 2} if middle else {"dw_start": 2})


def test_all_heads_attend_to_the_same_keys():
    attention, x = MultiQueryAttention(2, 4, 1, 1e-5), jnp.tile(images(2, 4), (1, 1, 1, 4))
    params = init_like(attention, x)["params"]
    got = jax.jit(attention.apply)({"params": params}, x, False)
    flat = x.reshape(2, 16, 12)
    q, k, v = (flat @ params[name]["proj"]["kernel"][0, 0] for name in ("query", "key", "value"))
    parts = [jax.nn.softmax(q[..., i : i + 4] @ k.swapaxes(1, 2) / 2) @ v for i in (0, 4)]
    want = jnp.concatenate(parts, -1) @ params["output"]["proj"]["kernel"][0, 0]
    np.testing.assert_allclose(got.reshape(2, 16, 12), want, atol=1e-5)


def test_keys_of_half_the_size():
    x = jnp.zeros((1, 5, 5, 8))
    variables = jax.eval_shape(MobileAttention(8, kv_stride=2).init, jax.random.key(0), x)
    attention = variables["params"]["attn"]
    assert attention["query"].keys() == {"proj"}
    assert attention["key"].keys() == attention["value"].keys() == {"down_conv", "norm", "proj"}
    assert attention["key"]["down_conv"]["kernel"].shape == (3, 3, 1, 8)
    assert variables["batch_stats"]["attn"].keys() == {"key", "value"}


@pytest.mark.exhaustive
def test_attention_starts_as_timms():
    run = jax.jit(MobileAttention(64, kv_stride=2).init)
    params = run(jax.random.key(0), jnp.zeros((1, 4, 4, 64)))["params"]
    attention = params["attn"]
    for kernel, fans in (  # Xavier: uniform, and the largest is near the bound
        (attention["query"]["proj"]["kernel"], 64 + 256),
        (attention["key"]["down_conv"]["kernel"], 9 + 9 * 64),
        (attention["value"]["proj"]["kernel"], 64 + 64),
        (attention["output"]["proj"]["kernel"], 256 + 64),
    ):
        np.testing.assert_allclose(jnp.abs(kernel).max(), (6 / fans) ** 0.5, rtol=0.02)
    np.testing.assert_array_equal(params["layer_scale"]["gamma"], np.float32(1e-5))


@pytest.mark.slow
def test_the_last_stage_ends_with_an_activation():
    model = build(width=0.1, depth=0.01, num_classes=5)
    _, out = jax.jit(model.apply)(init(model), images())
    np.testing.assert_array_equal(out["stage4"], np.maximum(out["stage4_pre"], 0))
    np.testing.assert_array_equal(out["stage1"], np.maximum(out["stage1_pre"], 0))
    np.testing.assert_array_equal(out["stage3"], out["stage3_pre"])
    assert (out["stage4_pre"] < 0).any()
    assert (out["pooled"] >= 0).all()


def test_wrong_values():
    with pytest.raises(UserError, match="unknown size 'hybrid'; did you mean hybrid_medium"):
        jax.eval_shape(build(size="hybrid").init, jax.random.key(0), images(1))
