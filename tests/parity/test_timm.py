"""Every network against timm's own, live: converted weights, taps and running statistics.

Run with `pytest -m parity`, where the extra `parity` is installed; without it these fail. That
takes one network of each class, options and odd sizes; `pytest -m "parity or exhaustive"` takes
them all. tests/models/test_goldens.py compares each network with what timm made of it earlier.
"""

import pytest

from tests.parity.pairs import two_at_a_time
from tests.parity.specimen import TOLERANCE, Specimen, small
from xkd_jax.models import MODELS

pytestmark = pytest.mark.parity


def _cnn(name, size):
    return Specimen(name, size, 2, size, 4)


_SHALLOW = {"depth": 2, "patch_size": 4}
SPECIMENS = {
    **{name: small(name) for name in MODELS},
    # The networks' own sizes, one of a family, where the small one isn't that already.
    "resnet18-224": _cnn("resnet18", 224),
    "efficientnet_b0-224": _cnn("efficientnet_b0", 224),
    "tf_efficientnet_lite0-224": _cnn("tf_efficientnet_lite0", 224),
    "legacy_xception-299": Specimen("legacy_xception", 299, 1, 299, 1),
    "vit_small_patch32_384-384": Specimen("vit_small_patch32_384", 384),
    # Sizes that strides, windows and halvings do not divide.
    "resnet50-97": _cnn("resnet50", 97),
    "resnext26_32x4d-75": _cnn("resnext26_32x4d", 75),
    "resnet26d-75": _cnn("resnet26d", 75),
    "repvgg_a0-75": _cnn("repvgg_a0", 75),
    "mobilenetv2_050-97": _cnn("mobilenetv2_050", 97),
    "regnety_008-75": _cnn("regnety_008", 75),
    "ghostnet_100-97": _cnn("ghostnet_100", 97),
    "tf_efficientnet_lite0-75": _cnn("tf_efficientnet_lite0", 75),
    "tf_efficientnetv2_b0-75": _cnn("tf_efficientnetv2_b0", 75),
    "mobilenetv3_small_100-97": _cnn("mobilenetv3_small_100", 97),
    "mobilenetv4_hybrid_medium-97": _cnn("mobilenetv4_hybrid_medium", 97),
    "legacy_xception-84": _cnn("legacy_xception", 84),
    "inception_v3-90": Specimen("inception_v3", 90),
    "resnet8x4-29": _cnn("resnet8x4", 29),
    "wrn_16_1-19": _cnn("wrn_16_1", 19),
    "vgg8-64": _cnn("vgg8", 64),  # one more pooling
    "swin_tiny-60": Specimen("swin_tiny_patch4_window7_224", 60),
    "swin_tiny_patch2-36": Specimen("swin_tiny_patch2_window4_32", 36),
    "swinv2_tiny-60": Specimen("swinv2_tiny_window8_256", 60),
    "convnext_atto-79": Specimen("convnext_atto", 79),
    # Options of Vision Transformers.
    "vit-avg": Specimen("vit_tiny_patch4_32", 28, args={**_SHALLOW, "global_pool": "avg"}),
    "vit-avg_normed_tokens": Specimen(
        "vit_tiny_patch4_32", 28, args={**_SHALLOW, "global_pool": "avg", "fc_norm": False}
    ),
    "vit-no_class_token": Specimen(
        "vit_tiny_patch16_224",
        32,
        args={**_SHALLOW, "global_pool": "avg", "class_token": False, "qkv_bias": False},
    ),
    "vit-registers_with_positions": Specimen(
        "vit_tiny_patch4_32", 28, args={**_SHALLOW, "reg_tokens": 3}
    ),
    "dinov2-112": Specimen("vit_small_patch14_dinov2", 112, args={"depth": 2}),
    "dinov2_reg4-42": Specimen("vit_small_patch14_reg4_dinov2", 42, args={"depth": 2}),
    "dinov2_reg4-avg": Specimen(
        "vit_small_patch14_reg4_dinov2", 42, args={"depth": 2, "global_pool": "avg"}
    ),
    # Odd grids of rotary and relative positions.
    "dinov3-80": Specimen(
        "vit_small_patch16_dinov3", 80, args={"depth": 2, "qkv_bias": True, "global_pool": "token"}
    ),
    "eva02_small-98": Specimen("eva02_small_patch14_336", 98, args={"depth": 2}),
    "eva02_base-70": Specimen(
        "eva02_base_patch14_224", 70, args={"depth": 2, "num_reg_tokens": 2, "use_fc_norm": False}
    ),
    "beit-80": Specimen("beit_base_patch16_224", 80, args={"depth": 2, "global_pool": "token"}),
    "beit-shared": Specimen(
        "beit_base_patch16_224",
        48,
        args={"depth": 2, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True},
    ),
    "deit3-48": Specimen("deit3_small_patch16_224", 48, args={"depth": 2}),
    "clip-48": Specimen("vit_base_patch16_clip_224", 48, args={"depth": 2}),
    "clip_quickgelu-48": Specimen("vit_base_patch16_clip_quickgelu_224", 48, args={"depth": 2}),
    "siglip-48": Specimen("vit_base_patch16_siglip_224", 48, args={"depth": 2}),
    "siglip-class_token_tanh": Specimen(
        "vit_base_patch16_siglip_224",
        48,
        args={"depth": 2, "class_token": True, "act_layer": "gelu_tanh", "mlp_ratio": 2.0},
    ),
}


def first_of_their_class():
    names = {}
    for name, variant in MODELS.items():
        names.setdefault(variant.network, name)
    return set(names.values())


LIVE = first_of_their_class() | (SPECIMENS.keys() - MODELS.keys())


@pytest.fixture(scope="module")
def pending(request, quick_compilation):
    import torch

    from tests.parity import reference

    torch.set_num_threads(1)

    def differences(name):
        return reference.compare(SPECIMENS[name])

    with two_at_a_time(request, test_equals_timm, differences) as futures:
        yield futures


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in LIVE else pytest.mark.exhaustive)
        for name in SPECIMENS
    ],
)
def test_equals_timm(name, pending):
    found = pending[name].result()
    # Not "above": NaN is wrong too.
    assert not {key: value for key, value in found.items() if not value < TOLERANCE}
