import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from tests.models.networks import images, init, tiny_resnet, tiny_vit
from xkd_jax.errors import UserError
from xkd_jax.models import MODELS, create_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

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
    "resnet18d": 11_708_744,
    "repvgg_a0": 9_108_968,
    "resnext50d_32x4d": 25_048_136,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_base_distilled_patch16_384": 87_630_032,
    "vit_small_patch14_dinov2": 22_441_192,
    "vit_base_patch14_reg4_dinov2": 87_351_016,
    "vit_large_patch14_dinov2": 305_392_616,
    "vit_base_patch16_clip_224": 86_568_424,
    "vit_base_patch32_clip_quickgelu_224": 88_225_000,
    "vit_base_patch16_siglip_224": 93_653_224,
    "deit3_small_patch16_224": 22_059_496,
    "deit3_base_patch16_384": 86_877_160,
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
        kind = "transformer" if re.search("patch|window|mixer", name) else "cnn"
        assert model.kind == kind  # pyright: ignore[reportAttributeAccessIssue]
        assert "kind" not in {field.name for field in dataclasses.fields(model)}
        size = getattr(model, "img_size", MODELS[name].image_size)
        assert size == MODELS[name].image_size
        ending = name.split("_")[-1]
        assert not ending.isdigit() or kind == "cnn" or size == int(ending)


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
        ("resnet5", {}, "unknown network 'resnet5'; did you mean resnet56 or resnet50"),
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
        (
            "vit_small_patch14_dinov2",
            {"img_size": 100},
            "img_size 100 must be a multiple of patch_size 14, such as 98 or 112",
        ),
        ("vit_tiny_patch4_32", {"num_heads": 5}, "embed_dim 192 must be a multiple of num_heads 5"),
        ("vit_tiny_patch4_32", {"global_pool": "tokens"}, "did you mean token"),
        ("vit_tiny_patch4_32", {"class_token": False}, "needs class_token=True"),
        ("deit_tiny_distilled_patch16_224", {"global_pool": "avg"}, "distilled=True needs"),
        ("deit_tiny_distilled_patch16_224", {"reg_tokens": 4}, "no reg_tokens"),
        ("resnet18", {"groups": 32}, "need block='bottleneck'"),
        ("resnet18", {"block": "botleneck"}, "did you mean bottleneck"),
        ("resnet18", {"stem": "cifar10"}, "did you mean cifar"),
        ("resnet18", {"layers": (2, 2)}, "four block counts"),
        ("resnet18", {"width": 0.0}, "at least one channel"),
        ("resnet18d", {"width": 0.015}, "at least one channel of the stem's 32"),
    ],
)
def test_wrong_values(name, args, message):
    model = create_model(name, num_classes=2, **args)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
