"""The taps of attention: together they give the attention that the network itself computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests.methods.cakd_reference import np_softmax
from tests.models.networks import images
from xkd_jax.methods import cakd
from xkd_jax.models import create_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
SWIN = {"patch_size": 2, "window_size": 2, "embed_dim": 4, "depths": (1, 1, 1, 2)}
SWIN |= {"num_heads": (1, 1, 2, 2)}
BEIT = {**VIT, "init_values": 0.1}
EVA = {**VIT, "embed_dim": 16}
NETWORKS = {
    "ViT": ("vit_tiny_patch16_224", VIT),
    "ViT without class token": (
        "vit_tiny_patch16_224",
        VIT | {"class_token": False, "global_pool": "avg"},
    ),
    "ViT with registers": (
        "vit_tiny_patch16_224",
        VIT | {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.1},
    ),
    "registers without class token": (
        "vit_tiny_patch16_224",
        VIT | {"class_token": False, "global_pool": "avg", "reg_tokens": 3},
    ),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", VIT),
    "SigLIP": ("vit_base_patch16_siglip_224", VIT),
    "DeiT": ("deit_tiny_patch16_224", VIT),
    "distilled DeiT": ("deit_tiny_distilled_patch16_224", VIT),
    "BEiT": ("beit_base_patch16_224", BEIT),
    "BEiT with shared and absolute positions": (
        "beit_base_patch16_224",
        BEIT | {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True},
    ),
    "DINOv3": ("vit_small_patch16_dinov3", EVA),
    "EVA-02": ("eva02_small_patch14_224", EVA),
    "EVA-02 with separate projections": ("eva02_base_patch14_224", EVA),
    "Swin, one window": ("swin_tiny_patch4_window7_224", SWIN | {"img_size": 32}),
    "Swin, four windows, shifted": ("swin_tiny_patch4_window7_224", SWIN | {"img_size": 64}),
    "Swin, a window of odd side": (
        "swin_tiny_patch4_window7_224",
        SWIN | {"img_size": 96, "window_size": 3},
    ),
    "Swin V2": (
        "swinv2_tiny_window8_256",
        SWIN | {"img_size": 64, "pretrained_window_sizes": (0, 0, 0, 3)},
    ),
}


def of_attention(module, method):
    return module.name == "attn" and method == "__call__"


def run(name):
    """A network's `out` for two images, and what the attention of its last two blocks returned."""
    kind, args = NETWORKS[name]
    model = create_model(kind, num_classes=3, **args)
    x = images(2, args["img_size"])
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    # Large enough for the scores and the biases to matter.
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32)), variables
    )
    (_, out), state = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=of_attention))(
        variables, x
    )
    outputs = traverse_util.flatten_dict(state["intermediates"], sep="/")
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    blocks = [path.removesuffix("/__call__") for path in outputs]
    own = [outputs[f"{path}/__call__"][0][0] for path in blocks]
    proj = [(params[f"{path}/proj/kernel"], params[f"{path}/proj/bias"]) for path in blocks]
    return jax.device_get((out, own[-2:], proj[-2:]))


def with_prefix(out, taps):
    """The query, key and value of all tokens, the class token first, in the last block."""
    names = ("query", "key", "value")
    if "prefix_query" not in out:
        return taps
    return [
        np.concatenate([out[f"prefix_{n}"], tap], 2) for n, tap in zip(names, taps, strict=True)
    ]


SLOW = ("BEiT", "EVA-02", "EVA-02 with separate projections")  # others have the same parts


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NETWORKS],
)
def test_query_key_value_and_bias_give_the_networks_own_attention(name):
    out, own, proj = run(name)
    for block in (-1, -2) if name.startswith("Swin") else (-1,):
        query, key, value = with_prefix(out, cakd.teacher_taps(out, block)[0])
        bias = cakd.teacher_bias(out, block)
        if "prefix_bias" in out:
            np.testing.assert_array_equal(out["prefix_bias"][:, :, 1:, 1:], bias)
            assert np.ptp(out["prefix_bias"]) > 1
        bias = out.get("prefix_bias", bias)
        scores = np.einsum("nhqd,nhkd->nhqk", query, key) / np.sqrt(query.shape[-1])
        y = np.einsum("nhqk,nhkd->nqhd", np_softmax(scores + bias), value)
        kernel, shift = proj[block]
        y = y.reshape(*y.shape[:2], -1) @ kernel + shift
        np.testing.assert_allclose(y, own[block], atol=1e-4)
        # What cakd imitates, of networks where all tokens are patches.
        if "prefix_query" not in out:
            mine = cakd.attention(*cakd.teacher_taps(out, block)[0], bias)
            mine = np.swapaxes(mine, 1, 2).reshape(y.shape) @ kernel + shift
            np.testing.assert_allclose(mine, own[block], atol=1e-4)


def test_a_map_that_is_padded_to_whole_windows_has_no_bias():
    kind, args = NETWORKS["Swin, one window"]
    model = create_model(kind, num_classes=3, **args | {"img_size": 48})  # 3x3, windows of 2
    shapes = jax.eval_shape(
        lambda key: model.init_with_output(key, images(1, 48))[0][1], jax.random.key(0)
    )
    assert not any(key.endswith("bias") for key in shapes)
