import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.networks import images, init, shapes
from xkd_jax.errors import UserError
from xkd_jax.models.xception import VARIANTS, Block, Xception

pytestmark = pytest.mark.usefixtures("quick_compilation")


def tiny(**args):
    return Xception(**{"width": 1 / 16, "num_classes": 5, **args})


def build(name):
    variant = VARIANTS[name]
    return variant.network(**variant.args)


def test_parameters_are_timms():
    model = build("legacy_xception")
    variables = jax.eval_shape(model.init, jax.random.key(0), images(1))
    params = variables["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_855_952
    assert params["block1"].keys() == {"skip", "skipbn", "rep_0", "rep_1", "rep_3", "rep_4"}
    assert params["block2"].keys() == {"skip", "skipbn", "rep_1", "rep_2", "rep_4", "rep_5"}
    assert params["block4"].keys() == {f"rep_{i}" for i in (1, 2, 4, 5, 7, 8)}
    # The last block grows in its last convolution only.
    assert params["block12"]["rep_1"]["pointwise"]["kernel"].shape == (1, 1, 728, 728)
    assert params["block12"]["rep_4"]["pointwise"]["kernel"].shape == (1, 1, 728, 1024)
    assert params["conv4"]["conv1"]["kernel"].shape == (3, 3, 1, 1536)
    assert VARIANTS["legacy_xception"].image_size == 299


def test_out():
    expected = {"pooled": (2, 2048), "logits": (2, 1000)}
    sides, widths = (74, 37, 19, 10), (128, 256, 728, 2048)
    for stage, (side, width) in enumerate(zip(sides, widths, strict=True), start=1):
        expected[f"stage{stage}"] = expected[f"stage{stage}_pre"] = (2, side, side, width)
    x = jnp.zeros((2, 299, 299, 3))
    assert shapes(build("legacy_xception"), x) == expected
    assert shapes(tiny(), jnp.zeros((1, 7, 9, 3)))["stage4"] == (1, 1, 1, 128)


def test_every_channel_count_is_multiplied():
    def kernels(name):
        model = build(name)
        params = jax.eval_shape(model.init, jax.random.key(0), images(1))["params"]
        return jax.tree.map(lambda leaf: leaf.shape[-1], {**params, "fc": None})

    one, two = kernels("legacy_xception"), kernels("legacy_xception_x2")
    assert two == jax.tree.map(lambda width: 2 * width, one)


@pytest.mark.slow
def test_training_pass():
    model, x = tiny(drop_rate=0.5), images(4)
    variables = init(model)

    @jax.jit
    def train(key):
        return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    (one, out), new = train(jax.random.key(0))
    for stage in range(1, 5):
        assert jnp.array_equal(out[f"stage{stage}"], jax.nn.relu(out[f"stage{stage}_pre"]))
        assert (out[f"stage{stage}_pre"] < 0).any()
    np.testing.assert_allclose(out["pooled"], out["stage4"].mean((1, 2)), atol=1e-6)
    for old, stats in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(new["batch_stats"]), strict=True
    ):
        assert stats.dtype == jnp.float32
        assert not jnp.allclose(old, stats)
    (two, same), _ = train(jax.random.key(1))
    assert not jnp.allclose(one, two)
    assert jnp.array_equal(out["pooled"], same["pooled"])  # dropout comes after what methods see
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda: model.apply(variables, x, train=True, mutable=["batch_stats"]))


def test_bfloat16_computes_in_bfloat16():
    model = tiny(dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), images(1))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    _, out = jax.eval_shape(model.apply, variables, images())
    assert out.pop("logits").dtype == jnp.float32
    assert {leaf.dtype for leaf in out.values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "args", [{"stride": 2, "start_with_relu": False}, {"stride": 2, "grow_first": False}, {}]
)
def test_gradients_reach_every_parameter_of_a_block(args):
    x = images(2, 8)
    block = Block(4 if args else 3, **args)
    variables = init(block, 8)

    def loss(params):
        y, _ = block.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.square(y).sum()

    grads = jax.jit(jax.grad(loss))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(leaf).all(), path
        assert leaf.any(), path


def test_shortcut_goes_round_the_activation():
    block = Block(4)
    x = -jnp.ones((1, 4, 4, 4))
    variables = jax.jit(block.init)(jax.random.key(0), x)
    assert jnp.array_equal(block.apply(variables, x), x)


def test_starts_as_timms():
    def run(key):
        params = tiny().init(key, images(1))["params"]
        return params["conv4"], params["bn4"], params["fc"]

    conv, norm, fc = jax.jit(run)(jax.random.key(0))
    # Kaiming, fan out, where the fan of a convolution by channel is that of all channels.
    np.testing.assert_allclose(conv["conv1"]["kernel"].std(), (2 / (9 * 96)) ** 0.5, rtol=0.1)
    np.testing.assert_allclose(conv["pointwise"]["kernel"].std(), (2 / 128) ** 0.5, rtol=0.05)
    assert norm["scale"].all()
    bound = 128**-0.5
    assert 0.9 * bound < jnp.abs(fc["kernel"]).max() <= bound


@pytest.mark.parametrize(
    ("args", "size", "message"),
    [
        ({"width": 0.01}, 32, "width must leave at least one channel of the stem's 32, not 0.01"),
        ({}, 6, "at least 7 pixels a side, not 6x6"),
    ],
)
def test_wrong_values(args, size, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(tiny(**args).init, jax.random.key(0), images(1, size))
