import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.models.networks import images, init, shapes
from xkd_jax.errors import UserError
from xkd_jax.models.efficientnet import VARIANTS
from xkd_jax.models.inverted_residual import InvertedResidual, round_channels

pytestmark = pytest.mark.usefixtures("quick_compilation")

# timm's counts of trainable parameters, with 1000 classes.
TIMM_COUNTS = {
    "b0": ("efficientnet_b0", {}, 5_288_548),
    "b2": ("efficientnet_b0", {"width": 1.1, "depth": 1.2}, 9_109_994),
    "lite0": ("tf_efficientnet_lite0", {}, 4_652_008),
    "lite2": ("tf_efficientnet_lite0", {"width": 1.1, "depth": 1.2}, 6_092_072),
}


def build(name="efficientnet_b0_32", **args):
    variant = VARIANTS[name]
    return variant.network(**{**variant.args, **args})


def tiny(name="efficientnet_b0_32", **args):
    return build(name, **{"width": 0.25, "depth": 0.25, "num_classes": 5, **args})


def apply(model, variables, x):
    return jax.device_get(jax.jit(model.apply)(variables, x))


@pytest.fixture(scope="module")
def trained(quick_compilation):
    """Two calls of the same step with other dropout keys: gradients, intermediates, statistics."""
    model, x = tiny(drop_rate=0.5), images(4)
    variables = init(model)

    def loss(params, key):
        (logits, out), new = model.apply(
            {**variables, "params": params},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return jax.nn.log_softmax(logits)[:, 0].sum(), (out, new["batch_stats"])

    step = jax.jit(jax.grad(loss, has_aux=True))
    runs = [step(variables["params"], jax.random.key(seed)) for seed in (0, 1)]
    return variables, x, jax.device_get(runs)


@pytest.mark.parametrize("case", TIMM_COUNTS)
def test_parameter_count_is_timms(case):
    name, args, count = TIMM_COUNTS[case]
    variables = jax.eval_shape(build(name, **args).init, jax.random.key(0), images(1))
    leaves = jax.tree.leaves(variables["params"])
    assert sum(leaf.size for leaf in leaves) == count
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_parameters_have_timms_names():
    params = jax.eval_shape(tiny().init, jax.random.key(0), images(1))["params"]
    assert {"conv_stem", "bn1", "conv_head", "bn2", "classifier"} < params.keys()
    first, second = params["blocks_0_0"], params["blocks_1_0"]
    assert first.keys() == {"conv_dw", "bn1", "se", "conv_pw", "bn2"}
    assert second.keys() == {"conv_pw", "bn1", "conv_dw", "bn2", "se", "conv_pwl", "bn3"}
    assert second["conv_dw"]["kernel"].shape == (3, 3, 1, 48)
    assert second["se"]["conv_reduce"]["kernel"].shape == (1, 1, 48, 2)
    assert second["se"]["conv_expand"].keys() == {"kernel", "bias"}


def test_channels_round_to_multiples_of_eight():
    assert [round_channels(n, 1.0) for n in (16, 40, 1280)] == [16, 40, 1280]
    assert round_channels(32, 1.1) == 32  # 35.2
    assert round_channels(16, 1.2) == 24  # 19.2, and 16 would lose more than a tenth
    assert round_channels(16, 0.05) == 8


@pytest.mark.parametrize(
    ("name", "size", "sides"),
    [
        ("efficientnet_b0", 224, (56, 28, 14, 7)),
        ("tf_efficientnet_lite0", 224, (56, 28, 14, 7)),
        ("efficientnet_b0", 97, (25, 13, 7, 4)),
        ("efficientnet_b0_32", 32, (32, 16, 8, 4)),
    ],
)
def test_out(name, size, sides):
    expected: dict[str, tuple[int, ...]] = {"pooled": (2, 1280), "logits": (2, 1000)}
    for stage, (side, channels) in enumerate(zip(sides, (24, 40, 112, 320), strict=True), start=1):
        expected[f"stage{stage}"] = expected[f"stage{stage}_pre"] = (2, side, side, channels)
    x = jnp.zeros((2, size, size, 3))
    assert shapes(build(name), x, train=size == 32) == expected


@pytest.mark.slow
def test_same_padding_is_uneven_where_the_stride_asks_for_it():
    same, even = (tiny("tf_efficientnet_lite0", padding=padding) for padding in ("SAME", None))
    variables = init(same)
    # Every strided convolution of 33, 17, 9, 5 and 3 pixels pads both sides alike.
    for size, differs in ((33, False), (32, True)):
        (_, one), (_, two) = (apply(model, variables, images(size=size)) for model in (same, even))
        for key in ("stage1", "stage2", "stage3", "stage4"):
            assert one[key].shape == two[key].shape
            error = np.abs(one[key] - two[key]).max() / np.abs(one[key]).max()
            assert (error > 0.01) == differs


def test_drop_path_rises_from_zero():
    rates = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, InvertedResidual) and context.method_name == "__call__":
            rates.append(context.module.drop_path)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(build(drop_path_rate=0.2).init, jax.random.key(0), images(1))
    np.testing.assert_allclose(rates, [0.2 * i / 16 for i in range(16)])


def test_drop_path_drops_whole_samples():
    block = InvertedResidual(8, drop_path=0.5, squeeze_excite="efficientnet")
    x = np.random.default_rng(0).normal(size=(16, 4, 4, 8)).astype(np.float32)

    def run(key, rngs):
        variables = block.init(key, x)
        return block.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)[0][0]

    y = jax.jit(run)(jax.random.key(0), {"dropout": jax.random.key(1)})
    same = np.all(y == x, axis=(1, 2, 3))
    assert 0 < same.sum() < 16
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(run, jax.random.key(0), {})


def test_drop_rate_spares_the_intermediates(trained):
    _, _, [(_, (one, _)), (_, (two, _))] = trained
    assert not np.allclose(one["logits"], two["logits"])
    for key in ("stage4", "pooled"):
        assert np.array_equal(one[key], two[key])


def test_starts_as_timms():
    def run(key):
        params = build(width=0.5, depth=0.25, num_classes=100).init(key, images(1))["params"]
        return [params[name] for name in ("conv_stem", "blocks_5_0", "classifier")]

    stem, block, head = jax.jit(run)(jax.random.key(0))
    # Google's: normal, the variance two over the outputs that one input reaches.
    for leaf, fan_out in (
        (stem, 9 * 16),
        (block["conv_pw"], 56 * 6),
        (block["conv_dw"], 25),
        (block["se"]["conv_reduce"], 14),
        (block["conv_pwl"], 96),
    ):
        np.testing.assert_allclose(leaf["kernel"].std(), (2 / fan_out) ** 0.5, rtol=0.1)
    assert not block["se"]["conv_expand"]["bias"].any()
    assert block["bn3"]["scale"].all()
    assert 0.099 < jnp.abs(head["kernel"]).max() <= 0.1  # uniform, to 1 / sqrt(num_classes)
    assert not head["bias"].any()


def test_gradients_reach_every_parameter(trained):
    _, _, [(grads, _), _] = trained
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all(), path
        assert leaf.any(), path


def test_training_changes_the_statistics(trained):
    variables, x, [(_, (_, new)), _] = trained
    for path, var in jax.tree_util.tree_leaves_with_path(new):
        assert var.dtype == jnp.float32
        # The mean after a linear bottleneck stays 0, because that of its input is.
        assert path[-1].key == "mean" or not np.allclose(var, 1.0), path
    # One step of momentum 0.9 from zero mean: the batch's mean is ten times what is stored.
    first = jax.lax.conv_general_dilated(
        x,
        variables["params"]["conv_stem"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(new["bn1"]["mean"], 0.1 * first.mean((0, 1, 2)), atol=1e-5)


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16():
    model, full, x = tiny(dtype=jnp.bfloat16), tiny(), images(1, size=16)
    variables = init(model)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    logits, out = apply(model, variables, x)
    assert logits.dtype == jnp.float32
    want, exact = apply(full, variables, x)
    assert np.abs(logits - want).max() < 0.05 * np.abs(want).max()
    for key in ("stage1", "stage2", "stage3", "stage4"):
        assert out[key].dtype == jnp.bfloat16
        assert np.array_equal(exact[key], exact[f"{key}_pre"])
        assert (exact[key] < 0).any()  # a linear bottleneck ends without an activation
    assert out["pooled"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"stem": "cifar10"}, "did you mean cifar"),
        ({"activation": "swish"}, "did you mean hard_swish"),
        ({"padding": "same"}, "None or 'SAME', not 'same'"),
        ({"width": 0.0}, "width must be above 0, not 0.0"),
        ({"depth": -1.0}, "depth must be above 0"),
    ],
)
def test_wrong_values(args, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(build(**args).init, jax.random.key(0), images(1))
