from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.models.networks import images, init, shapes
from xkd_jax.distributed import sharding
from xkd_jax.errors import UserError
from xkd_jax.models import swin
from xkd_jax.models.swin import SwinTransformer, WindowAttention

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
# timm 1.0.31's counts of trainable parameters, with 1000 classes.
TIMM_COUNTS = {
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "swin_large_patch4_window7_224": 196_532_476,
    "swin_base_patch4_window12_384": 87_903_584,
    "swin_large_patch4_window12_384": 196_735_516,
    # The first with img_size=32, patch_size=2, window_size=4.
    "swin_tiny_patch2_window4_32": 28_266_418,
}


def tiny(**args):
    return SwinTransformer(**{**TINY, **args})


def random_variables(layer, x):
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(layer.init, jax.random.key(0), x),
    )


@pytest.mark.parametrize("name", TIMM_COUNTS)
def test_parameter_count_is_timms(name):
    variant = swin.VARIANTS[name]
    model = variant.network(**variant.args)
    hash(model)  # jit needs it
    x = jax.ShapeDtypeStruct((1, variant.image_size, variant.image_size, 3), jnp.float32)
    leaves = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), x))
    assert sum(leaf.size for leaf in leaves) == TIMM_COUNTS[name]
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


def test_every_name_has_a_count():
    assert swin.VARIANTS.keys() == TIMM_COUNTS.keys()


def test_out():
    # By block: heads, side of the map, channels.
    blocks = [(1, 16, 8), (2, 8, 16), (2, 8, 16), (2, 4, 32), (4, 2, 64)]
    expected = {
        "stage1": (2, 16, 16, 8), "stage2": (2, 8, 8, 16), "stage3": (2, 4, 4, 32),
        "stage4": (2, 2, 2, 64), "grid": (2, 2), "tokens": (2, 4, 64), "pooled": (2, 64),
        "logits": (2, 5),
    }  # fmt: skip
    for i, (heads, side, dim) in enumerate(blocks, start=1):
        expected[f"block{i:02d}"] = (2, side**2, dim)
        for name in ("query", "key", "value"):
            head = (2, heads, side**2, dim // heads)
            expected[name] = expected[f"block{i:02d}_{name}"] = head
    expected["bias"] = expected["block05_bias"] = (1, 4, 4, 4)
    assert shapes(tiny(), images()) == expected
    assert shapes(tiny(), images(), train=True) == expected


@pytest.fixture(scope="module")
def ran(quick_compilation):
    """Parameters of a network whose second stage is padded, and what it shows of two images."""
    model = tiny(img_size=40)  # maps of 20, 10 (in windows 12), 5 (8) and 3
    variables = init(model, 40)
    _, out = jax.jit(model.apply)(variables, images(size=40))
    return variables["params"], out


def test_taps_agree_with_each_other(ran):
    _, out = ran
    assert out["grid"] == (3, 3)
    for stage, block in ((1, "block01"), (2, "block03"), (3, "block04"), (4, "block05")):
        assert jnp.array_equal(out[f"stage{stage}"].reshape(out[block].shape), out[block])
    for name in ("query", "key", "value"):
        assert jnp.array_equal(out[name], out[f"block05_{name}"])
    np.testing.assert_allclose(out["tokens"].mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(out["pooled"], out["tokens"].mean(1), atol=1e-6)


def test_heads_are_in_the_order_of_the_blocks_input(ran):
    params, out = ran
    block = params["layers_1"]["blocks_1"]  # shifted and padded
    x = np.asarray(out["block02"])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    qkv = x @ np.asarray(block["attn"]["qkv"]["kernel"])
    for i, name in enumerate(("query", "key", "value")):
        want = qkv[..., 16 * i : 16 * (i + 1)].reshape(2, 100, 2, 8).transpose(0, 2, 1, 3)
        np.testing.assert_allclose(out[f"block03_{name}"], want, rtol=1e-4, atol=1e-5)


def attention_without_windows(params, x, heads, window, shift):
    """What `WindowAttention` should give: every position of the map against every other."""
    t, dim = x.shape
    side = int(t**0.5)
    padded = side + -side % window
    # Where each position of the rolled and padded map comes from in the image, if anywhere.
    rolled = np.stack(np.divmod(np.arange(padded**2), padded), -1)
    real = (rolled < side).all(-1)
    source = (rolled + shift) % side @ [side, 1]
    plane = np.where(real[:, None], x[source], 0)
    qkv = plane @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    query, key, value = qkv.reshape(padded**2, 3, heads, -1).transpose(1, 2, 0, 3)

    table = params["relative_position_bias_table"].reshape(2 * window - 1, 2 * window - 1, heads)
    apart = rolled[:, None] - rolled[None] + window - 1
    bias = table[tuple(np.clip(apart, 0, 2 * window - 2).transpose(2, 0, 1))].transpose(2, 0, 1)
    # Together: the same window, and on the same side of the seam that the roll leaves.
    part = np.concatenate([rolled // window, rolled >= padded - shift], -1)
    together = (part[:, None] == part[None]).all(-1)
    scores = query @ key.swapaxes(1, 2) * (dim // heads) ** -0.5 + bias
    scores = np.where(together, np.exp(scores), 0)
    y = (scores / scores.sum(-1, keepdims=True)) @ value
    y = y.transpose(1, 0, 2).reshape(-1, dim) @ params["proj"]["kernel"] + params["proj"]["bias"]

    back = np.argsort(np.where(real, source, t))[:t]
    return y[back], [head[:, back] for head in (query, key, value)]


@pytest.mark.parametrize(
    ("side", "shifted"), [(8, False), (8, True), (10, False), (10, True), (4, True)]
)
def test_attention_is_that_of_the_whole_map_kept_to_windows(side, shifted):
    layer = WindowAttention(num_heads=2, window_size=4, shifted=shifted)
    x = np.random.default_rng(1).normal(size=(2, side**2, 8)).astype(np.float32)
    variables = random_variables(layer, x)
    y, qkv = jax.jit(layer.apply)(variables, x)
    shift = 2 if shifted and side > 4 else 0
    for i in range(2):
        want, heads = attention_without_windows(variables["params"], x[i], 2, 4, shift)
        np.testing.assert_allclose(y[i], want, rtol=1e-4, atol=1e-4)
        for got, head in zip(qkv, heads, strict=True):
            np.testing.assert_allclose(got[i], head, rtol=1e-4, atol=1e-4)


def test_windows_shrink_to_small_maps_and_odd_maps_halve_upwards():
    model = tiny(img_size=18)  # maps of 9, 5, 3 and 2
    variables = init(model, 18)
    for i, window in enumerate((4, 4, 3, 2)):
        attn = variables["params"][f"layers_{i}"]["blocks_0"]["attn"]
        rows, _ = attn["relative_position_bias_table"].shape
        assert rows == (2 * window - 1) ** 2
    out = shapes(model, images(size=18))
    assert [out[f"stage{i}"][1:3] for i in range(1, 5)] == [(9, 9), (5, 5), (3, 3), (2, 2)]


def test_merging_keeps_each_positions_neighbours():
    x = jnp.arange(9.0).reshape(1, 9, 1)
    kernel = jnp.eye(4, 2)  # the first two of four channels: upper left, then lower left
    params = {"norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}, "reduction": {"kernel": kernel}}
    y = swin.PatchMerging().apply({"params": params}, x)
    cells = np.array([[0, 3, 1, 4], [2, 5, 0, 0], [6, 0, 7, 0], [8, 0, 0, 0]], np.float32)
    want = (cells - cells.mean(1, keepdims=True)) / np.sqrt(cells.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y[0], want[:, :2], atol=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"img_size": 33}, "img_size 33 must be a multiple of patch_size 2, such as 32 or 34"),
        ({"img_size": 1}, "such as 2 or 4"),
        ({"img_size": 64}, r"takes images \[N, 64, 64, 3\], not \[1, 32, 32, 3\].*multiple of"),
        ({"num_heads": (1, 3, 2, 4)}, "stage 2 has 16 channels .* multiple of its num_heads 3"),
        ({"depths": (2, 2)}, "four numbers each"),
        ({"depths": (1, 0, 1, 1)}, "depths at least 1"),
    ],
)
def test_wrong_values(args, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(tiny(**args).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def stage(*rates):
    """Blocks on a map of 8, every second one shifted; five of them are two pairs and a last."""
    model = swin.Stage(rates, downsample=False, num_heads=2, window_size=4)
    x = np.random.default_rng(1).normal(size=(16, 64, 8)).astype(np.float32)
    return model, random_variables(model, x), x


def test_scanning_changes_nothing(monkeypatch):
    model, variables, x = stage(0.0, 0.0, 0.0, 0.0, 0.0)
    loop = jax.jit(model.apply)(variables, x)
    monkeypatch.setattr("xkd_jax.models.scan.pays", lambda depth, train: True)
    scan = jax.jit(lambda variables: model.apply(variables, x))(variables)
    chex.assert_trees_all_close(scan, loop, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_scanned_blocks_take_their_weights_from_the_gather(monkeypatch):
    monkeypatch.setattr("xkd_jax.models.scan.pays", lambda depth, train: depth > 1)
    model, x = tiny(depths=(1, 1, 3, 1)), images(32)
    params = random_variables(model, x)["params"]
    layout = sharding.replicated(sharding.create_mesh(jax.devices()[:1]))
    gather = sharding.BlockGather(params, jax.tree.map(lambda _: layout, params))
    stage = params["layers_2"]
    scanned = {name: jax.tree.map(np.zeros_like, stage[name]) for name in ("blocks_0", "blocks_1")}
    without = params | {"layers_2": stage | scanned}
    apply = jax.jit(lambda params: model.apply({"params": params}, x, gather=gather)[0])
    expected = jax.jit(model.apply)({"params": params}, x)[0]
    chex.assert_trees_all_close(apply(without), expected, rtol=1e-5)


def test_drop_path_drops_whole_samples(monkeypatch):
    monkeypatch.setattr("xkd_jax.models.scan.pays", lambda depth, train: True)
    model, variables, x = stage(0.0, 0.2, 0.5, 0.8, 0.8)

    @jax.jit
    def train(key):
        outs = model.apply(variables, x, train=True, rngs={"dropout": key})
        return [x, *(out for out, _ in outs)]

    one, again, two = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(one, again)
    assert jnp.array_equal(one[1], two[1])  # the first block's rate is 0
    assert not jnp.allclose(one[-1], two[-1])
    # A sample that lost both branches leaves a block as it entered.
    lost = [int(jnp.all(y == x, axis=(1, 2)).sum()) for x, y in pairwise(one)]
    assert lost[0] == 0
    assert lost[1] < lost[3] < 16
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda: model.apply(variables, x, train=True))


def test_drop_path_grows_linearly_over_all_blocks():
    rates = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, swin.Block):
            rates.append(args[2])
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        shapes(tiny(drop_path_rate=0.4), images())
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4] * 2)  # once by init, once by apply


def test_drop_rate_is_behind_what_methods_see():
    model = tiny(drop_rate=0.5, depths=(1, 1, 1, 1))
    variables = init(model)

    @jax.jit
    def train(key):
        return model.apply(variables, images(), train=True, rngs={"dropout": key})[1]

    one, two = train(jax.random.key(0)), train(jax.random.key(1))
    assert not jnp.allclose(one["logits"], two["logits"])
    assert jnp.array_equal(one["pooled"], two["pooled"])


def test_starts_as_timms():
    model = tiny(embed_dim=32, depths=(1, 1, 1, 1))

    @jax.jit
    def start(key):
        params = model.init(key, images())["params"]
        return params["patch_embed"], params["layers_3"]

    embed, stage = start(jax.random.key(0))
    block = stage["blocks_0"]
    table = block["attn"]["relative_position_bias_table"]
    np.testing.assert_allclose(table.std(), 0.02, rtol=0.5)
    for leaf in (
        block["attn"]["qkv"]["kernel"],
        block["mlp"]["fc2"]["kernel"],
        stage["downsample"]["reduction"]["kernel"],
    ):
        np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.05)
    assert not block["attn"]["qkv"]["bias"].any()
    for leaf in embed["proj"].values():
        bound = (3 * 2 * 2) ** -0.5
        assert 0.8 * bound < jnp.abs(leaf).max() <= bound


def test_bfloat16_computes_in_bfloat16():
    model = tiny(dtype=jnp.bfloat16)
    variables = init(model)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    logits, out = jax.eval_shape(model.apply, variables, images())
    assert logits.dtype == jnp.float32
    for key, leaf in out.items():
        own = key in ("grid", "logits", "bias", "block05_bias")  # scores are float32
        assert own or leaf.dtype == jnp.bfloat16

    block = swin.Block(num_heads=2, window_size=4, shifted=True)
    _, variables, x = stage(0.0)
    params = {"params": variables["params"]["blocks_0"]}
    want, _ = jax.jit(block.apply)(params, x)
    got, _ = jax.jit(block.clone(dtype=jnp.bfloat16).apply)(params, x.astype(jnp.bfloat16))
    assert jnp.abs(got - want).max() < 0.05 * jnp.abs(want).max()


@pytest.mark.slow
def test_gradients_reach_every_parameter():
    model = tiny(depths=(1, 1, 1, 1))
    variables = init(model)

    def loss(params):
        logits, _ = model.apply({"params": params}, images(), train=True)
        return jax.nn.log_softmax(logits)[:, 0].sum()

    grads = jax.jit(jax.grad(loss))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(leaf).all(), path
        assert leaf.any(), path
