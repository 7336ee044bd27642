"""CLIP's and SigLIP's image encoders from transformers, OpenCLIP and timm's hub: equal features.

Run with `pytest -m parity`; without transformers and open_clip, the tests that need them are
skipped.
"""

import importlib

import jax
import numpy as np
import pytest

from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import read_checkpoint
from xkd_jax.models import create_model

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_compilation")]

TOLERANCE = 1e-4  # relative to the largest feature
SIZES = {"embed_dim": 16, "depth": 2, "img_size": 32, "patch_size": 8}
_VISION = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "patch_size": 8}
_VISION |= {"num_attention_heads": 4, "image_size": 32}
_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 20}
_TEXT |= {"num_attention_heads": 2, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
CLIP, QUICK = "vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224"
SIGLIP = "vit_base_patch16_siglip_224"
NAMES = (CLIP, "vit_base_patch32_clip_224", QUICK, "vit_base_patch32_clip_quickgelu_224", SIGLIP)


@pytest.fixture
def torch():
    from tests.parity.reference import torch  # it makes torchvision importable

    torch.manual_seed(0)
    return torch


def randomise(torch, model):
    """Random weights, of norms around 1."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                norm = "norm" in name or ".ln_" in name
                centre = 1.0 if norm and name.endswith("weight") else 0.0
                tensor.copy_(centre + (0.1 if norm else 0.3) * torch.randn_like(tensor))
    return model.eval()


def features(converted, images):
    """The network's logits, or what they are computed from where it has no head."""
    metadata = converted.metadata
    module = create_model(
        metadata["model"], num_classes=metadata["num_classes"], **metadata["args"]
    )
    logits, out = jax.jit(module.apply)(converted.variables, images)
    return np.asarray(out["pooled"] if logits is None else logits)


def assert_equal(torch, converted, theirs):
    images = np.random.default_rng(0).standard_normal((3, 32, 32, 3), np.float32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    got = features(converted, images)
    assert got.shape == want.shape
    assert np.ptp(want, axis=0).max() > 0.1 * np.abs(want).max()  # the images matter
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


# transformers' model, fields of its vision config, and our network.
HUGGING_FACE = {
    "clip": ("CLIPVisionModel", {}, QUICK),
    "clip with gelu": ("CLIPVisionModel", {"hidden_act": "gelu"}, CLIP),
    "clip with projection": ("CLIPVisionModelWithProjection", {"projection_dim": 6}, QUICK),
    "clip with text": ("CLIPModel", {}, QUICK),
    "siglip": ("SiglipVisionModel", {}, SIGLIP),
    "siglip with text": ("SiglipModel", {}, SIGLIP),
}


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_equals_transformers(case, torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind, fields, name = HUGGING_FACE[case]
    whole = kind in ("CLIPModel", "SiglipModel")
    fields = {**_VISION, **fields}
    cls = getattr(transformers, kind)
    if whole:
        extra = {"projection_dim": 6} if kind == "CLIPModel" else {}
        config = cls.config_class(vision_config=fields, text_config=_TEXT, **extra)
    else:
        config = cls.config_class(**fields)
    model = randomise(torch, cls(config))
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    converted = convert(checkpoint, name, args=checkpoint.metadata["args"] | SIZES)
    assert converted.changes[0] == "renamed the tensors from Hugging Face's names"

    def theirs(images):
        if whole:
            return model.get_image_features(images).pooler_output
        out = model(images)
        return out.image_embeds if "Projection" in kind else out.pooler_output

    assert_equal(torch, converted, theirs)


def test_a_classifier_of_transformers_is_refused(torch, tmp_path):
    """It reads the mean of the tokens, without the final norm."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(vision_config=_VISION, text_config=_TEXT)
    transformers.CLIPForImageClassification(config).save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.metadata["architecture"] == "CLIPForImageClassification"
    with pytest.raises(Exception, match=r"unexpected tensor classifier\.bias"):
        convert(checkpoint, QUICK, args=SIZES | {"num_heads": 4})


@pytest.mark.parametrize("quick", [False, True])
def test_equals_open_clips(quick, torch, tmp_path):
    model = pytest.importorskip("open_clip.model")
    vision = model.CLIPVisionCfg(layers=2, width=16, head_width=4, patch_size=8, image_size=32)
    text = model.CLIPTextCfg(context_length=4, vocab_size=20, width=8, heads=2, layers=1)
    theirs = randomise(torch, model.CLIP(6, vision, text, quick_gelu=quick))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    checkpoint = read_checkpoint(tmp_path / "open_clip_pytorch_model.bin")
    converted = convert(checkpoint, QUICK if quick else CLIP, args=SIZES | {"num_heads": 4})
    assert converted.metadata["num_classes"] == 6
    assert_equal(torch, converted, theirs.encode_image)


def tags():
    timm = importlib.import_module("tests.parity.reference").timm
    return [tag for name in NAMES for tag in timm.list_pretrained(f"{name}.*")]


def test_all_of_timms_weights(torch, tmp_path):
    """The files of its hub, in small, by the names of all published weights."""
    from tests.parity.reference import timm

    found = tags()
    assert len(found) >= 29
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 4}
    for tag in found:
        cfg = timm.models.get_pretrained_cfg(tag)
        model = timm.create_model(tag, num_classes=cfg.num_classes, **sizes)
        folder = tmp_path / tag
        timm.models.save_for_hf(randomise(torch, model), folder, safe_serialization=True)
        converted = convert(read_checkpoint(folder / "model.safetensors"), args=sizes)
        metadata = converted.metadata
        assert metadata["model"] == tag.partition(".")[0]
        assert metadata["num_classes"] == cfg.num_classes
        assert tuple(metadata["mean"]) == cfg.mean
        assert tuple(metadata["std"]) == cfg.std
        assert metadata["interpolation"] == "bicubic"
        assert converted.changes == []
        assert_equal(torch, converted, model)
