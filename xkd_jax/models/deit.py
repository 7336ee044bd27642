"""DeiT: Vision Transformers trained on ImageNet alone, with and without the distillation token.

Touvron et al., "Training data-efficient image transformers & distillation through attention"
(arXiv:2012.12877) and "DeiT III: Revenge of the ViT" (arXiv:2204.07118). The names follow timm's
`deit.py` (Ross Wightman, Apache-2.0).
"""

from xkd_jax.models.variant import Variant
from xkd_jax.models.vit import SIZES, VisionTransformer


def _variant(size: str, img: int, distilled: bool) -> Variant:
    args = {"img_size": img, "patch_size": 16, "distilled": distilled, **SIZES[size]}
    return Variant(VisionTransformer, args, img)


VARIANTS = {
    f"deit_{size}_{'distilled_' if distilled else ''}patch16_{img}": _variant(size, img, distilled)
    for size, img in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384))
    for distilled in (False, True)
}


def _deit3(size: str, img: int) -> Variant:
    args = {"img_size": img, "patch_size": 16, "init_values": 1e-6, "no_embed_class": True}
    return Variant(VisionTransformer, args | SIZES[size], img)


VARIANTS |= {
    f"deit3_{size}_patch16_{img}": _deit3(size, img)
    for size in ("small", "base", "large")
    for img in (224, 384)
}
