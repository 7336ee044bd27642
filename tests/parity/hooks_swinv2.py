"""What of PyTorch's Swin Transformers no hook sees."""

import math

import torch
from torch import nn
from torch.nn import functional as F


@torch.no_grad()
def project(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Query, key and value of both versions' attention, [N * windows, L, 3C].

    The second version's query and key with the cosine's scale, so that the scores are their product
    over sqrt(d).
    """
    if not hasattr(attention, "logit_scale"):
        return attention.qkv(x)
    bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    qkv = F.linear(x, attention.qkv.weight, bias)
    query, key, value = qkv.unflatten(2, (3, attention.num_heads, -1)).unbind(2)
    scale = attention.logit_scale[:, 0].clamp(max=math.log(100)).exp() * query.shape[-1] ** 0.5
    query, key = (F.normalize(part, dim=-1) * scale.sqrt() for part in (query, key))
    return torch.stack([query, key, value], 2).flatten(2)
