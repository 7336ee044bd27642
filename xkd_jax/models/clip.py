"""Image encoders trained with captions: CLIP's and SigLIP's Vision Transformers, without the text.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
(arXiv:2103.00020), Cherti et al., "Reproducible scaling laws for contrastive language-image
learning" (OpenCLIP, arXiv:2212.07143), Zhai et al., "Sigmoid Loss for Language Image Pre-Training"
(arXiv:2303.15343), and SigLIP 2 (arXiv:2502.14786). The names follow timm's `vision_transformer.py`
(Ross Wightman, Apache-2.0).
"""

from xkd_jax.augment.normalization import CLIP_MEAN, CLIP_STD, HALF_MEAN, HALF_STD
from xkd_jax.models.variant import Variant
from xkd_jax.models.vit import SIZES, VisionTransformer


def _clip(patch: int, act_layer: str) -> Variant:
    args = {"img_size": 224, "patch_size": patch, "pre_norm": True, "norm_epsilon": 1e-5}
    args |= {"act_layer": act_layer, **SIZES["base"]}
    return Variant(VisionTransformer, args, 224, CLIP_MEAN, CLIP_STD)


def _siglip(patch: int) -> Variant:
    args = {"img_size": 224, "patch_size": patch, "class_token": False, "global_pool": "map"}
    return Variant(VisionTransformer, args | SIZES["base"], 224, HALF_MEAN, HALF_STD)


# OpenAI's and MetaCLIP's weights were trained with QuickGELU, OpenCLIP's mostly with GELU.
VARIANTS = {
    f"vit_base_patch{patch}_clip_{'quickgelu_' if act == 'quick_gelu' else ''}224": _clip(
        patch, act
    )
    for act in ("gelu", "quick_gelu")
    for patch in (16, 32)
}
VARIANTS |= {"vit_base_patch16_siglip_224": _siglip(16)}
