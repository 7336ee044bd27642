"""The taps of timm's Beit and Eva, for `reference`."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class _Products(TorchFunctionMode):
    """Keeps the query, key and value of each attention: after biases, norms and rotations."""

    def __init__(self):
        super().__init__()
        self.kept: list[tuple[torch.Tensor, ...]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        del types
        if func is F.scaled_dot_product_attention:
            self.kept.append(tuple(tensor.detach().clone() for tensor in args[:3]))
        return func(*args, **(kwargs or {}))


def hook_attention(model: nn.Module, taps: Any):
    """Sets the hooks on `model`, and returns how to finish what they kept in `taps`."""
    products, prefix = _Products(), model.num_prefix_tokens

    def begin(module, args):
        products.__enter__()

    def end(module, args, out):
        products.__exit__(None, None, None)

    model.register_forward_pre_hook(begin)
    model.register_forward_hook(end)
    for i, block in enumerate(model.blocks, start=1):
        taps.after(block, f"block{i:02d}")
    taps.after(model.norm, "tokens")
    taps.before(model.head, "pooled")

    def finish(taps: Any, logits: torch.Tensor) -> dict[str, Any]:
        everything = taps["tokens"]
        taps["tokens"], taps["cls"] = everything[:, prefix:], everything[:, 0]
        for i, heads in enumerate(products.kept, start=1):
            taps[f"block{i:02d}"] = taps[f"block{i:02d}"][:, prefix:]
            for key, head in zip(("query", "key", "value"), heads, strict=True):
                taps[key] = taps[f"block{i:02d}_{key}"] = head[:, :, prefix:]
        return {**taps, "logits": logits, "grid": model.patch_embed.grid_size}

    return finish
