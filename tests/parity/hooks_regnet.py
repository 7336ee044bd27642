"""RegNet's and GhostNet's taps in PyTorch, and their forms for 32x32 images."""

from typing import Any

from torch import nn


def regnet_strides(model: nn.Module) -> None:
    """Drops the strides of the stem and the first stage."""
    for layer in (model.stem, model.s1.b1.conv2, model.s1.b1.downsample):
        layer.conv.stride = (1, 1)


def ghostnet_strides(model: nn.Module) -> None:
    """Drops the first two strides."""
    block = model.blocks[1][0]
    for layer in (model.conv_stem, block.conv_dw, block.shortcut[0]):
        layer.stride = (1, 1)


def regnet(model: nn.Module, taps: Any) -> None:
    """Keeps the stages in `taps`, a `hooks.Taps`."""
    for stage in range(1, 5):
        layer = getattr(model, f"s{stage}")
        *_, last = layer.children()
        taps.before(last.act3, f"stage{stage}_pre")
        taps.after(layer, f"stage{stage}")


def ghostnet(model: nn.Module, taps: Any) -> None:
    """Keeps the last stage at each resolution in `taps`; blocks end without an activation."""
    for stage, blocks in enumerate((2, 4, 6, 8), start=1):
        taps.after(model.blocks[blocks], f"stage{stage}_pre")
        taps.after(model.blocks[blocks], f"stage{stage}")
