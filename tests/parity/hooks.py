"""How each class of PyTorch's networks gives its taps, under our keys and in our layouts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.parity import hooks_convnext, hooks_regnet
from tests.parity.hooks_eva import hook_attention
from tests.parity.hooks_swinv2 import project


class Taps(dict[str, torch.Tensor]):
    """Tensors by our keys, kept by hooks: copies, because timm's ReLUs work in place."""

    def after(self, module: nn.Module, key: str) -> None:
        """Keeps the output of `module`."""
        module.register_forward_hook(lambda module, args, out: self.keep(key, out))

    def before(self, module: nn.Module, key: str) -> None:
        """Keeps the first argument of `module`."""
        module.register_forward_pre_hook(lambda module, args: self.keep(key, args[0]))

    def keep(self, key: str, tensor: torch.Tensor) -> None:
        self[key] = tensor.detach().clone()


# One function by timm's class: it sets the hooks, and returns how to finish what they kept.


def _cnn(model: nn.Module, taps: Taps):
    taps.before(model.get_classifier(), "pooled")

    def finish(taps: Taps, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        stages = {
            key: tap.permute(0, 2, 3, 1) if key.startswith("stage") else tap
            for key, tap in taps.items()
        }
        return {**stages, "logits": logits}

    return finish


def _staged(keep_stages: Callable[[nn.Module, Taps], None]):
    """The hooks of a CNN whose stages `keep_stages` keeps."""

    def hook(model: nn.Module, taps: Taps):
        keep_stages(model, taps)
        return _cnn(model, taps)

    return hook


def _resnet(model: nn.Module, taps: Taps):
    for stage in range(1, 5):
        layer = getattr(model, f"layer{stage}")
        last_relu = layer[-1].act3 if hasattr(layer[-1], "act3") else layer[-1].act2
        taps.before(last_relu, f"stage{stage}_pre")
        taps.after(layer, f"stage{stage}")
    return _cnn(model, taps)


def _byobnet(model: nn.Module, taps: Taps):
    for stage, blocks in enumerate(model.stages, start=1):
        taps.before(blocks[-1].act, f"stage{stage}_pre")
        taps.after(blocks, f"stage{stage}")
    return _cnn(model, taps)


def _efficientnet(model: nn.Module, taps: Taps):
    ends = [info["module"] for info in model.feature_info if info["reduction"] > 2]
    for stage, name in enumerate(ends, start=1):
        blocks = model.get_submodule(name)
        if type(blocks[-1]).__name__ == "ConvBnAct":
            taps.before(blocks[-1].bn1.act, f"stage{stage}_pre")
        else:  # a linear bottleneck: without an activation the two are equal
            taps.after(blocks, f"stage{stage}_pre")
        taps.after(blocks, f"stage{stage}")
    return _cnn(model, taps)


def _xception(model: nn.Module, taps: Taps):
    for stage, block in enumerate((1, 2, 11), start=1):
        taps.after(getattr(model, f"block{block}"), f"stage{stage}_pre")
        # timm's own feature: the ReLU with which the next block starts.
        taps.after(getattr(model, f"block{block + 1}").rep[0], f"stage{stage}")
    taps.before(model.act4, "stage4_pre")
    taps.after(model.act4, "stage4")
    return _cnn(model, taps)


def _inception(model: nn.Module, taps: Taps):
    # Built for 299 pixels, the auxiliary classifier does not fit smaller images.
    model.aux_logits = False
    branches = {
        1: ("Conv2d_4a_3x3", [""]),
        2: ("Mixed_5d", ["branch1x1", "branch5x5_2", "branch3x3dbl_3", "branch_pool"]),
        3: ("Mixed_6e", ["branch1x1", "branch7x7_3", "branch7x7dbl_5", "branch_pool"]),
        4: (
            "Mixed_7c",
            [
                "branch1x1",
                *("branch3x3_2a", "branch3x3_2b"),
                *("branch3x3dbl_3a", "branch3x3dbl_3b"),
                "branch_pool",
            ],
        ),
    }
    for stage, (name, parts) in branches.items():
        block = getattr(model, name)
        taps.after(block, f"stage{stage}")
        for i, part in enumerate(parts):
            taps.before(block.get_submodule(part).bn.act, f"stage{stage}_pre_{i}")
    rest = _cnn(model, taps)

    def finish(taps: Taps, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        for stage, (_, parts) in branches.items():
            pres = [taps.pop(f"stage{stage}_pre_{i}") for i in range(len(parts))]
            taps[f"stage{stage}_pre"] = torch.cat(pres, dim=1)
        return rest(taps, logits)

    return finish


def _cifar(model: nn.Module, taps: Taps):
    def finish(taps: Taps, logits: Any) -> dict[str, torch.Tensor]:
        taps.update(logits[1])
        return {
            key: tap.permute(0, 2, 3, 1) if key.startswith("stage") else tap
            for key, tap in taps.items()
        }

    return finish


def _split(taps: Taps, block: str, qkv: torch.Tensor, heads: int) -> None:
    """`qkv` [N, T, 3C] to query, key and value [N, heads, T, d]; the last block's come last."""
    n, t, _ = qkv.shape
    parts = qkv.reshape(n, t, 3, heads, -1).permute(2, 0, 3, 1, 4)
    for key, part in zip(("query", "key", "value"), parts, strict=True):
        taps[key] = taps[f"{block}_{key}"] = part


def _vit(model: nn.Module, taps: Taps):
    prefix, heads = model.num_prefix_tokens, model.blocks[0].attn.num_heads
    for i, block in enumerate(model.blocks, start=1):
        taps.after(block, f"block{i:02d}")
        taps.after(block.attn.qkv, f"qkv{i:02d}")
    taps.after(model.norm, "tokens")
    distilled = hasattr(model, "head_dist")
    if distilled:
        taps.after(model.head, "cls_logits")
        taps.after(model.head_dist, "dist_logits")
    else:
        taps.before(model.head, "pooled")

    def finish(taps: Taps, logits: torch.Tensor) -> dict[str, Any]:
        everything = taps["tokens"]
        if model.num_prefix_tokens:
            taps["cls"] = everything[:, 0]
        if distilled:
            taps["dist"] = everything[:, 1]
            taps["pooled"] = model.forward_head(everything, pre_logits=True)
        taps["tokens"] = everything[:, prefix:]
        for i in range(1, len(model.blocks) + 1):
            taps[f"block{i:02d}"] = taps[f"block{i:02d}"][:, prefix:]
            _split(taps, f"block{i:02d}", taps.pop(f"qkv{i:02d}")[:, prefix:], heads)
        return {**taps, "logits": logits, "grid": model.patch_embed.grid_size}

    return finish


def _swin(model: nn.Module, taps: Taps):
    blocks = [block for layer in model.layers for block in layer.blocks]
    for i, block in enumerate(blocks, start=1):
        taps.after(block, f"block{i:02d}")
        taps.before(block.attn, f"windows{i:02d}")
    for i, layer in enumerate(model.layers, start=1):
        taps.after(layer, f"stage{i}")
    taps.after(model.norm, "tokens")
    taps.before(model.head.fc, "pooled")

    def finish(taps: Taps, logits: torch.Tensor) -> dict[str, Any]:
        for i, block in enumerate(blocks, start=1):
            x = taps[f"block{i:02d}"]
            taps[f"block{i:02d}"] = x.flatten(1, 2)
            qkv = project(block.attn, taps.pop(f"windows{i:02d}"))
            qkv = _unwindow(qkv, block, x.shape)
            _split(taps, f"block{i:02d}", qkv, block.attn.num_heads)
        grid = tuple(taps["tokens"].shape[1:3])
        taps["tokens"] = taps["tokens"].flatten(1, 2)
        return {**taps, "logits": logits, "grid": grid}

    return finish


def _unwindow(qkv: torch.Tensor, block: nn.Module, shape: torch.Size) -> torch.Tensor:
    """`qkv` by (shifted, padded) window [N * windows, L, 3C] to raster order, [N, h * w, 3C]."""
    n, *sides, _ = shape
    window, shift = block.window_size, block.shift_size
    count = [-(-side // w) for side, w in zip(sides, window, strict=True)]
    qkv = qkv.reshape(n, *count, *window, -1).permute(0, 1, 3, 2, 4, 5)
    qkv = qkv.reshape(n, count[0] * window[0], count[1] * window[1], -1)
    qkv = qkv[:, : sides[0], : sides[1]]
    return torch.roll(qkv, tuple(shift), (1, 2)).flatten(1, 2)


HOOKS = {
    "ResNet": _resnet,
    "ByobNet": _byobnet,
    "EfficientNet": _efficientnet,
    "RegNet": _staged(hooks_regnet.regnet),
    "GhostNet": _staged(hooks_regnet.ghostnet),
    "MobileNetV3": _efficientnet,
    "Xception": _xception,
    "InceptionV3": _inception,
    "VisionTransformer": _vit,
    "VisionTransformerDistilled": _vit,
    "SwinTransformer": _swin,
    "Beit": hook_attention,
    "Eva": hook_attention,
    "SwinTransformerV2": _swin,
    "CifarResNet": _cifar,
    "WideResNet": _cifar,
    "CifarVGG": _cifar,
    "ConvNeXt": hooks_convnext.convnext,
    "MlpMixer": hooks_convnext.mixer,
}
