import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.networks import images, init, initial, shapes, tiny_resnet
from xkd_jax.models import create_model
from xkd_jax.models.resnet import halve

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_every_channel_count_is_multiplied():
    x = jnp.zeros((1, 64, 64, 3))
    one = shapes(create_model("resnet50", num_classes=3), x)
    two = shapes(create_model("resnet50x2", num_classes=3), x)
    for key in ("stage1", "stage4_pre", "pooled"):
        assert two[key] == (*one[key][:-1], 2 * one[key][-1])
    variables = jax.eval_shape(
        create_model("resnet50x2", num_classes=3).init, jax.random.key(0), x
    )["params"]
    assert variables["conv1"]["kernel"].shape == (7, 7, 3, 128)
    assert variables["layer1_0"]["conv2"]["kernel"].shape == (3, 3, 128, 128)


def test_resnet_out():
    stages = {"stage1": (2, 32, 32, 8), "stage2": (2, 16, 16, 16),
              "stage3": (2, 8, 8, 32), "stage4": (2, 4, 4, 64)}  # fmt: skip
    expected = {"pooled": (2, 64), "logits": (2, 5)}
    for key, shape in stages.items():
        expected |= {key: shape, f"{key}_pre": shape}
    assert shapes(tiny_resnet(), images()) == expected
    assert shapes(tiny_resnet(), images(), train=True) == expected
    wide = shapes(tiny_resnet("resnet50"), images())
    assert wide["stage4"] == (2, 4, 4, 256)
    assert wide["pooled"] == (2, 256)
    assert shapes(tiny_resnet(stem="imagenet"), images(size=64))["stage4"] == (2, 2, 2, 64)


@pytest.mark.parametrize("sides", [(4, 5), (5, 7)])
def test_averages_at_the_edge_are_of_what_is_there(sides):
    x = np.random.default_rng(0).normal(size=(2, *sides, 3)).astype(np.float32)
    got = halve(x)
    assert got.shape == (2, -(-sides[0] // 2), -(-sides[1] // 2), 3)
    for i in range(got.shape[1]):
        for j in range(got.shape[2]):
            window = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            np.testing.assert_allclose(got[:, i, j], window.mean((1, 2)), atol=1e-6)


def test_resnet_d_out():
    args = {"layers": (1, 1, 1, 1), "width": 0.125}
    model = create_model("resnet26d", num_classes=5, **args)
    out = shapes(model, images(size=33))
    assert [out[f"stage{i}"][1] for i in range(1, 5)] == [9, 5, 3, 2]
    params = jax.eval_shape(model.init, jax.random.key(0), images(size=33))["params"]
    assert [params[f"conv1_{i}"]["kernel"].shape[-1] for i in (0, 3, 6)] == [4, 4, 8]
    assert "downsample_0" not in params["layer1_0"]
    assert params["layer1_0"]["downsample_1"]["kernel"].shape == (1, 1, 8, 32)


def test_resnet_training_changes_the_statistics():
    model = tiny_resnet()
    variables, x = init(model), images(8)
    (logits, out), new = jax.jit(lambda v: model.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables
    )
    for old, stats in zip(
        jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(new["batch_stats"]), strict=True
    ):
        assert stats.dtype == jnp.float32
        assert not jnp.allclose(old, stats)
    for stage in range(1, 5):
        assert jnp.array_equal(out[f"stage{stage}"], jax.nn.relu(out[f"stage{stage}_pre"]))
        assert (out[f"stage{stage}_pre"] < 0).any()
    still, _ = jax.jit(model.apply)(variables, x)
    assert not jnp.allclose(still, logits)
    # One step of momentum 0.9 from zero mean: the batch's mean is ten times what is stored.
    kernel = variables["params"]["conv1"]["kernel"]
    first = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(
        new["batch_stats"]["bn1"]["mean"], 0.1 * first.mean((0, 1, 2)), atol=1e-5
    )


def test_resnet_drop_rate_needs_a_key():
    model = tiny_resnet(drop_rate=0.5)

    def run(variables, rngs):
        return model.apply(variables, images(), train=True, mutable=["batch_stats"], rngs=rngs)

    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(run, init(model), {})
    run = jax.jit(run)
    (one, out), _ = run(init(model), {"dropout": jax.random.key(0)})
    (two, same), _ = run(init(model), {"dropout": jax.random.key(1)})
    assert not jnp.allclose(one, two)
    assert jnp.array_equal(out["pooled"], same["pooled"])  # dropout comes after what methods see


def test_resnet_starts_as_timms():
    block, fc = initial(tiny_resnet(), "layer4_0", "fc")
    assert not block["bn2"]["scale"].any()  # a new block starts as the identity
    assert block["bn1"]["scale"].all()
    # Kaiming, fan out: 3 * 3 * 64 outputs per weight.
    np.testing.assert_allclose(block["conv2"]["kernel"].std(), (2 / (9 * 64)) ** 0.5, rtol=0.05)
    bound = 64**-0.5
    assert 0.9 * bound < jnp.abs(fc["kernel"]).max() <= bound
    assert not fc["bias"].any()
    (block,) = initial(tiny_resnet(zero_init_last=False), "layer1_0")
    assert block["bn2"]["scale"].all()
