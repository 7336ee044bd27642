"""Gradients of Vision Transformers against PyTorch's, of every parameter."""

import jax
import numpy as np
import pytest

from tests.parity.filling import images, noise
from tests.parity.specimen import CLASSES, TOLERANCE, Specimen, difference, filled
from xkd_jax.convert.files import to_state
from xkd_jax.models import create_model

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_compilation")]

_SHALLOW = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SPECIMENS = {
    "vit": Specimen("vit_tiny_patch4_32", 16, args=_SHALLOW),
    "dinov2": Specimen("vit_small_patch14_dinov2", 42, args=_SHALLOW),
    "dinov2_reg4": Specimen("vit_small_patch14_reg4_dinov2", 42, args=_SHALLOW),
    "deit3": Specimen("deit3_small_patch16_224", 48, args=_SHALLOW),
}


def weights(specimen):
    """The loss is a sum of the logits and the normalised tokens with these weights."""
    tokens = (specimen.size // 4) ** 2 if specimen.name.endswith("4_32") else 9
    return noise("logits", (2, CLASSES)), noise("tokens", (2, tokens, 48), 0.1)


def theirs(specimen):
    import torch

    from tests.parity import reference

    model = reference.build(specimen).eval()
    logits_weights, tokens_weights = map(torch.from_numpy, weights(specimen))
    tokens = []
    model.norm.register_forward_hook(lambda module, args, out: tokens.append(out))
    x = torch.from_numpy(images(2, specimen.size).transpose(0, 3, 1, 2)).contiguous()
    loss = (model(x) * logits_weights).sum()
    loss = loss + (tokens[0][:, model.num_prefix_tokens :] * tokens_weights).sum()
    loss.backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def ours(specimen):
    model = create_model(specimen.name, num_classes=CLASSES, **specimen.network_args)
    logits_weights, tokens_weights = weights(specimen)

    def loss(params):
        logits, out = model.apply({"params": params}, images(2, specimen.size))
        return (logits * logits_weights).sum() + (out["tokens"] * tokens_weights).sum()

    with jax.default_matmul_precision("highest"):
        gradients = jax.jit(jax.grad(loss))(filled(specimen)["params"])
    return to_state(jax.device_get({"params": gradients}), specimen.name)


@pytest.mark.parametrize("name", SPECIMENS)
def test_gradients_are_pytorchs(name):
    got, want = ours(SPECIMENS[name]), theirs(SPECIMENS[name])
    assert got.keys() == want.keys()
    found = {key: difference(np.asarray(got[key]), want[key]) for key in want}
    assert not {key: value for key, value in found.items() if not value < TOLERANCE}
