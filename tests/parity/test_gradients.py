"""Gradients of small networks against PyTorch's, of every parameter."""

import jax
import numpy as np
import pytest

from tests.models.networks import TINY_REGNET
from tests.parity.filling import images, noise
from tests.parity.specimen import CLASSES, TOLERANCE, Specimen, difference, filled
from xkd_jax.convert.files import to_state
from xkd_jax.models import create_model

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_compilation")]

_SHALLOW = {"depth": 2, "embed_dim": 48, "num_heads": 3}
_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 40)}
SPECIMENS = {
    "vit": Specimen("vit_tiny_patch4_32", 16, args=_SHALLOW),
    "dinov2": Specimen("vit_small_patch14_dinov2", 42, args=_SHALLOW),
    "dinov2_reg4": Specimen("vit_small_patch14_reg4_dinov2", 42, args=_SHALLOW),
    "clip": Specimen("vit_base_patch16_clip_quickgelu_224", 48, args=_SHALLOW),
    "siglip": Specimen("vit_base_patch16_siglip_224", 48, args=_SHALLOW),
    "deit3": Specimen("deit3_small_patch16_224", 48, args=_SHALLOW),
    "dinov3": Specimen("vit_small_patch16_dinov3", 48, args=_SHALLOW),
    "eva02_small": Specimen("eva02_small_patch14_224", 42, args=_SHALLOW),
    "eva02_base": Specimen("eva02_base_patch14_224", 42, args=_SHALLOW),
    "beit": Specimen(
        "beit_base_patch16_224", 48, args={**_SHALLOW, "use_shared_rel_pos_bias": True}
    ),
    "swin": Specimen(
        "swin_tiny_patch2_window4_32", 32, args={"depths": (2, 1, 1, 1), "embed_dim": 24}
    ),
    "swinv2": Specimen(
        "swinv2_tiny_patch2_window4_32", 32, args={"depths": (2, 1, 1, 1), "embed_dim": 24}
    ),
    "regnet": Specimen("regnety_004_32", 16, args={**TINY_REGNET, "se_ratio": 1.0}),
    "ghostnet": Specimen("ghostnet_100_32", 16),
    "resnet": Specimen("resnet18_32", 16, args={"layers": (1, 1, 1, 1)}),
    "resnet_d": Specimen("resnet18d", 33, args={"layers": (1, 1, 1, 1)}),
    "repvgg": Specimen("repvgg_a0_32", 16),
    "efficientnet": Specimen("efficientnet_b0_32", 16),
    "efficientnetv2": Specimen("tf_efficientnetv2_b0_32", 16),
    "mobilenetv3": Specimen("mobilenetv3_small_100_32", 16),
    "mobilenetv4": Specimen("mobilenetv4_hybrid_medium", 48),
    "convnext": Specimen("convnext_atto_32", 16, args=_CONVNEXT),
    "convnextv2": Specimen("convnextv2_atto", 32, args=_CONVNEXT),
    "mixer": Specimen("mixer_b16_224", 32, args={"mlp_ratio": (0.1, 0.2)}),  # timm fixes the rest
}

# Not in CI: they are made of what the others are made of.
REST = ("clip", "deit3", "dinov2_reg4", "eva02_base",
        "ghostnet", "mobilenetv4", "regnet", "resnet_d")  # fmt: skip
# Cosine attention's scale, up to 100, magnifies rounding: PyTorch's own float32 gradients are 2e-4
# from its float64 ones.
TOLERANCES = {"swinv2": 2e-3}


# The loss is a sum of the logits and, for Vision Transformers, of the normalised tokens, with these
# weights.
def logits_weights():
    return noise("logits", (2, CLASSES))


def tokens_weights(shape):
    return noise("tokens", tuple(shape), 0.1)


def theirs(specimen):
    import torch

    from tests.parity import reference

    model = reference.build(specimen).eval()
    x = torch.from_numpy(images(2, specimen.size).transpose(0, 3, 1, 2)).contiguous()
    tokens = []
    if hasattr(model, "num_prefix_tokens"):
        model.norm.register_forward_hook(
            lambda module, args, out: tokens.append(out[:, model.num_prefix_tokens :])
        )
    loss = (model(x) * torch.from_numpy(logits_weights())).sum()
    for some in tokens:
        loss = loss + (some * torch.from_numpy(tokens_weights(some.shape))).sum()
    loss.backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def ours(specimen):
    model = create_model(specimen.name, num_classes=CLASSES, **specimen.network_args)
    variables = filled(specimen)

    def loss(params):
        logits, out = model.apply({**variables, "params": params}, images(2, specimen.size))
        total = (logits * logits_weights()).sum()
        if "query" in out and "stage1" not in out:  # a Vision Transformer
            total += (out["tokens"] * tokens_weights(out["tokens"].shape)).sum()
        return total

    with jax.default_matmul_precision("highest"):
        gradients = jax.jit(jax.grad(loss))(variables["params"])
    return to_state(jax.device_get({"params": gradients}), specimen.name)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in REST)) for name in SPECIMENS],
)
def test_gradients_are_pytorchs(name):
    got, want = ours(SPECIMENS[name]), theirs(SPECIMENS[name])
    assert got.keys() == want.keys()
    # The gradient of a shift that a norm removes is zero: both sides have rounding errors there.
    zero = 1e-6 * max(np.abs(array).max() for array in want.values())
    vanish = {key for key in want if max(np.abs(got[key]).max(), np.abs(want[key]).max()) < zero}
    found = {key: difference(np.asarray(got[key]), want[key]) for key in want.keys() - vanish}
    tolerance = TOLERANCES.get(name, TOLERANCE)
    assert not {key: value for key, value in found.items() if not value < tolerance}
