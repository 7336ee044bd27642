import jax
import pytest

from tests.models.networks import count_parameters, images, shapes, shapes_at_32
from xkd_jax.errors import UserError
from xkd_jax.models.efficientnetv2 import VARIANTS

pytestmark = pytest.mark.usefixtures("quick_compilation")

# timm's counts of trainable parameters, with 1000 classes.
TIMM_COUNTS = {
    "tf_efficientnetv2_b0": 7_139_704,
    "tf_efficientnetv2_s": 21_458_488,
    "efficientnetv2_rw_t": 13_649_388,
}


def build(name="tf_efficientnetv2_b0_32", **args):
    variant = VARIANTS[name]
    return variant.network(**{**variant.args, **args})


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", TIMM_COUNTS)
def test_parameter_count_is_timms(name):
    assert count_parameters(build(name)) == TIMM_COUNTS[name]


@pytest.mark.slow
def test_out_of_32_pixels():
    expected = shapes_at_32(32, 48, 112, 192, pooled=1280)
    assert shapes(build(depth=0.1, num_classes=7), images()) == expected


def test_wrong_values():
    with pytest.raises(UserError, match="unknown size 'm'; known: b0, s"):
        jax.eval_shape(build(size="m").init, jax.random.key(0), images(1))
