"""What the second version of Swin Transformers does otherwise than the first."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.networks import images, init
from xkd_jax.errors import UserError
from xkd_jax.models import create_model, swinv2
from xkd_jax.models.swinv2 import SwinTransformerV2, WindowAttention, log_coordinates

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = {
    "num_classes": 5,
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 2, 4),
}


def tiny(**args):
    return SwinTransformerV2(**{**TINY, **args})


def test_32x32_images_end_at_2x2():
    args = {"embed_dim": 8, "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)}
    model = create_model("swinv2_tiny_patch2_window4_32", num_classes=5, **args)
    (_, out), _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images())
    assert [out[f"stage{i}"].shape[1] for i in range(1, 5)] == [16, 8, 4, 2]
    assert out["bias"].shape == out["block04_bias"].shape == (1, 2, 4, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"pretrained_window_sizes": (8, 8)}, "must be four numbers"),
        ({"pretrained_window_sizes": (8, 8, 8, -1)}, "none below 0"),
        ({"num_heads": (1, 3, 2, 4)}, "stage 2 has 16 channels .* multiple of its num_heads 3"),
    ],
)
def test_wrong_values(args, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(tiny(**args).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_coordinates_are_log_spaced():
    end, middle = np.log2(9) / 3, np.log2(5) / 3
    line = [-end, -middle, 0, middle, end]
    want = [(row, column) for row in line for column in line]
    np.testing.assert_allclose(log_coordinates(3, 0), want, rtol=1e-6)
    assert not log_coordinates(1, 0).any()


def test_near_neighbours_keep_their_coordinates_in_larger_windows():
    large = log_coordinates(6, 3).reshape(11, 11, 2)
    np.testing.assert_array_equal(large[3:8, 3:8].reshape(-1, 2), log_coordinates(3, 0))


ATTENTION = WindowAttention(num_heads=2, window_size=4, shifted=False)
X = np.random.default_rng(1).normal(size=(2, 16, 8)).astype(np.float32)
attend = jax.jit(lambda params: ATTENTION.apply({"params": params}, X)[1])


def random_params(layer, x):
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(layer.init, jax.random.key(0), x)["params"],
    )


def test_scores_are_scaled_cosines():
    scales = np.array([0.5, 9.0], np.float32).reshape(2, 1, 1)
    query, key, _ = attend(random_params(ATTENTION, X) | {"logit_scale": scales})
    lengths = np.linalg.norm(query, axis=-1) * np.linalg.norm(key, axis=-1)
    for head, scale in enumerate((np.exp(0.5), 100)):  # the second is above the limit
        np.testing.assert_allclose(lengths[:, head] / np.sqrt(4), scale, rtol=1e-5)


def test_keys_have_no_bias():
    params = random_params(ATTENTION, X)
    changed = {name: params[name] + 1 for name in ("q_bias", "v_bias")}
    before, after = attend(params), attend(params | changed)
    np.testing.assert_array_equal(before[1], after[1])
    np.testing.assert_allclose(before[2] + 1, after[2], atol=1e-5)
    assert not random_params(ATTENTION.clone(qkv_bias=False), X).keys() & changed.keys()


@pytest.mark.exhaustive
def test_starts_as_timms():
    stage = swinv2.Stage((0.0,), True, num_heads=2, window_size=2)
    x = X.repeat(4, axis=2)
    outs, variables = jax.jit(stage.init_with_output)(jax.random.key(0), x)
    block, norm = variables["params"]["blocks_0"], variables["params"]["downsample"]["norm"]
    attn = block["attn"]
    np.testing.assert_allclose(attn["logit_scale"], np.log(10), rtol=1e-6)
    for leaf in (attn["qkv"]["kernel"], attn["cpb_mlp_0"]["kernel"], block["mlp"]["fc1"]["kernel"]):
        np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.1)
    zeros = (attn["q_bias"], attn["v_bias"], attn["cpb_mlp_0"]["bias"])
    assert not any(leaf.any() for leaf in (*zeros, block["norm1"]["scale"]))
    # The block is the identity: its input is normalised.
    assert (norm["scale"] == 1).all()
    np.testing.assert_allclose(outs[0][0].mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(outs[0][0].std(-1), 1, atol=0.05)


def test_bfloat16_computes_in_bfloat16():
    model = tiny(dtype=jnp.bfloat16)
    (logits, out), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    assert logits.dtype == jnp.float32
    for key, leaf in out.items():
        own = key in ("grid", "logits", "bias", "block05_bias")  # scores are float32
        assert own or leaf.dtype == jnp.bfloat16


@pytest.mark.slow
def test_scanning_changes_nothing(monkeypatch):
    model = swinv2.Stage((0.0,) * 5, False, num_heads=2, window_size=4, pretrained_window=2)
    x = np.random.default_rng(1).normal(size=(2, 64, 8)).astype(np.float32)
    variables = {"params": random_params(model, x)}
    loop = jax.jit(model.apply)(variables, x)
    monkeypatch.setattr("xkd_jax.models.scan.pays", lambda depth, train: True)
    scan = jax.jit(lambda variables: model.apply(variables, x))(variables)
    chex.assert_trees_all_close(scan, loop, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_gradients_reach_every_parameter_and_are_finite_where_maps_are_padded():
    model = tiny(depths=(1, 1, 1, 1), img_size=40)  # padding has keys of length 0
    variables = init(model, 40)

    def loss(params):
        logits, _ = model.apply({"params": params}, images(size=40), train=True)
        return jax.nn.log_softmax(logits)[:, 0].sum()

    grads = jax.jit(jax.grad(loss))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(leaf).all(), path
        assert leaf.any(), path
