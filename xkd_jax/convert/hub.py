"""timm's weights on huggingface.co."""

import dataclasses
import re

from xkd_jax.convert.files import Checkpoint, read_checkpoint
from xkd_jax.convert.pytorch import first_line
from xkd_jax.errors import UserError, unknown
from xkd_jax.models import MODELS

# The tag that timm uses for a name without one (version 1.0.31).
DEFAULT_TAGS = {
    **dict.fromkeys(
        (
            "vit_tiny_patch16_224",
            "vit_tiny_patch16_384",
            "vit_small_patch16_224",
            "vit_small_patch16_384",
            "vit_small_patch32_224",
            "vit_small_patch32_384",
            "vit_base_patch16_384",
            "vit_base_patch32_224",
            "vit_base_patch32_384",
            "vit_large_patch16_224",
            "vit_large_patch16_384",
        ),
        "augreg_in21k_ft_in1k",
    ),
    "vit_base_patch16_224": "augreg2_in21k_ft_in1k",
    "vit_large_patch32_224": "orig_in21k",
    "vit_large_patch32_384": "orig_in21k_ft_in1k",
    **dict.fromkeys(
        (
            "deit_tiny_patch16_224",
            "deit_small_patch16_224",
            "deit_base_patch16_224",
            "deit_base_patch16_384",
            "deit_tiny_distilled_patch16_224",
            "deit_small_distilled_patch16_224",
            "deit_base_distilled_patch16_224",
            "deit_base_distilled_patch16_384",
        ),
        "fb_in1k",
    ),
    **{
        f"vit_{size}_patch14_{registers}dinov2": "lvd142m"
        for size in ("small", "base", "large")
        for registers in ("", "reg4_")
    },
    **{f"vit_base_patch{patch}_clip_224": "laion2b_ft_in12k_in1k" for patch in (16, 32)},
    "vit_base_patch16_clip_quickgelu_224": "metaclip_2pt5b",
    "vit_base_patch32_clip_quickgelu_224": "laion400m_e32",
    "vit_base_patch16_siglip_224": "v2_webli",
    **{
        f"deit3_{size}_patch16_{img}": "fb_in1k"
        for size in ("small", "base", "large")
        for img in (224, 384)
    },
    **{f"vit_{size}_patch16_dinov3": "lvd1689m" for size in ("small", "base", "large")},
    "eva02_small_patch14_224": "mim_in22k",
    "eva02_small_patch14_336": "mim_in22k_ft_in1k",
    "eva02_base_patch14_224": "mim_in22k",
    "eva02_base_patch14_448": "mim_in22k_ft_in22k_in1k",
    "beit_base_patch16_224": "in22k_ft_in22k_in1k",
    "swin_tiny_patch4_window7_224": "ms_in1k",
    **dict.fromkeys(
        (
            "swin_small_patch4_window7_224",
            "swin_base_patch4_window7_224",
            "swin_base_patch4_window12_384",
            "swin_large_patch4_window7_224",
            "swin_large_patch4_window12_384",
        ),
        "ms_in22k_ft_in1k",
    ),
    **{
        f"swinv2_{size}_window{window}_256": "ms_in1k"
        for size in ("tiny", "base")
        for window in (8, 16)
    },
    "swinv2_base_window12_192": "ms_in22k",
    "swinv2_base_window12to16_192to256": "ms_in22k_ft_in1k",
    "swinv2_base_window12to24_192to384": "ms_in22k_ft_in1k",
    "resnet18": "a1_in1k",
    "resnet34": "a1_in1k",
    "resnet50": "a1_in1k",
    "resnet101": "a1h_in1k",
    "resnet152": "a1h_in1k",
    "resnext50_32x4d": "a1h_in1k",
    **dict.fromkeys(("resnet18d", "resnet50d"), "ra2_in1k"),
    **dict.fromkeys(("resnet26d", "resnext50d_32x4d"), "bt_in1k"),
    "repvgg_a0": "rvgg_in1k",
    "resnext101_32x8d": "tv_in1k",
    "mobilenetv2_050": "lamb_in1k",
    "mobilenetv2_100": "ra_in1k",
    **dict.fromkeys(("mobilenetv2_110d", "mobilenetv2_120d", "mobilenetv2_140"), "ra_in1k"),
    "mobilenetv3_small_100": "lamb_in1k",
    "mobilenetv3_large_100": "ra_in1k",
    "mobilenetv4_conv_small": "e2400_r224_in1k",
    "mobilenetv4_conv_medium": "e500_r256_in1k",
    "mobilenetv4_hybrid_medium": "e200_r256_in12k_ft_in1k",
    "efficientnet_b0": "ra_in1k",
    "efficientnet_b1": "ra4_e3600_r240_in1k",
    "efficientnet_b2": "ra_in1k",
    "efficientnet_b3": "ra2_in1k",
    "tf_efficientnet_lite0": "in1k",
    **dict.fromkeys(("regnety_004", "regnety_008_tv", "regnety_016"), "tv2_in1k"),
    "regnety_008": "pycls_in1k",
    "regnety_032": "ra_in1k",
    "ghostnet_100": "in1k",
    "tf_efficientnetv2_b0": "in1k",
    "tf_efficientnetv2_s": "in21k_ft_in1k",
    "efficientnetv2_rw_t": "ra2_in1k",
    "legacy_xception": "tf_in1k",
    "inception_v3": "tv_in1k",
    "convnext_atto": "d2_in1k",
    "convnext_femto": "d1_in1k",
    **dict.fromkeys(("convnext_nano", "convnext_tiny", "convnext_small"), "in12k_ft_in1k"),
    "convnext_base": "fb_in22k_ft_in1k",
    "convnextv2_atto": "fcmae_ft_in1k",
    **dict.fromkeys(("convnextv2_nano", "convnextv2_tiny"), "fcmae_ft_in22k_in1k"),
    "mixer_b16_224": "goog_in21k_ft_in1k",
}
# Weights of networks with QuickGELU, which timm also loads into those with GELU.
_QUICK_GELU = re.compile(
    r"vit_base_patch(16|32)_clip_224\.(openai|metaclip_\w+)"
    r"|vit_base_patch32_clip_224\.laion400m_e32"
)


def full_name(name: str) -> str:
    """Adds timm's default tag to a timm name without one: "resnet18.a1_in1k".

    Raises:
      UserError: the network is unknown, or timm has no weights for it.
    """
    model, _, tag = name.partition(".")
    if model not in MODELS:
        raise unknown("network", model, MODELS)
    if model not in DEFAULT_TAGS:
        raise UserError(
            f"timm publishes no weights for {model}; train it, or give a file of weights."
        )
    if not re.fullmatch(r"\w*", tag):
        raise UserError(f"{name!r} is not a name of weights; write NAME or NAME.TAG, as in timm.")
    return f"{model}.{tag or DEFAULT_TAGS[model]}"


def download(name: str) -> Checkpoint:
    """Downloads timm's weights from the hub, or takes them from its local cache.

    Args:
      name: timm's, "resnet18" or "resnet18.a1_in1k".

    Raises:
      UserError: the name is unknown, the package `huggingface_hub` is missing, or the hub has no
        such weights or can't be reached.
    """
    name = full_name(name)
    model = name.partition(".")[0]
    # Both of timm's networks of CLIP, with QuickGELU and with GELU, load the same files.
    repository = f"timm/{name.replace('_clip_quickgelu_', '_clip_')}"
    try:
        from huggingface_hub import (  # pyright: ignore[reportMissingImports]
            errors,
            hf_hub_download,
        )
    except ImportError as error:
        raise UserError(
            "downloading needs huggingface_hub: pip install 'xkd_jax[hub]', or download the file "
            "yourself and give it with --from."
        ) from error
    try:
        hf_hub_download(repository, "config.json")
        try:
            path = hf_hub_download(repository, "model.safetensors")
        except errors.EntryNotFoundError:
            path = hf_hub_download(repository, "pytorch_model.bin")
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"huggingface.co can't be reached, and {repository} is not in the local cache; "
            "connect, or give its file with --from."
        ) from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        default = f"{model}.{DEFAULT_TAGS[model]}"
        hint = "give its file with --from" if name == default else f"timm's default is {default}"
        raise UserError(f"huggingface.co has no weights {repository}; {hint}.") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"{repository} could not be downloaded: {first_line(error)}") from error
    checkpoint = read_checkpoint(path, repository)
    known = {"model": model, "source": f"https://huggingface.co/{repository}"}
    notes = list(checkpoint.notes)
    if _QUICK_GELU.fullmatch(name):
        better = model.replace("_clip_", "_clip_quickgelu_")
        notes.append(f"warning: these weights were trained with QuickGELU, as {better} has it")
    return dataclasses.replace(checkpoint, metadata=checkpoint.metadata | known, notes=notes)
