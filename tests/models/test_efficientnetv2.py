import jax
import jax.numpy as jnp
import pytest

from tests.models.networks import images, shapes
from xkd_jax.errors import UserError
from xkd_jax.models.efficientnetv2 import VARIANTS

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
    variables = jax.eval_shape(build(name).init, jax.random.key(0), images(1))
    leaves = jax.tree.leaves(variables["params"])
    assert sum(leaf.size for leaf in leaves) == TIMM_COUNTS[name]


@pytest.mark.slow
def test_out_of_32_pixels():
    expected: dict[str, tuple[int, ...]] = {"pooled": (2, 1280), "logits": (2, 7)}
    channels = (32, 48, 112, 192)
    for stage, (side, features) in enumerate(zip((32, 16, 8, 4), channels, strict=True), start=1):
        expected[f"stage{stage}"] = expected[f"stage{stage}_pre"] = (2, side, side, features)
    assert shapes(build(depth=0.1, num_classes=7), jnp.zeros((2, 32, 32, 3))) == expected


def test_wrong_values():
    with pytest.raises(UserError, match="unknown size 'm'; known: b0, s"):
        jax.eval_shape(build(size="m").init, jax.random.key(0), images(1))
