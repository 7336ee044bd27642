import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.networks import images, init
from xkd_jax import backend
from xkd_jax.errors import UserError
from xkd_jax.models.inception import (
    VARIANTS,
    AuxHead,
    InceptionV3,
    MixedA,
    MixedB,
    MixedC,
    MixedD,
    MixedE,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tree():
    """The shapes of the variables, with the auxiliary classifier, from small images."""
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), images(1, 75))


def without_aux(variables):
    return {
        name: {key: leaf for key, leaf in tree.items() if key != "AuxLogits"}
        for name, tree in variables.items()
    }


def size(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_parameters_are_timms(tree):
    params = tree["params"]
    assert size(params) == 27_161_264
    assert params["Conv2d_3b_1x1"]["conv"]["kernel"].shape == (1, 1, 64, 80)
    assert params["Mixed_6b"]["branch7x7_2"]["conv"]["kernel"].shape == (1, 7, 128, 128)
    assert params["Mixed_7c"]["branch3x3dbl_3b"]["conv"]["kernel"].shape == (3, 1, 384, 384)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tree))
    bare = InceptionV3(aux_logits=False)
    bare = jax.eval_shape(bare.init, jax.random.key(0), images(1, 75))
    assert size(bare["params"]) == 23_834_568
    assert bare == without_aux(tree)
    assert VARIANTS["inception_v3"].image_size == 299


@pytest.mark.parametrize(
    ("aux", "train", "convolutions"), [(True, False, 94), (True, True, 96), (False, True, 94)]
)
def test_auxiliary_classifier_runs_in_training_alone(tree, aux, train, convolutions):
    model = InceptionV3(aux_logits=aux, dtype=jnp.bfloat16)
    with backend.assume("tpu"):
        jaxpr, ((_, out), _) = jax.make_jaxpr(
            lambda variables, x: model.apply(variables, x, train=train, mutable=["batch_stats"]),
            return_shape=True,
        )(tree if aux else without_aux(tree), jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32))
    assert str(jaxpr).count("conv_general_dilated[") == convolutions

    expected = {"pooled": (2, 2048), "logits": (2, 1000)}
    sides, widths = (71, 35, 17, 8), (192, 288, 768, 2048)
    for stage, (side, width) in enumerate(zip(sides, widths, strict=True), start=1):
        expected[f"stage{stage}"] = expected[f"stage{stage}_pre"] = (2, side, side, width)
    if aux and train:
        expected["aux_logits"] = (2, 1000)
    assert {key: leaf.shape for key, leaf in out.items()} == expected
    for key, leaf in out.items():
        assert leaf.dtype == (jnp.float32 if key.endswith("logits") else jnp.bfloat16), key


@pytest.mark.slow
def test_training_pass():
    model, x = InceptionV3(num_classes=5, aux_logits=False, drop_rate=0.5), images(4, 75)
    variables = init(model, 75)

    @jax.jit
    def train(variables, key):
        return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    (one, out), new = train(variables, jax.random.key(0))
    assert out["stage4"].shape == (4, 1, 1, 2048)
    for stage in range(1, 5):
        assert jnp.array_equal(out[f"stage{stage}"], jax.nn.relu(out[f"stage{stage}_pre"]))
        assert (out[f"stage{stage}_pre"] < 0).any()
    np.testing.assert_allclose(out["pooled"], out["stage4"].mean((1, 2)), atol=1e-6)
    for old, stats in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(new["batch_stats"]), strict=True
    ):
        assert stats.dtype == jnp.float32
        assert not jnp.allclose(old, stats)
    (two, same), _ = train(variables, jax.random.key(1))
    assert not jnp.allclose(one, two)
    assert jnp.array_equal(out["pooled"], same["pooled"])  # dropout comes after what methods see
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda: model.apply(variables, x, train=True, mutable=["batch_stats"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "side"),
    [(MixedA(), 5), (MixedB(), 5), (MixedC(), 7), (MixedD(), 5), (MixedE(), 5), (AuxHead(5), 17)],
)
def test_gradients_reach_every_parameter(module, side):
    x = images(2, side)
    variables = init(module, side)

    def loss(params):
        y, new = module.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.square(y).sum(), new

    grads, new = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(leaf).all(), path
        assert leaf.any(), path
    assert all(leaf.any() for leaf in jax.tree.leaves(new))


def test_reduction_keeps_the_strongest_of_its_input():
    module = MixedB()
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(1, 5, 5, 3)), jnp.float32)
    y = jax.jit(module.apply)(init(module, 5), x)
    assert y.shape == (1, 2, 2, 384 + 96 + 3)
    assert jnp.array_equal(y[0, 0, 0, -3:], x[0, :3, :3].max((0, 1)))


def test_starts_as_timms():
    def run(key):
        params = InceptionV3().init(key, images(1, 75))["params"]
        return params["Mixed_5b"]["branch1x1"], params["fc"], params["AuxLogits"]["fc"]

    conv, fc, aux = jax.jit(run)(jax.random.key(0))
    for leaf, std in ((conv["conv"], 0.1), (fc, 0.1), (aux, 0.001)):
        np.testing.assert_allclose(leaf["kernel"].std(), std, rtol=0.05)
    assert conv["bn"]["scale"].all()


@pytest.mark.parametrize(
    ("side", "train", "message"),
    [
        (74, False, "at least 75 pixels a side, not 74x74"),
        (298, True, "at least 299 pixels a side, not 298x298; set aux_logits=False"),
    ],
)
def test_wrong_sizes(side, train, message):
    x = images(1, side)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda key: InceptionV3().init(key, x, train=train), jax.random.key(0))
