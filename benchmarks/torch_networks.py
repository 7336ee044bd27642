"""timm's networks with the weights of ours, and cakd's projectors and discriminator in PyTorch."""

import functools
import importlib
import re
import sys
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from xkd_jax.convert.files import to_state
from xkd_jax.errors import UserError
from xkd_jax.methods.cakd import TILE
from xkd_jax.model import Model

_libraries = []  # keeps the operator schemas alive


def import_timm() -> Any:
    """Imports timm, even if torchvision was built for a different torch than the installed one."""
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    # A torchvision that doesn't match torch lacks its operators; timm needs only their schemas.
    for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
        del sys.modules[name]
    library: Any = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return importlib.import_module("timm")


def create_network(model: Model, variables: Any) -> Any:
    """timm's network with the options of `model` and these weights.

    Args:
      model: a ResNet, a Vision Transformer, or another network that timm has under the same name.
      variables: `params` and `batch_stats`.
    """
    module: Any = model.module
    kind = type(module).__name__
    if kind == "ResNet":
        network = _create_resnet(module)
    elif kind == "VisionTransformer":
        names = ["num_classes", "img_size", "patch_size", "embed_dim", "depth", "num_heads"]
        names += ["mlp_ratio", "qkv_bias", "init_values", "class_token", "reg_tokens"]
        names += ["no_embed_class", "global_pool", "fc_norm", "pre_norm", "act_layer"]
        options = {name: getattr(module, name) for name in names}
        timm = import_timm()
        norm = functools.partial(timm.layers.LayerNorm, eps=module.norm_epsilon)
        network = timm.models.VisionTransformer(**options, norm_layer=norm)
    else:
        network = import_timm().create_model(
            model.name, num_classes=module.num_classes, **model.args
        )
    state = to_state(jax.device_get(variables), model.name)
    network.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()}, False)
    missing = [name for name in network.state_dict() if name not in state and not _is_made(name)]
    if missing or set(state) - set(network.state_dict()):
        raise UserError(
            f"timm's {model.name} has other tensors than ours; compare another network."
        )
    network.pretrained_cfg = {"mean": model.mean, "std": model.std}  # for timm's tasks
    return network


def _is_made(name: str) -> bool:
    """Whether a tensor isn't a weight: BatchNorm's counters and what a Swin computes."""
    return name.endswith(("num_batches_tracked", "relative_position_index", "attn_mask"))


def _create_resnet(module: Any) -> Any:
    """timm's ResNet with the Flax module's options."""
    resnet = import_timm().models.resnet
    block = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}[module.block]
    channels = [round(64 * 2**stage * module.width) for stage in range(4)]
    # With a deep stem, timm's layer1 can have other than 64 inputs; the stem is replaced below.
    network = resnet.ResNet(
        block, module.layers, module.num_classes, cardinality=module.groups,
        base_width=module.base_width, channels=channels, stem_type="deep",
        stem_width=channels[0] // 2,
    )  # fmt: skip
    if module.stem == "cifar":
        network.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    else:
        network.conv1 = nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False)
    return network


class Teacher(nn.Module):
    """A frozen Transformer of timm's, with the patch tokens, Q, K and V of its last block."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network
        self.is_swin = hasattr(network, "layers")
        last = network.layers[-1].blocks[-1] if self.is_swin else network.blocks[-1]
        self.attention = last.attn
        self.attention.qkv.register_forward_hook(self._keep)
        self.eval().requires_grad_(False)

    def _keep(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._qkv = output

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """Images [N, 3, H, W] -> what `_distil` and the losses on logits read.

        Returns:
          features: as `forward_head` takes them; tokens [N, T, D], qkv [3, N, H, T, d] and a Swin's
          bias [1, H, T, T] of the last block.
        """
        features = self.network.forward_features(images)
        qkv = self._qkv.unflatten(2, (3, self.attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        tokens, bias = features, None
        if self.is_swin:
            tokens, bias = features.flatten(1, 2), self.attention._get_rel_pos_bias()
            if tokens.shape[1] != qkv.shape[3]:
                raise UserError("a Swin's last map must be one window; set another image size.")
        elif prefix := self.network.num_prefix_tokens:
            tokens, qkv = features[:, prefix:], qkv[:, :, :, prefix:]
        return {"features": features, "tokens": tokens, "qkv": qkv, "bias": bias}

    @torch.no_grad()
    def head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The logits [N, K], or the pooled features [N, D] that they are computed from."""
        return self.network.forward_head(features, pre_logits=pre_logits)


class PCAProjector(nn.Module):
    """Proj_1: three 3x3 convolutions map the student's features to Q_S, K_S and V_S."""

    def __init__(self, channels: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("query", "key", "value"):
            self.add_module(name, nn.Conv2d(channels, width, 3, padding=1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w] -> Q, K and V stacked, [3, N, H, T, d]."""
        maps = torch.stack([convolution(features) for convolution in self.children()])
        return maps.flatten(3).unflatten(2, (self.heads, -1)).transpose(3, 4)


class GLProjector(nn.Module):
    """Proj_2: every 4x4 tile of the feature map has its own linear layer, in one einsum."""

    def __init__(self, channels: int, width: int, grid: tuple[int, int], dropout: float):
        super().__init__()
        tiles = -(-grid[0] // TILE) * -(-grid[1] // TILE)
        self.weight = nn.Parameter(torch.empty(tiles, channels, width))
        self.bias = nn.Parameter(torch.empty(tiles, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w] -> [N, T, D]."""
        n, channels, h, w = features.shape
        rows, columns = -(-h // TILE), -(-w // TILE)
        tiles = F.pad(self.dropout(features), (0, columns * TILE - w, 0, rows * TILE - h))
        tiles = tiles.reshape(n, channels, rows, TILE, columns, TILE).permute(0, 2, 4, 3, 5, 1)
        tiles = tiles.reshape(n, rows * columns, TILE * TILE, channels)
        projected = torch.einsum("ngpc,gcd->ngpd", tiles, self.weight) + self.bias[:, None]
        grid = projected.reshape(n, rows, columns, TILE, TILE, -1).transpose(2, 3)
        grid = grid.reshape(n, rows * TILE, columns * TILE, -1)
        return grid[:, :h, :w].flatten(1, 2)


class Discriminator(nn.Module):
    """Three fully connected layers on each token, their logits averaged to one per image."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.ModuleList([nn.Linear(width, out) for out in (width, width, 1)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, T, D] -> logits [N]."""
        for dense in self.dense[:-1]:
            tokens = F.leaky_relu(dense(tokens), 0.2)
        return self.dense[-1](tokens).mean((1, 2))


def copy_weights(module: nn.Module, variables: Any) -> None:
    """Copies the weights of one of cakd's Flax modules into its counterpart."""
    state = {}
    for path, value in jax.tree_util.tree_leaves_with_path(variables):
        name = ".".join(key.key for key in path[1:])
        name = re.sub(r"(query|key|value)_(kernel|bias)$", r"\1.\2", name.lower())
        name = re.sub(r"_(\d+)(?=\.|$)", r".\1", name)
        *parents, leaf = name.split(".")
        tensor = torch.from_numpy(np.array(value))
        if leaf == "kernel" and tensor.ndim != 3:  # the GL projector's kernel keeps its layout
            tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
        state[".".join([*parents, "weight" if leaf == "kernel" else leaf])] = tensor
    module.load_state_dict(state)
