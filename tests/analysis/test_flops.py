"""FLOPs as the papers' tables count them."""

import jax
import jax.numpy as jnp
import pytest

from xkd_jax.analysis.flops import count_flops, count_parameters
from xkd_jax.models import create_model


@pytest.mark.parametrize(
    ("name", "size", "billions"),
    # ResNets: He et al., table 1, at two digits (v1.5 as in torchvision's table: 4.09); ViT-B/16:
    # DeiT, table 5, at 224, and 55.4 at 384 as the paper prints it.
    [
        ("resnet18", 224, 1.81),
        ("resnet50", 224, 4.09),
        ("vit_base_patch16_224", 224, 17.5),
        ("vit_base_patch16_384", 384, 55.4),
    ],
)
def test_known_networks(name, size, billions):
    model = create_model(name, num_classes=1000)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    flops = count_flops(lambda v, x: model.apply(v, x)[0], variables, image)
    assert flops / 1e9 == pytest.approx(billions, rel=0.01)


def test_loops_and_jit_are_counted():
    weight = jnp.zeros((4, 4))

    @jax.jit
    def four_products(x):
        x, _ = jax.lax.scan(lambda carry, _: (carry @ weight, None), x, None, length=3)
        return x @ weight

    assert count_flops(four_products, jnp.zeros((2, 4))) == 4 * 2 * 4 * 4
    assert count_parameters({"a": weight, "b": {"c": jnp.zeros(3)}}) == 19
