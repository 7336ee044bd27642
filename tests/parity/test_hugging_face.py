"""Checkpoints that Hugging Face's transformers writes, through the converter: equal logits.

Run with `pytest -m parity`, where transformers is installed; skipped elsewhere.
"""

import jax
import numpy as np
import pytest

from tests.models.networks import TINY_REGNET
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import read_checkpoint
from xkd_jax.errors import UserError
from xkd_jax.models import create_model

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_compilation")]

TOLERANCE = 1e-4  # relative to the largest logit
CLASSES = 5
_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32}
_VIT |= {"intermediate_size": 64, "patch_size": 8}
_OUR_VIT = {"embed_dim": 16, "depth": 2, "patch_size": 8, "img_size": 32}
_SWIN = {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "patch_size": 2}
_SWIN |= {"window_size": 4}
_OUR_SWIN = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "patch_size": 2}
_RESNET = {"embedding_size": 8, "depths": [1, 2, 1, 1]}
_OUR_RESNET = {"layers": (1, 2, 1, 1), "width": 0.125}
_BASIC = {"layer_type": "basic", "hidden_sizes": [8, 16, 32, 64]}
_BOTTLENECK = {"layer_type": "bottleneck", "hidden_sizes": [32, 64, 128, 256]}
_REGNET = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "groups_width": 8}
_EFFICIENTNET = {"width_coefficient": 0.5, "depth_coefficient": 1.0, "hidden_dim": 640}
_EFFICIENTNET |= {"image_size": 64}  # the maps have even sides wherever the stride is 2
_CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "image_size": 32}
_OUR_CONVNEXT = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}
# Their class, its config's fields, and our network and arguments. Heads and window sizes come from
# the config.json.
NETWORKS = {
    "vit": ("ViTForImageClassification", _VIT, "vit_tiny_patch16_224", _OUR_VIT),
    "deit with teacher": (
        "DeiTForImageClassificationWithTeacher", _VIT, "deit_tiny_distilled_patch16_224", _OUR_VIT,
    ),
    "beit": (
        "BeitForImageClassification", _VIT | {"use_relative_position_bias": True},
        "beit_base_patch16_224", _OUR_VIT,
    ),
    "beit with shared and absolute positions": (
        "BeitForImageClassification",
        _VIT | {"use_shared_relative_position_bias": True,
                "use_absolute_position_embeddings": True},
        "beit_base_patch16_224", _OUR_VIT,
    ),
    # Where the last stage's map is smaller than the window, transformers itself fails.
    "swin": (
        "SwinForImageClassification", {**_SWIN, "image_size": 64}, "swin_tiny_patch4_window7_224",
        {**_OUR_SWIN, "img_size": 64},
    ),
    "swin v2": (
        "Swinv2ForImageClassification", {**_SWIN, "image_size": 64}, "swinv2_tiny_window8_256",
        {**_OUR_SWIN, "img_size": 64},
    ),
    "swin v2, other windows": (
        "Swinv2ForImageClassification",
        {**_SWIN, "image_size": 64, "pretrained_window_sizes": [3, 3, 3, 2]},
        "swinv2_tiny_window8_256",
        {**_OUR_SWIN, "img_size": 64},
    ),
    "resnet basic": (
        "ResNetForImageClassification", {**_RESNET, **_BASIC}, "resnet18", _OUR_RESNET,
    ),
    "convnext": (
        "ConvNextForImageClassification", {**_CONVNEXT, "layer_scale_init_value": 1.0},
        "convnext_atto", _OUR_CONVNEXT,
    ),
    "convnextv2": ("ConvNextV2ForImageClassification", _CONVNEXT, "convnextv2_tiny", _OUR_CONVNEXT),
    "resnet bottleneck": (
        "ResNetForImageClassification", {**_RESNET, **_BOTTLENECK}, "resnet50", _OUR_RESNET,
    ),
    "regnet": ("RegNetForImageClassification", _REGNET, "regnety_004", TINY_REGNET),
    "efficientnet": (
        "EfficientNetForImageClassification", _EFFICIENTNET, "efficientnet_b0", {"width": 0.5},
    ),
}  # fmt: skip


def write_random(folder, network, fields):
    """Saves a network of transformers with random weights, and returns it."""
    transformers = pytest.importorskip("transformers")
    from tests.parity.reference import torch  # first: it makes torchvision importable

    kind = getattr(transformers, network)
    model = kind(kind.config_class(**fields, num_labels=CLASSES)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        centre, spread = 0.0, 0.3
        norms = ("norm.weight", "normalization.weight", "_bn.weight")
        norms += ("_before.weight", "_after.weight")
        if name.endswith(("running_var", *norms)):
            centre, spread = 1.0, 0.1
        tensor.copy_(centre + spread * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", NETWORKS)
def test_equals_transformers(case, tmp_path):
    theirs, fields, name, args = NETWORKS[case]
    model = write_random(tmp_path, theirs, fields)
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    stated = checkpoint.metadata.get("args", {})  # with the user's, as the command line does
    converted = convert(checkpoint, name, args=stated | args)
    metadata = converted.metadata
    ours = create_model(name, num_classes=metadata["num_classes"], **metadata["args"])
    side = fields.get("image_size", 64)
    images = np.random.default_rng(0).standard_normal((3, side, side, 3), np.float32)
    logits, _ = jax.jit(ours.apply)(converted.variables, images)

    from tests.parity.reference import torch

    with torch.no_grad():
        want = model(torch.from_numpy(images).permute(0, 3, 1, 2)).logits.numpy()
    assert want.shape == (3, CLASSES)
    assert np.ptp(want, axis=0).max() > 0.1 * np.abs(want).max()  # the images matter
    np.testing.assert_allclose(logits, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


@pytest.mark.parametrize("biases", [True, False])
def test_dinov3s_tokens_equal_transformers(biases, tmp_path):
    fields = _VIT | {"num_register_tokens": 4, "query_bias": biases, "value_bias": biases}
    model = write_random(tmp_path, "DINOv3ViTModel", fields)
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    args = checkpoint.metadata["args"] | _OUR_VIT
    converted = convert(checkpoint, "vit_small_patch16_dinov3", args=args)
    assert converted.metadata["args"].get("qkv_bias", False) == biases
    ours = create_model("vit_small_patch16_dinov3", num_classes=0, **converted.metadata["args"])
    images = np.random.default_rng(0).standard_normal((3, 32, 32, 3), np.float32)
    _, out = jax.jit(ours.apply)(converted.variables, images)

    from tests.parity.reference import torch

    with torch.no_grad():
        want = model(torch.from_numpy(images).permute(0, 3, 1, 2)).last_hidden_state.numpy()
    assert want.shape == (3, 1 + 4 + 16, 16)
    np.testing.assert_allclose(out["cls"], want[:, 0], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(out["tokens"], want[:, 5:], rtol=0, atol=TOLERANCE)


def test_a_swin_v2_without_classifier(tmp_path):
    fields = {**_SWIN, "image_size": 64}
    model = write_random(tmp_path, "Swinv2Model", fields)
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    name, args = "swinv2_tiny_window8_256", {**_OUR_SWIN, "img_size": 64}
    converted = convert(checkpoint, name, args=checkpoint.metadata["args"] | args)
    ours = create_model(name, num_classes=0, **converted.metadata["args"])
    images = np.random.default_rng(0).standard_normal((3, 64, 64, 3), np.float32)
    _, out = jax.jit(ours.apply)(converted.variables, images)

    from tests.parity.reference import torch

    with torch.no_grad():
        want = model(torch.from_numpy(images).permute(0, 3, 1, 2))
    tokens, pooled = want.last_hidden_state.numpy(), want.pooler_output.numpy()
    np.testing.assert_allclose(out["tokens"], tokens, rtol=0, atol=TOLERANCE * abs(tokens).max())
    np.testing.assert_allclose(out["pooled"], pooled, rtol=0, atol=TOLERANCE * abs(pooled).max())


def test_a_distillation_token_without_its_head_is_refused(tmp_path):
    """Its logits are the class token's alone, where networks here take the mean of two heads."""
    write_random(tmp_path, "DeiTForImageClassification", _VIT)
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    args = checkpoint.metadata["args"] | _OUR_VIT
    with pytest.raises(UserError, match=r"unexpected tensor dist_token"):
        convert(checkpoint, "deit_tiny_patch16_224", args=args)
    with pytest.raises(UserError, match=r"head_dist\.weight .* is missing"):
        convert(checkpoint, "deit_tiny_distilled_patch16_224", args=args)
