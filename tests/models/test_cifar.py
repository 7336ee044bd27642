import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.networks import images, init, shapes
from xkd_jax.errors import UserError
from xkd_jax.models.cifar import VARIANTS, CifarResNet, CifarVGG, WideBlock, WideResNet

pytestmark = pytest.mark.usefixtures("quick_compilation")

# With 100 classes; the literature prints them in millions.
COUNTS = {
    "resnet8": 83_892,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
}


def resnet(**args):
    return CifarResNet(**{"depth": 8, "channels": (4, 4, 8, 16), "num_classes": 5, **args})


def wide(**args):
    return WideResNet(**{"depth": 10, "widen_factor": 1, "num_classes": 5, **args})


def vgg(**args):
    channels = ((4,), (4, 8), (8,), (16,), (16,))
    return CifarVGG(**{"channels": channels, "num_classes": 5, **args})


def build(name):
    variant = VARIANTS[name]
    return variant.network(**variant.args)


def test_every_variant_has_the_published_count():
    assert VARIANTS.keys() == COUNTS.keys()
    for name, count in COUNTS.items():
        model = build(name)
        hash(model)  # jit needs it
        variables = jax.eval_shape(model.init, jax.random.key(0), images(1))
        leaves = jax.tree.leaves(variables["params"])
        assert sum(leaf.size for leaf in leaves) == count, name
        assert all(leaf.dtype == jnp.float32 for leaf in leaves)
        assert VARIANTS[name].image_size == 32


def test_parameters_have_the_published_names():
    def params(model):
        return jax.eval_shape(model.init, jax.random.key(0), images(1))["params"]

    tree = params(build("resnet8x4"))
    assert tree.keys() == {"conv1", "bn1", "layer1_0", "layer2_0", "layer3_0", "fc"}
    # The widening from stem to first group projects too.
    assert tree["layer1_0"]["downsample_0"]["kernel"].shape == (1, 1, 32, 64)
    assert tree["layer2_0"].keys() >= {"conv1", "bn1", "conv2", "bn2", "downsample_1"}
    assert "downsample_0" not in params(build("resnet20"))["layer1_0"]
    tree = params(build("wrn_16_2"))
    assert tree.keys() == {"conv1", "block1", "block2", "block3", "bn1", "fc"}
    assert tree["block1"].keys() == {"layer_0", "layer_1"}
    assert tree["block1"]["layer_0"]["convShortcut"]["kernel"].shape == (1, 1, 16, 32)
    assert "convShortcut" not in params(build("wrn_16_1"))["block1"]["layer_0"]
    tree = params(build("vgg13"))
    assert {"block0_0", "block0_1", "block0_3", "block0_4", "classifier"} < tree.keys()
    assert tree["block0_0"].keys() == {"kernel", "bias"}


@pytest.mark.parametrize(
    ("name", "sides", "channels"),
    [
        ("resnet20", (32, 32, 16, 8), (16, 16, 32, 64)),
        ("resnet8x4", (32, 32, 16, 8), (32, 64, 128, 256)),
        ("wrn_16_2", (32, 32, 16, 8), (16, 32, 64, 128)),
        ("vgg8", (16, 8, 4, 4), (128, 256, 512, 512)),
    ],
)
def test_out(name, sides, channels):
    expected = {"pooled": (2, channels[-1]), "logits": (2, 100)}
    for stage, (side, width) in enumerate(zip(sides, channels, strict=True), start=1):
        expected[f"stage{stage}"] = expected[f"stage{stage}_pre"] = (2, side, side, width)
    assert shapes(build(name), images()) == expected
    assert shapes(build(name), images(), train=True) == expected


def test_other_sizes():
    x = jnp.zeros((1, 21, 13, 3))
    assert shapes(resnet(), x)["stage4"] == (1, 6, 4, 16)
    assert shapes(wide(), x)["stage4"] == (1, 6, 4, 64)
    assert shapes(vgg(), x)["stage4"] == (1, 2, 1, 16)
    # The literature pools once more for Tiny ImageNet.
    assert shapes(vgg(), images(1, 64))["stage4"] == (1, 4, 4, 16)


@pytest.mark.parametrize("make", [resnet, wide, vgg])
def test_stages_and_the_pooled_features(make):
    model, x = make(), images()
    variables = init(model)
    want, out = jax.jit(model.apply)(variables, x)
    for stage in range(1, 5):
        pre, after = out[f"stage{stage}_pre"], out[f"stage{stage}"]
        assert (pre < 0).any()
        if make is wide:
            # Running statistics 0 and 1 leave the norm after the sum nothing but its epsilon.
            np.testing.assert_allclose(pre, after, rtol=1e-4)
            assert not jnp.array_equal(pre, after)
        else:
            assert jnp.array_equal(after, jax.nn.relu(pre))
    pooled = jax.nn.relu(out["stage4_pre"]).mean((1, 2))
    np.testing.assert_allclose(out["pooled"], pooled, atol=1e-5)

    logits, out = jax.jit(make(dtype=jnp.bfloat16).apply)(variables, x)
    assert logits.dtype == jnp.float32
    for key in ("stage1", "stage4_pre", "pooled"):
        assert out[key].dtype == jnp.bfloat16
    assert jnp.abs(logits - want).max() < 0.05 * jnp.abs(want).max()


def test_projection_of_a_wide_block_is_behind_the_activation():
    block = WideBlock(8, stride=2)
    variables = jax.jit(block.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 4)))
    x = -jnp.ones((1, 4, 4, 4))
    y, pre = block.apply(variables, x)
    assert (pre < 0).all()
    assert not y.any()


@pytest.mark.slow
@pytest.mark.parametrize(("make", "behind"), [(resnet, True), (wide, False), (vgg, True)])
def test_training_reaches_everything(make, behind):
    model, x = make(drop_rate=0.5), images(4)
    variables = init(model)

    def loss(params, key):
        (logits, out), new = model.apply(
            {**variables, "params": params},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return jax.nn.log_softmax(logits)[:, 0].sum(), (logits, out["pooled"], new)

    step = jax.jit(jax.grad(loss, has_aux=True))
    grads, (one, pooled, new) = step(variables["params"], jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(leaf).all(), path
        assert leaf.any(), path
    for old, stats in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(new["batch_stats"]), strict=True
    ):
        assert stats.dtype == jnp.float32
        assert not jnp.allclose(old, stats)
    _, (two, same, _) = step(variables["params"], jax.random.key(1))
    assert not jnp.allclose(one, two)
    # Wide ResNets drop inside their blocks, the others after what methods see.
    assert jnp.array_equal(pooled, same) == behind
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda: model.apply(variables, x, train=True, mutable=["batch_stats"]))


def test_starts_as_the_published_code():
    def run(key):
        model = resnet(channels=(16, 16, 32, 64))
        params = model.init(key, images(1))["params"]
        wider = wide().init(key, images(1))["params"]
        plain = vgg(channels=((4,), (4,), (4,), (32,), (64,))).init(key, images(1))["params"]
        return (
            (params["layer3_0"], params["fc"]),
            wider["block3"]["layer_0"],
            (plain["block4_0"], plain["classifier"]),
        )

    (block, fc), wider, (last, classifier) = jax.jit(run)(jax.random.key(0))
    # Kaiming, fan out: 3 * 3 * 64 outputs per weight.
    for leaf in (block["conv2"], wider["conv2"], last):
        np.testing.assert_allclose(leaf["kernel"].std(), (2 / (9 * 64)) ** 0.5, rtol=0.05)
    np.testing.assert_allclose(block["downsample_0"]["kernel"].std(), (2 / 64) ** 0.5, rtol=0.05)
    assert block["bn2"]["scale"].all()
    assert not last["bias"].any()
    bound = 64**-0.5
    assert 0.9 * bound < jnp.abs(fc["kernel"]).max() <= bound
    np.testing.assert_allclose(classifier["kernel"].std(), 0.01, rtol=0.15)


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        (resnet(depth=18), 32, r"depth must be 6n \+ 2"),
        (resnet(depth=2), 32, r"an integer n >= 1, not 2"),
        (resnet(channels=(16, 32, 64)), 32, "channels must be four positive numbers"),
        (wide(depth=18), 32, r"depth must be 6n \+ 4"),
        (wide(widen_factor=0), 32, "widen_factor must be at least 1"),
        (vgg(channels=((64,), (128,))), 32, "channels must be five blocks"),
        (vgg(channels=((64,), (128,), (), (512,), (512,))), 32, "at least one positive number"),
        (vgg(), 7, "at least 8 pixels a side, not 7x7"),
    ],
)
def test_wrong_values(model, size, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), images(1, size))
