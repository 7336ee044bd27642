"""Recomputing blocks in the backward pass: less memory, and nothing else changes."""

import chex
import jax
import pytest

from tests.models.networks import TINY_REGNET, images, init, tiny_resnet, tiny_vit
from xkd_jax.models import MODELS, create_model, scan, swin, xception
from xkd_jax.models.mobilenetv2 import MobileNetV2

pytestmark = pytest.mark.usefixtures("quick_compilation")

_SWIN = {"embed_dim": 8, "num_heads": (1, 2, 2, 2), "img_size": 32, "window_size": 2}


def _small(name, **args):
    return lambda **more: create_model(name, num_classes=5, **args | more)


# The network, the side of its images, and its number of blocks.
NETWORKS = {
    "vit": (tiny_vit, 32, 2),
    "deit": (_small("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=16, num_heads=2,
                    depth=2, drop_path_rate=0.5), 32, 2),
    "dinov2": (_small("vit_small_patch14_reg4_dinov2", img_size=28, embed_dim=16, num_heads=2,
                      depth=2, init_values=0.5, drop_path_rate=0.5), 28, 2),
    "siglip": (_small("vit_base_patch16_siglip_224", img_size=32, embed_dim=16, num_heads=2,
                      depth=2, pre_norm=True, drop_path_rate=0.5), 32, 2),
    "beit": (_small("beit_base_patch16_224", img_size=32, embed_dim=16, num_heads=2, depth=2,
                    use_shared_rel_pos_bias=True, drop_path_rate=0.5), 32, 2),
    "eva": (_small("eva02_base_patch14_224", img_size=28, embed_dim=16, num_heads=2, depth=2,
                   drop_path_rate=0.5), 28, 2),
    "swin": (_small("swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1), **_SWIN), 32, 5),
    "swinv2": (_small("swinv2_tiny_window8_256", depths=(1, 1, 2, 1), **_SWIN), 32, 5),
    "resnet": (lambda **more: tiny_resnet(drop_path_rate=0.5, **more), 32, 4),
    "resnext": (lambda **more: tiny_resnet("resnext50_32x4d", groups=2, base_width=64, **more),
                32, 4),
    "repvgg": (_small("repvgg_a0_32", depths=(1, 2, 1, 1), channels=(4, 6, 8, 10),
                      drop_path_rate=0.5), 32, 6),
    "mobilenetv2": (_small("mobilenetv2_100_32", width=0.1, depth=0.1, drop_rate=0.2), 32, 7),
    "efficientnet": (_small("efficientnet_b0", width=0.1, depth=0.1), 32, 7),
    "regnet": (_small("regnety_004_32", **TINY_REGNET, drop_path_rate=0.5), 32, 4),
    "ghostnet": (_small("ghostnet_100_32", width=0.1), 32, 16),
    "efficientnetv2": (_small("efficientnetv2_rw_t", width=0.1, depth=0.1), 32, 7),
    "mobilenetv3": (_small("mobilenetv3_small_100_32", width=0.1, depth=0.1), 32, 8),
    "mobilenetv4": (_small("mobilenetv4_hybrid_medium", width=0.1, depth=0.01), 32, 32),
    "xception": (_small("legacy_xception", width=0.04), 32, 12),
    "inception": (_small("inception_v3", aux_logits=False), 75, 11),
    "convnext": (_small("convnextv2_atto", depths=(1, 1, 2, 1), dims=(4, 4, 4, 4)), 32, 5),
    "mixer": (_small("mixer_b16_224", img_size=32, embed_dim=8, num_blocks=3), 32, 3),
    "cifar": (_small("resnet8"), 32, 3),
    "wide": (_small("wrn_16_1", depth=10, drop_rate=0.3), 32, 3),
}  # fmt: skip


def recomputed(jaxpr):
    """The number of computations that the backward pass repeats."""
    names = [equation.primitive.name for equation in jaxpr.eqns]
    return sum(name.startswith(("remat", "checkpoint")) for name in names)


def scanned(jaxpr):
    """The same, inside each loop."""
    loops = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    return [recomputed(loop.params["jaxpr"].jaxpr) for loop in loops]


def trace(model, size, train=True):
    def forward(variables, x):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(variables, x, train=train, mutable=["batch_stats"], rngs=rngs)[0][0]

    x = images(2, size)
    return jax.make_jaxpr(forward)(jax.eval_shape(model.init, jax.random.key(0), x), x).jaxpr


# These take most of the time.
LONG = ("mobilenetv3", "mobilenetv4", "xception", "inception", "ghostnet")
BLOCKS = [
    pytest.param(name, marks=pytest.mark.exhaustive) if name in LONG else name for name in NETWORKS
]


@pytest.mark.parametrize("family", BLOCKS)
def test_every_block_is_recomputed_and_only_in_training(family):
    make, size, blocks = NETWORKS[family]
    assert recomputed(trace(make(remat=True), size)) == blocks
    assert recomputed(trace(make(remat=True), size, train=False)) == 0
    assert recomputed(trace(make(), size)) == 0


def gradients(model, size):
    """The loss with all outputs and running statistics, and the gradients, of a training pass."""
    variables, x = init(model, size), images(4, size)
    rngs = {"dropout": jax.random.key(3)}

    def loss(params):
        (logits, out), updates = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"], rngs=rngs
        )
        return jax.nn.log_softmax(logits)[:, 0].sum(), (out, updates)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


@pytest.mark.parametrize("family", ["vit", "resnet", "wide"])
def test_the_backward_pass_is_left_less_than_half(family):
    make, size, _ = NETWORKS[family]

    def kept(model):
        x = images(16, size)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        rngs = {"dropout": jax.random.key(0)}

        def pullback(variables, x):
            def total(params):
                both = {**variables, "params": params}
                out = model.apply(both, x, train=True, mutable=["batch_stats"], rngs=rngs)
                return out[0][0].sum()

            return jax.vjp(total, variables["params"])[1]

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pullback, variables, x)))

    assert kept(make(remat=True)) < kept(make()) / 2


# Inception would take as long as all others together; EfficientNet's blocks are MobileNetV2's, and
# MobileNetV3's too.
OTHERS = (
    "dinov2", "siglip", "beit", "eva", "repvgg", "mobilenetv2", "efficientnetv2", "mobilenetv4",
    "regnet", "xception", "convnext", "mixer", "cifar", "wide",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["deit", "resnet", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in OTHERS)],
)
def test_nothing_changes(family, monkeypatch):
    """Outputs, running statistics, gradients and dropped paths, and the names of all of them."""
    # The others' blocks are alike, and take their time to compile.
    monkeypatch.setattr(xception, "_BLOCKS", ((128, 2), (256, 1)))
    monkeypatch.setattr(MobileNetV2, "stages", ((3, 16, 1), (3, 24, 2)))
    make, size, _ = NETWORKS[family]
    chex.assert_trees_all_close(
        gradients(make(remat=True), size), gradients(make(), size), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_nothing_changes_where_blocks_are_scanned(monkeypatch):
    monkeypatch.setattr(scan, "pays", lambda depth, train: True)
    model = tiny_vit(remat=True, drop_path_rate=0.5, depth=4)
    assert scanned(trace(model, 32)) == [1]
    chex.assert_trees_all_close(
        gradients(model, 32), gradients(model.clone(remat=False), 32), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_nothing_changes_where_swins_blocks_are_scanned(monkeypatch):
    monkeypatch.setattr(scan, "pays", lambda depth, train: True)
    stage = swin.Stage((0.0, 0.2, 0.4, 0.6), False, num_heads=2, window_size=2, remat=True)
    x = images(4, 4).reshape(4, 16, 3).repeat(4, axis=2)
    params = stage.init(jax.random.key(0), x)["params"]

    def loss(params, stage):
        rngs = {"dropout": jax.random.key(3)}
        outs = stage.apply({"params": params}, x, train=True, rngs=rngs)
        return sum((tokens**2).sum() for tokens, _ in outs), outs

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    assert scanned(jax.make_jaxpr(lambda params: loss(params, stage))(params).jaxpr) == [1]
    chex.assert_trees_all_close(
        run(params, stage), run(params, stage.clone(remat=False)), rtol=1e-5, atol=1e-5
    )


def test_which_networks_have_blocks():
    without = {name for name, variant in MODELS.items() if not hasattr(variant.network, "remat")}
    assert without == {"vgg8", "vgg13"}
