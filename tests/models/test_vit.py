import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.networks import TINY_VIT, images, init, initial, shapes, tiny_vit
from xkd_jax.models import create_model, scan

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_vit_out():
    heads, block = (2, 2, 64, 8), (2, 64, 16)
    qkv = {f"{prefix}{name}": heads for prefix in ("", "block01_", "block02_")
           for name in ("query", "key", "value")}  # fmt: skip
    prefix = {f"prefix_{name}": (2, 2, 1, 8) for name in ("query", "key", "value")}
    expected = prefix | {
        "grid": (8, 8), "block01": block, "block02": block, **qkv, "tokens": block,
        "cls": (2, 16), "pooled": (2, 16), "logits": (2, 5),
    }  # fmt: skip
    assert shapes(tiny_vit(), images()) == expected
    assert shapes(tiny_vit(), images(), train=True) == expected
    bare = shapes(tiny_vit(class_token=False, global_pool="avg"), images())
    assert bare == {key: shape for key, shape in expected.items() if key not in {"cls", *prefix}}


@pytest.mark.parametrize(
    ("args", "prefix", "positions"),
    [
        ({"reg_tokens": 4, "no_embed_class": True}, 5, 64),
        ({"reg_tokens": 4}, 5, 64 + 5),
        ({"reg_tokens": 4, "class_token": False, "global_pool": "avg"}, 4, 64 + 4),
        ({"no_embed_class": True}, 1, 64),
    ],
)
def test_registers_are_not_among_the_tokens(args, prefix, positions):
    model = tiny_vit(init_values=0.1, **args)
    found = shapes(model, images())
    for key, shape in found.items():
        if key.startswith("prefix_"):
            assert shape == (2, 2, prefix, 8), key
        elif key.endswith(("query", "key", "value")):
            assert shape == (2, 2, 64, 8), key
        elif key == "tokens" or key.startswith("block"):
            assert shape == (2, 64, 16), key
    assert found["pooled"] == (2, 16)
    assert ("cls" in found) == model.class_token
    params = jax.eval_shape(model.init, jax.random.key(0), images())["params"]
    assert params["pos_embed"].shape == (1, positions, 16)


def test_tokens_are_the_patches_in_image_order():
    """Without attention between them, a patch changes its own token and none of the registers."""
    model = tiny_vit(reg_tokens=2, no_embed_class=True, init_values=0.1)
    variables, x = init(model), images(1)
    for block in ("blocks_0", "blocks_1"):
        variables["params"][block]["ls1"]["gamma"] = jnp.zeros(16)
    changed = x.at[0, 4:8, 8:12].add(1.0)  # patch 1, 2 of 8 x 8
    run = jax.jit(model.apply)
    (_, a), (_, b) = run(variables, x), run(variables, changed)
    moved = jnp.abs(a["tokens"] - b["tokens"]).max(-1)[0] > 1e-6
    assert jnp.flatnonzero(moved).tolist() == [1 * 8 + 2]
    assert jnp.array_equal(a["prefix_key"], b["prefix_key"])
    assert jnp.array_equal(a["cls"], b["cls"])


@pytest.mark.parametrize("size", [112, 224, 518])
def test_any_size_that_the_patch_divides(size):
    model = create_model("vit_small_patch14_dinov2", num_classes=3, img_size=size, depth=1)
    found = shapes(model, images(1, size))
    assert found["grid"] == (size // 14, size // 14)
    assert found["tokens"] == (1, (size // 14) ** 2, 384)


def test_vit_last_block_is_the_short_name():
    model = tiny_vit()
    _, out = jax.jit(model.apply)(init(model), images())
    for name in ("query", "key", "value"):
        assert jnp.array_equal(out[name], out[f"block02_{name}"])
        assert not jnp.array_equal(out[name], out[f"block01_{name}"])
    assert jnp.array_equal(out["pooled"], out["cls"])


def test_grid_survives_jit_and_grad():
    model = tiny_vit()
    variables = init(model)

    def loss(variables):
        logits, out = model.apply(variables, images())
        return logits.sum(), out

    (_, out), _ = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
    assert out["grid"] == (8, 8)
    assert out["tokens"].reshape(2, *out["grid"], 16).shape == (2, 8, 8, 16)


@pytest.mark.parametrize(
    ("args", "norms"),
    [
        ({}, {"norm"}),
        ({"global_pool": "avg"}, {"fc_norm"}),
        ({"global_pool": "avg", "fc_norm": False}, {"norm"}),
        ({"fc_norm": True}, {"fc_norm"}),
    ],
)
def test_vit_pooling(args, norms):
    model = tiny_vit(**args)
    variables = init(model)
    _, out = jax.jit(model.apply)(variables, images())
    assert {"norm", "fc_norm"} & variables["params"].keys() == norms
    if norms == {"norm"}:
        np.testing.assert_allclose(out["tokens"].mean(-1), 0, atol=1e-5)
        if args:
            np.testing.assert_allclose(out["pooled"], out["tokens"].mean(1), atol=1e-6)
    else:
        assert jnp.array_equal(out["tokens"], out["block02"])
        np.testing.assert_allclose(out["pooled"].mean(-1), 0, atol=1e-5)


@pytest.mark.parametrize("rate", ["drop_rate", "drop_path_rate"])
def test_vit_dropping(rate):
    model = tiny_vit(**{rate: 0.5})
    variables, x = init(model), images(8)

    @jax.jit
    def trained(key):
        return model.apply(variables, x, train=True, rngs={"dropout": key})[0]

    still, _ = jax.jit(model.apply)(variables, x)
    one, again, two = (trained(jax.random.key(seed)) for seed in (0, 0, 1))
    assert jnp.array_equal(one, again)
    assert not jnp.allclose(one, two)
    assert not jnp.allclose(one, still)
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda: model.apply(variables, x, train=True))


def test_drop_path_spares_the_first_block_and_drops_whole_samples():
    model = tiny_vit(drop_path_rate=0.5)
    variables, x = init(model), images(16)
    _, out = jax.jit(lambda key: model.apply(variables, x, train=True, rngs={"dropout": key}))(
        jax.random.key(0)
    )
    _, still = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(out["block01"], still["block01"], atol=1e-5)
    # A sample that lost both branches (one in four) leaves the block as it entered.
    same = jnp.all(jnp.abs(out["block02"] - out["block01"]) < 1e-6, axis=(1, 2))
    assert 0 < same.sum() < 16


def test_vit_starts_as_timms():
    names = "pos_embed", "cls_token", "blocks_1", "patch_embed"
    pos, cls, block, patches = initial(tiny_vit(embed_dim=64), *names)
    for leaf in (pos, block["attn"]["qkv"]["kernel"], block["mlp"]["fc2"]["kernel"]):
        np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.05)
    assert 0 < jnp.abs(cls).max() < 1e-5
    assert not block["mlp"]["fc1"]["bias"].any()
    bound = (3 * 4 * 4) ** -0.5  # PyTorch's own, of weights and biases
    for leaf in patches["proj"].values():
        assert 0.9 * bound < jnp.abs(leaf).max() <= bound


def test_registers_and_layer_scale_start_as_timms():
    model = tiny_vit(reg_tokens=2, init_values=1e-5)
    registers, block = initial(model, "reg_token", "blocks_0")
    assert 0 < jnp.abs(registers).max() < 1e-5
    for name in ("ls1", "ls2"):
        assert (block[name]["gamma"] == jnp.float32(1e-5)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [pytest.param({}, marks=pytest.mark.exhaustive), {"init_values": 0.5, "reg_tokens": 2}],
)
def test_scanned_blocks_compute_what_unrolled_ones_do(args, monkeypatch):
    model = tiny_vit(depth=4, drop_path_rate=0.5, **args)
    variables, x, key = init(model), images(4), jax.random.key(0)

    def loss(params, train):
        rngs = {"dropout": key} if train else None
        logits, out = model.apply({"params": params}, x, train=train, rngs=rngs)
        return (logits**2).mean() + (out["block02_key"] ** 2).mean(), out

    def run(train):
        return jax.value_and_grad(loss, has_aux=True)(variables["params"], train)

    unrolled = run(False)
    monkeypatch.setattr(scan, "pays", lambda depth, train: True)
    scanned = run(False)
    assert jax.tree.structure(scanned) == jax.tree.structure(unrolled)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(scanned), jax.tree.leaves(unrolled), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(path))
    (_, out), grads = run(True)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads["blocks_1"]))
    # Stochastic depth, scanned: never in the first block, and other samples in other blocks.
    np.testing.assert_allclose(out["block01"], unrolled[0][1]["block01"], atol=1e-5)
    assert not jnp.allclose(out["logits"], unrolled[0][1]["logits"])


def test_scan_compiles_one_block(monkeypatch):
    model = tiny_vit(depth=6)
    variables = init(model)

    def products():
        jaxpr = jax.make_jaxpr(lambda v: model.apply(v, images())[0])(variables)
        return str(jaxpr).count("dot_general")

    unrolled = products()
    monkeypatch.setattr(scan, "pays", lambda depth, train: True)
    # The head, one block in the loop, and the last one, whose taps methods read.
    assert (products() - 1) * 3 == unrolled - 1


def test_deit_has_two_heads():
    model = create_model("deit_tiny_distilled_patch16_224", num_classes=5, img_size=32, **TINY_VIT)
    variables, x = init(model), images()
    logits, out = jax.jit(model.apply)(variables, x)
    assert variables["params"]["pos_embed"].shape == (1, 2 + 4, 16)
    assert out["tokens"].shape == (2, 4, 16)
    assert out["query"].shape == (2, 2, 4, 8)
    np.testing.assert_allclose(logits, (out["cls_logits"] + out["dist_logits"]) / 2, atol=1e-6)
    assert not jnp.allclose(out["cls_logits"], out["dist_logits"])
    np.testing.assert_allclose(out["pooled"], (out["cls"] + out["dist"]) / 2, atol=1e-6)
