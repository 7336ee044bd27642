import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xkd_jax.errors import UserError
from xkd_jax.models import MODELS, create_model, scan

TINY_VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2}

# timm 1.0's counts of trainable parameters, with 1000 classes.
TIMM_COUNTS = {
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_large_patch16_224": 304_326_632,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_base_distilled_patch16_384": 87_630_032,
}


def tiny_vit(**args):
    return create_model("vit_tiny_patch4_32", num_classes=5, **{**TINY_VIT, **args})


def tiny_resnet(name="resnet18", **args):
    args = {"width": 0.125, "stem": "cifar", "layers": (1, 1, 1, 1), **args}
    return create_model(name, num_classes=5, **args)


def images(n=2, size=32):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(n, size, size, 3)).astype(np.float32))


def init(model, size=32):
    """Random variables without compiling `model.init`, most of these tests' time."""
    rng = np.random.default_rng(0)
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key in ("scale", "var"):
            return jnp.ones(leaf.shape)
        return jnp.asarray(noise * np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0 * noise)

    return jax.tree_util.tree_map_with_path(fill, tree)


def shapes(model, x, train=False):
    """The shapes of `out`, without computing anything."""

    def run(key):
        variables = model.init(key, x)
        return model.apply(variables, x, train=train, mutable=["batch_stats"])[0][1]

    return {
        key: tuple(leaf) if key == "grid" else leaf.shape
        for key, leaf in jax.eval_shape(run, jax.random.key(0)).items()
    }


@pytest.mark.parametrize("name", TIMM_COUNTS)
def test_parameter_count_is_timms(name):
    model = create_model(name, num_classes=1000)
    size = getattr(model, "img_size", 224)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    leaves = jax.tree.leaves(variables["params"])
    assert sum(leaf.size for leaf in leaves) == TIMM_COUNTS[name]
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


def test_every_name_builds():
    for name in MODELS:
        model = create_model(name, num_classes=3)
        hash(model)  # jit needs it
        kind = "transformer" if "patch" in name else "cnn"
        assert model.kind == kind  # pyright: ignore[reportAttributeAccessIssue]
        assert "kind" not in {field.name for field in dataclasses.fields(model)}
        size = getattr(model, "img_size", MODELS[name].image_size)
        assert size == MODELS[name].image_size
        ending = name.split("_")[-1]
        assert not ending.isdigit() or kind == "cnn" or size == int(ending)


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


def test_vit_out():
    heads, block = (2, 2, 64, 8), (2, 64, 16)
    qkv = {f"{prefix}{name}": heads for prefix in ("", "block01_", "block02_")
           for name in ("query", "key", "value")}  # fmt: skip
    expected = {
        "grid": (8, 8), "block01": block, "block02": block, **qkv, "tokens": block,
        "cls": (2, 16), "pooled": (2, 16), "logits": (2, 5),
    }  # fmt: skip
    assert shapes(tiny_vit(), images()) == expected
    assert shapes(tiny_vit(), images(), train=True) == expected
    bare = shapes(tiny_vit(class_token=False, global_pool="avg"), images())
    assert bare == {key: shape for key, shape in expected.items() if key != "cls"}


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
    assert jnp.array_equal(out["pooled"], same["pooled"])  # dropout is behind what methods see


def initial(model, *names):
    """Some of `model.init`'s parameters; jit drops the work for the others."""

    def run(key):
        params = model.init(key, images())["params"]
        return [params[name] for name in names]

    return jax.jit(run)(jax.random.key(0))


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


def test_vit_starts_as_timms():
    pos, cls, block = initial(tiny_vit(embed_dim=64), "pos_embed", "cls_token", "blocks_1")
    for leaf in (pos, block["attn"]["qkv"]["kernel"], block["mlp"]["fc2"]["kernel"]):
        np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.05)
    assert 0 < jnp.abs(cls).max() < 1e-5
    assert not block["mlp"]["fc1"]["bias"].any()


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_bfloat16_computes_in_bfloat16(make):
    model, full = make(dtype=jnp.bfloat16), make()
    variables = init(model)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    logits, out = jax.jit(model.apply)(variables, images())
    assert logits.dtype == jnp.float32
    assert out["pooled"].dtype == jnp.bfloat16
    want, _ = jax.jit(full.apply)(variables, images())
    assert jnp.abs(logits - want).max() < 0.05 * jnp.abs(want).max()


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_gradients_reach_every_parameter(make):
    model = make()
    variables = init(model)

    def loss(params):
        logits, _ = model.apply({**variables, "params": params}, images())
        return jax.nn.log_softmax(logits)[:, 0].sum()

    grads = jax.jit(jax.grad(loss))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(leaf).all(), path
        assert leaf.any(), path


def test_lists_become_tuples():
    model = create_model("resnet18", num_classes=2, layers=[1, 1, 1, 1])
    assert model == create_model("resnet18", num_classes=2, layers=(1, 1, 1, 1))
    hash(model)


def test_variants_are_not_changed_by_arguments():
    create_model("resnet18", num_classes=2, width=2.0)
    assert "width" not in MODELS["resnet18"].args


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("resnet5", {}, "unknown network 'resnet5'; did you mean resnet50"),
        ("resnet50", {"widht": 2}, "unknown resnet50 argument 'widht'; did you mean width"),
        ("resnet50", {"parent": None}, "unknown resnet50 argument 'parent'"),
    ],
)
def test_wrong_names(name, args, message):
    with pytest.raises(UserError, match=message):
        create_model(name, num_classes=2, **args)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("vit_tiny_patch16_224", {}, r"takes images \[N, 224, 224, 3\].*set img_size"),
        ("vit_tiny_patch4_32", {"img_size": 30}, "img_size 30 must be a multiple of patch_size 4"),
        ("vit_tiny_patch4_32", {"num_heads": 5}, "embed_dim 192 must be a multiple of num_heads 5"),
        ("vit_tiny_patch4_32", {"global_pool": "tokens"}, "did you mean token"),
        ("vit_tiny_patch4_32", {"class_token": False}, "needs class_token=True"),
        ("deit_tiny_distilled_patch16_224", {"global_pool": "avg"}, "distilled=True needs"),
        ("resnet18", {"groups": 32}, "need block='bottleneck'"),
        ("resnet18", {"block": "botleneck"}, "did you mean bottleneck"),
        ("resnet18", {"stem": "cifar10"}, "did you mean cifar"),
        ("resnet18", {"layers": (2, 2)}, "four block counts"),
        ("resnet18", {"width": 0.0}, "at least one channel"),
    ],
)
def test_wrong_values(name, args, message):
    model = create_model(name, num_classes=2, **args)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


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
