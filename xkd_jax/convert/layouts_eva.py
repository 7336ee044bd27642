"""Names of DINOv3's tensors in transformers and Meta's code, and of BEiT's in transformers."""

import re

import numpy as np

from xkd_jax.convert.layout import Layout


def _arrange_biases(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state with DINOv3's biases of queries and values as in timm: apart, and not if all are 0.

    Those of the keys are masked in Meta's code. In the published ViT-S, B and L, according to timm,
    all are 0.
    """
    state = dict(state)
    for name in [name for name in state if name.endswith(".attn.qkv.bias")]:
        query, _, value = np.split(state.pop(name), 3)
        attention = name.removesuffix("qkv.bias")
        state |= {f"{attention}q_bias": query, f"{attention}v_bias": value}
    biases = [name for name in state if re.fullmatch(r".*\.attn\.[qv]_bias", name)]
    if any(state[name].any() for name in biases):
        return state
    return {name: array for name, array in state.items() if name not in biases}


_META_DINOV3 = Layout(
    "Meta's",
    r"storage_tokens",
    ((r"^storage_tokens$", "reg_token"), (r"\.ls([12])\.gamma$", r".gamma_\1")),
    skipped=r"mask_token|rope_embed\.periods|.*\.bias_mask|local_cls_norm\..*",
    arrange=_arrange_biases,
)

_HUGGING_FACE_DINOV3 = Layout(
    "Hugging Face's",
    r"(dinov3_vit\.)?(model\.)?layer\.0\.attention\.q_proj\.weight",
    (
        (r"^dinov3_vit\.", ""),
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (r"^(model\.)?layer\.", "blocks."),
        (r"\.attention\.([qv])_proj\.bias$", r".attn.\1_bias"),
        (r"\.attention\.q_proj\.", ".attn.query."),
        (r"\.attention\.k_proj\.", ".attn.key."),
        (r"\.attention\.v_proj\.", ".attn.value."),
        (r"\.attention\.o_proj\.", ".attn.proj."),
        (r"\.layer_scale([12])\.lambda1$", r".gamma_\1"),
        (r"\.mlp\.up_proj\.", ".mlp.fc1."),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    ),
    skipped=r"(.*\.)?embeddings\.mask_token",
    arrange=_arrange_biases,
)

_HUGGING_FACE_BEIT = Layout(
    "Hugging Face's",
    r"(beit\.)?encoder\.(layer\.0\.lambda_1|(.*\.)?relative_position_bias_table)",
    (
        (r"^beit\.", ""),
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
        (r"^encoder\.layer\.", "blocks."),
        (r"^layernorm\.", "norm."),
        (r"^pooler\.layernorm\.", "fc_norm."),
        (r"^classifier\.", "head."),
        (r"\.lambda_([12])$", r".gamma_\1"),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.attention\.relative_position_bias\.", ".attn."),
        (r"\.attention\.attention\.query\.bias$", ".attn.q_bias"),
        (r"\.attention\.attention\.value\.bias$", ".attn.v_bias"),
        (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    ),
    skipped=r"(.*\.)?(embeddings\.mask_token|relative_position_index)",
)

LAYOUTS = (_META_DINOV3, _HUGGING_FACE_DINOV3, _HUGGING_FACE_BEIT)
