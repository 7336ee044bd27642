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


def test_scanned_blocks_compute_what_unrolled_ones_do(monkeypatch):
    model = tiny_vit(depth=4, drop_path_rate=0.5)
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
