import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.networks import count_parameters, images, init, shapes
from xkd_jax.errors import UserError
from xkd_jax.models.mobilenetv2 import VARIANTS

pytestmark = pytest.mark.usefixtures("quick_compilation")

# timm's counts of trainable parameters, with 1000 classes.
TIMM_COUNTS = {
    "mobilenetv2_035": 1_677_128,
    "mobilenetv2_050": 1_968_680,
    "mobilenetv2_075": 2_636_424,
    "mobilenetv2_100": 3_504_872,
    "mobilenetv2_140": 6_108_776,
    "mobilenetv2_110d": 4_516_520,
    "mobilenetv2_120d": 5_831_144,
}


def build(name="mobilenetv2_100_32", **args):
    variant = VARIANTS[name]
    return variant.network(**{**variant.args, **args})


def tiny(**args):
    return build(**{"width": 0.25, "depth": 0.25, "num_classes": 5, **args})


@pytest.mark.parametrize("name", TIMM_COUNTS)
def test_parameter_count_is_timms(name):
    assert count_parameters(build(name)) == TIMM_COUNTS[name]


def test_blocks_have_no_squeeze_and_excitation():
    params = jax.eval_shape(tiny().init, jax.random.key(0), images(1))["params"]
    assert params["blocks_0_0"].keys() == {"conv_dw", "bn1", "conv_pw", "bn2"}
    assert params["blocks_6_0"].keys() == {"conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"}


@pytest.mark.parametrize(
    ("name", "size", "sides"),
    [
        ("mobilenetv2_100", 224, (56, 28, 14, 7)),
        ("mobilenetv2_100_32", 32, (32, 16, 8, 4)),
    ],
)
def test_out(name, size, sides):
    expected: dict[str, tuple[int, ...]] = {"pooled": (2, 1280), "logits": (2, 7)}
    for stage, (side, channels) in enumerate(zip(sides, (24, 32, 96, 320), strict=True), start=1):
        expected[f"stage{stage}"] = expected[f"stage{stage}_pre"] = (2, side, side, channels)
    x = jnp.zeros((2, size, size, 3))
    assert shapes(build(name, num_classes=7), x, train=size == 32) == expected


@pytest.mark.parametrize(
    ("args", "stem", "head"),
    [
        ({"width": 0.5}, 16, 1280),
        ({"width": 1.4}, 48, 1792),
        ({"width": 1.4, "fix_stem_head": True}, 32, 1280),
    ],
)
def test_the_head_never_narrows(args, stem, head):
    params = jax.eval_shape(build(**args).init, jax.random.key(0), images(1))["params"]
    assert params["conv_stem"]["kernel"].shape[-1] == stem
    assert params["conv_head"]["kernel"].shape[-1] == head


def test_activations_stop_at_six():
    model = tiny()
    variables = init(model)
    variables["params"]["bn2"]["bias"] += 100.0
    _, out = jax.jit(model.apply)(variables, images())
    np.testing.assert_array_equal(out["pooled"], 6.0)


@pytest.mark.slow
def test_gradients_and_statistics():
    model, x = tiny(), images(4)
    variables = init(model)

    def loss(params):
        (logits, _), new = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return jax.nn.log_softmax(logits)[:, 0].sum(), new["batch_stats"]

    grads, new = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(variables["params"]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), path
        assert leaf.any(), path
    for path, var in jax.tree_util.tree_leaves_with_path(new):
        assert path[-1].key == "mean" or not np.allclose(var, 1.0), path


def test_wrong_values():
    with pytest.raises(UserError, match="width must be above 0"):
        jax.eval_shape(tiny(width=-0.5).init, jax.random.key(0), images(1))
