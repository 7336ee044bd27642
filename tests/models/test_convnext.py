import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.networks import count_parameters, images, initial, shapes
from xkd_jax.errors import UserError
from xkd_jax.models import convnext, create_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {"depths": (1, 1, 1, 1), "dims": (4, 6, 8, 10)}
# timm 1.0.31's counts of trainable parameters, with 1000 classes.
TIMM_COUNTS = {
    "convnext_atto": 3_695_520,
    "convnext_femto": 5_217_784,
    "convnext_nano": 15_593_560,
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "convnextv2_atto": 3_708_400,
    "convnextv2_nano": 15_623_800,
    "convnextv2_tiny": 28_635_496,
}


def init(block, x):
    """Random variables of a block that maps `x` to its own shape."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(block.init, jax.random.key(0), x),
    )


def tiny(name="convnext_atto", **args):
    return create_model(name, num_classes=5, **{**TINY, **args})


OTHERS = TIMM_COUNTS.keys() - {"convnext_atto"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in OTHERS)) for name in TIMM_COUNTS],
)
def test_parameter_count_is_timms(name):
    assert count_parameters(create_model(name, num_classes=1000)) == TIMM_COUNTS[name]


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param("convnextv2_atto", 64, marks=pytest.mark.slow), ("convnext_atto_32", 32)],
)
def test_taps(name, size):
    """Both end with one pixel for 32 of the image, or 8 in a network for 32x32 images."""
    out = shapes(tiny(name), images(2, size))
    first = size if name.endswith("_32") else size // 4
    for i, dim in enumerate(TINY["dims"]):
        stage = (2, first >> i, first >> i, dim)
        assert out.pop(f"stage{i + 1}") == out.pop(f"stage{i + 1}_pre") == stage
    assert out == {"pooled": (2, 10), "logits": (2, 5)}
    headless = create_model(name, num_classes=0, **TINY)
    assert "logits" not in shapes(headless, images(2, size))


def test_conv_mlp_only_changes_how_kernels_are_stored():
    x = images(2, 8)
    block = convnext.Block(0.5, True, True, 0.0)
    variables = init(block, x)
    mlp = variables["params"]["mlp"]
    assert mlp["fc1"]["kernel"].shape == (1, 1, 3, 12)
    want = jax.jit(block.apply)(variables, x)
    for layer in ("fc1", "fc2"):
        mlp[layer]["kernel"] = mlp[layer]["kernel"][0, 0]
    got = jax.jit(block.clone(conv_mlp=False).apply)(variables, x)
    np.testing.assert_array_equal(got, want)


@pytest.mark.exhaustive
def test_initial_values_are_timms():
    stage, head = initial(tiny(dims=(32, 6, 8, 10)), "stages_0", "head")
    block = stage["blocks_0"]
    assert block["conv_dw"]["kernel"].std() == pytest.approx(0.02, rel=0.1)
    assert block["mlp"]["fc1"]["kernel"].std() == pytest.approx(0.02, rel=0.1)
    np.testing.assert_array_equal(block["gamma"], np.float32(1e-6))
    assert not head["fc"]["bias"].any()


def test_global_response_norm():
    norm, rng = convnext.GlobalResponseNorm(), np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    params = {name: rng.normal(size=5).astype(np.float32) for name in ("scale", "bias")}
    norms = np.sqrt((x**2).sum((1, 2), keepdims=True))
    relative = norms / norms.mean(-1, keepdims=True)
    want = params["scale"] * (x * relative) + params["bias"] + x
    np.testing.assert_allclose(norm.apply({"params": params}, x), want, rtol=1e-4, atol=1e-5)
    assert all(not leaf.any() for leaf in norm.init(jax.random.key(0), x)["params"].values())


def test_a_channel_of_zeros_has_a_finite_gradient():
    norm = convnext.GlobalResponseNorm()
    params = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    x = jnp.ones((1, 2, 2, 3)).at[..., 1].set(0)
    gradient = jax.grad(lambda x: jnp.sum(norm.apply({"params": params}, x) ** 2))
    gradient = jax.jit(gradient)(x)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("name", "args", "size", "message"),
    [
        ("convnext_atto", {"depths": (1, 1)}, 32, "depths must be four numbers of at least 1"),
        ("convnext_atto", {"dims": (4, 6, 8, 0)}, 32, "dims must be four numbers of at least 1"),
        ("convnext_atto", {"stem": "cifar10"}, 32, "did you mean cifar"),
        ("convnext_atto", {}, 31, "at least 32 pixels a side, not 31x31"),
        ("convnext_atto_32", {}, 7, "at least 8 pixels a side, not 7x7"),
    ],
)
def test_wrong_values(name, args, size, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(tiny(name, **args).init, jax.random.key(0), images(1, size))
