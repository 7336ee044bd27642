"""Names of the image encoders of CLIP and SigLIP in transformers, OpenAI's code and OpenCLIP."""

import numpy as np

from xkd_jax.convert.layout import Layout


def _arrange(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turns tensors under timm's names, with the shapes of other libraries, into timm's.

    The projection into the space that images and texts share becomes the classifier, with a bias of
    zeros, as in timm.
    """
    state = dict(state)
    if "proj" in state:  # OpenCLIP's, [width, embedding]
        state["head.weight"] = state.pop("proj").T
    if "head.weight" in state:
        weight = state["head.weight"]
        state.setdefault("head.bias", np.zeros(len(weight), weight.dtype))
    for name in ("cls_token", "pos_embed"):
        if name in state:
            state[name] = state[name].reshape(1, -1, state[name].shape[-1])
    for leaf in ("weight", "bias"):
        if f"attn_pool.in_proj.{leaf}" in state:
            query, key, value = np.split(state.pop(f"attn_pool.in_proj.{leaf}"), 3)
            state[f"attn_pool.q.{leaf}"] = query
            state[f"attn_pool.kv.{leaf}"] = np.concatenate([key, value])
    return state


_HUGGING_FACE = Layout(  # CLIP and SigLIP
    "Hugging Face's",
    r"(vision_model\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight",
    (
        (r"^vision_model\.", ""),
        (r"^embeddings\.class_embedding$", "cls_token"),
        (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
        (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
        (r"^pre_layrnorm\.", "norm_pre."),  # sic
        (r"^post_layernorm\.", "norm."),
        (r"^head\.probe$", "attn_pool.latent"),
        (r"^head\.attention\.in_proj_", "attn_pool.in_proj."),
        (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
        (r"^head\.layernorm\.", "attn_pool.norm."),
        (r"^head\.mlp\.", "attn_pool.mlp."),
        (r"^visual_projection\.", "head."),
        (r"^encoder\.layers\.", "blocks."),
        (r"\.layer_norm([12])\.", r".norm\1."),
        (r"\.self_attn\.q_proj\.", ".attn.query."),
        (r"\.self_attn\.k_proj\.", ".attn.key."),
        (r"\.self_attn\.v_proj\.", ".attn.value."),
        (r"\.self_attn\.out_proj\.", ".attn.proj."),
    ),
    skipped=r"text_(model|projection)\..*|logit_(scale|bias)|(.*\.)?embeddings\.position_ids",
    arrange=_arrange,
)

_OPEN_CLIP = Layout(
    "OpenCLIP's",
    r"visual\.class_embedding",
    (
        (r"^visual\.", ""),
        (r"^class_embedding$", "cls_token"),
        (r"^positional_embedding$", "pos_embed"),
        (r"^conv1\.", "patch_embed.proj."),
        (r"^ln_pre\.", "norm_pre."),
        (r"^ln_post\.", "norm."),
        (r"^transformer\.resblocks\.", "blocks."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.attn\.in_proj_", ".attn.qkv."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.c_fc\.", ".mlp.fc1."),
        (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    ),
    skipped=r"(?!visual\.).*",
    arrange=_arrange,
)

_OPEN_CLIP_OF_TIMM = Layout(  # OpenCLIP with a network of timm, such as SigLIP's
    "OpenCLIP's",
    r"visual\.trunk\.patch_embed\.proj\.weight",
    ((r"^visual\.(trunk\.)?", ""), (r"^head\.proj\.", "head.")),
    skipped=r"(?!visual\.).*",
    arrange=_arrange,
)

LAYOUTS = (_HUGGING_FACE, _OPEN_CLIP, _OPEN_CLIP_OF_TIMM)
