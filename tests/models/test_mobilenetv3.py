import jax
import numpy as np
import pytest

from tests.models.networks import count_parameters, images, init, shapes, shapes_at_32
from xkd_jax.errors import UserError
from xkd_jax.models.mobilenetv3 import VARIANTS

pytestmark = pytest.mark.usefixtures("quick_compilation")

# timm's counts of trainable parameters, with 1000 classes.
TIMM_COUNTS = {"mobilenetv3_small_100": 2_542_856, "mobilenetv3_large_100": 5_483_032}


def build(name="mobilenetv3_small_100_32", **args):
    variant = VARIANTS[name]
    return variant.network(**{**variant.args, **args})


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TIMM_COUNTS)
def test_parameter_count_is_timms(name):
    assert count_parameters(build(name)) == TIMM_COUNTS[name]


def test_out_of_32_pixels():
    expected = shapes_at_32(16, 24, 48, 576, pooled=1024)
    assert shapes(build(depth=0.1, num_classes=7), images()) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("width", "stem"), [(0.5, 16), (2.0, 32)])
def test_the_head_keeps_its_channels(width, stem):
    params = jax.eval_shape(build(width=width).init, jax.random.key(0), images(1))["params"]
    assert params["conv_stem"]["kernel"].shape[-1] == stem
    assert params["conv_head"]["kernel"].shape == (1, 1, 576 * width, 1024)
    assert params["conv_head"].keys() == {"kernel", "bias"}


@pytest.mark.slow
def test_the_last_stage_ends_with_an_activation():
    model = build(width=0.25, depth=0.1, num_classes=5)
    variables = init(model)
    _, out = jax.jit(model.apply)(variables, images())
    np.testing.assert_allclose(out["stage4"], jax.nn.hard_swish(out["stage4_pre"]), atol=1e-6)
    assert (out["stage4_pre"] < 0).any()
    np.testing.assert_array_equal(out["stage3"], out["stage3_pre"])
    head = variables["params"]["conv_head"]
    pooled = out["stage4"].mean((1, 2)) @ head["kernel"][0, 0] + head["bias"]
    np.testing.assert_allclose(out["pooled"], jax.nn.hard_swish(pooled), atol=1e-5)


def test_wrong_values():
    with pytest.raises(UserError, match="unknown size 'smal'; did you mean small"):
        jax.eval_shape(build(size="smal").init, jax.random.key(0), images(1))
