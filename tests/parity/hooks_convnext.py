"""Taps of timm's ConvNeXt and MlpMixer under our keys, for `reference`."""

from typing import Any

import torch
from torch import nn


def convnext(model: nn.Module, taps: Any):
    for stage, module in enumerate(model.stages, start=1):
        # Blocks end without an activation: the two are equal.
        taps.after(module, f"stage{stage}_pre")
        taps.after(module, f"stage{stage}")
    taps.before(model.get_classifier(), "pooled")

    def finish(taps: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        stages = {
            key: tap.permute(0, 2, 3, 1) if key.startswith("stage") else tap
            for key, tap in taps.items()
        }
        return {**stages, "logits": logits}

    return finish


def mixer(model: nn.Module, taps: Any):
    for i, block in enumerate(model.blocks, start=1):
        taps.after(block, f"block{i:02d}")
    taps.after(model.norm, "tokens")
    taps.before(model.head, "pooled")

    def finish(taps: Any, logits: torch.Tensor) -> dict[str, Any]:
        return {**taps, "logits": logits, "grid": model.stem.grid_size}

    return finish


def cifar_convnext_stem(model: nn.Module) -> None:
    model.stem[0] = nn.Conv2d(3, model.stem[0].out_channels, 3, padding=1)
