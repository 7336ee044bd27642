"""Every network in PyTorch, with its taps under our keys and in our layouts."""

import copy
import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.parity import cifar_torch, hooks_convnext, hooks_regnet
from tests.parity.filling import fill, images
from tests.parity.hooks_eva import hook_attention
from tests.parity.hooks_swinv2 import project
from tests.parity.specimen import CLASSES, Specimen, differences, ours
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import Checkpoint
from xkd_jax.models import cifar


def import_timm():
    """Imports timm, even with a torchvision that lacks its C++ operators.

    PyPI's torchvision lacks them alongside a CPU build of PyTorch. timm only has to import it, for
    which declared operators are enough.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        torch.xkd_library = library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("timm")


timm = import_timm()


def _cifar_resnet_stem(model: nn.Module) -> None:
    model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()


def _cifar_efficientnet_strides(model: nn.Module) -> None:
    convolutions = (module for module in model.blocks.modules() if isinstance(module, nn.Conv2d))
    first = next(module for module in convolutions if module.stride == (2, 2))
    model.conv_stem.stride = first.stride = (1, 1)


def _cifar_mobilenetv3_strides(model: nn.Module) -> None:
    _cifar_efficientnet_strides(model)
    model.blocks[0][0].has_skip = True  # as timm's, had it been built with stride 1


def _cifar_repvgg_strides(model: nn.Module) -> None:
    for block in (model.stem, model.stages[0][0]):
        block.conv_kxk.conv.stride = block.conv_1x1.conv.stride = (1, 1)
    model.stages[0][0].identity = copy.deepcopy(model.stages[0][1].identity)


def _widen(times: int) -> Callable[[nn.Module], None]:
    """Multiplies every channel count but the images' and the classes'."""

    def edit(model: nn.Module) -> None:
        for name, module in list(model.named_modules()):
            wider = None
            if isinstance(module, nn.Conv2d):
                inputs, groups = module.in_channels, module.groups
                wider = nn.Conv2d(
                    inputs if inputs == 3 else inputs * times,
                    module.out_channels * times,
                    module.kernel_size,
                    module.stride,
                    module.padding,
                    groups=groups if groups == 1 else groups * times,
                    bias=module.bias is not None,
                )
            elif isinstance(module, nn.BatchNorm2d):
                wider = nn.BatchNorm2d(module.num_features * times, module.eps, module.momentum)
            elif isinstance(module, nn.Linear):
                wider = nn.Linear(module.in_features * times, module.out_features)
            if wider is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, wider)

    return edit


# Our names that timm does not have: its name, its arguments and what is still to change.
_CHANGED: dict[str, tuple[str, dict[str, Any], Callable[[nn.Module], None] | None]] = {
    "resnet50x2": ("resnet50", {}, _widen(2)),
    "resnet101x3": ("resnet101", {}, _widen(3)),
    "resnet152x2": ("resnet152", {}, _widen(2)),
    "resnext26_32x4d": ("resnext50_32x4d", {"layers": (2, 2, 2, 2)}, None),
    "resnet18_32": ("resnet18", {}, _cifar_resnet_stem),
    "resnet34_32": ("resnet34", {}, _cifar_resnet_stem),
    "resnet50_32": ("resnet50", {}, _cifar_resnet_stem),
    "legacy_xception_x2": ("legacy_xception", {}, _widen(2)),
    "efficientnet_b0_32": ("efficientnet_b0", {}, _cifar_efficientnet_strides),
    "mobilenetv2_100_32": ("mobilenetv2_100", {}, _cifar_efficientnet_strides),
    "repvgg_a0_32": ("repvgg_a0", {}, _cifar_repvgg_strides),
    "regnety_004_32": ("regnety_004", {}, hooks_regnet.regnet_strides),
    "ghostnet_100_32": ("ghostnet_100", {}, hooks_regnet.ghostnet_strides),
    "mobilenetv3_small_100_32": ("mobilenetv3_small_100", {}, _cifar_mobilenetv3_strides),
    "mobilenetv4_conv_small_32": ("mobilenetv4_conv_small", {}, _cifar_efficientnet_strides),
    "tf_efficientnetv2_b0_32": ("tf_efficientnetv2_b0", {}, _cifar_efficientnet_strides),
    "vit_tiny_patch4_32": ("vit_tiny_patch16_224", {"patch_size": 4}, None),
    "vit_small_patch4_32": ("vit_small_patch16_224", {"patch_size": 4}, None),
    "swin_tiny_patch2_window4_32": (
        "swin_tiny_patch4_window7_224",
        {"patch_size": 2, "window_size": 4},
        None,
    ),
    "swinv2_tiny_patch2_window4_32": (
        "swinv2_tiny_window8_256",
        {"patch_size": 2, "window_size": 4},
        None,
    ),
    "inception_v3": ("inception_v3", {"aux_logits": True}, None),
    "convnext_atto_32": ("convnext_atto", {}, hooks_convnext.cifar_convnext_stem),
}


def build(specimen: Specimen) -> nn.Module:
    """The PyTorch network of the same function, its weights filled by name."""
    if specimen.name in cifar.VARIANTS:
        model = cifar_torch.create(specimen.name, CLASSES)
    else:
        name, args, edit = _CHANGED.get(specimen.name, (specimen.name, {}, None))
        args = {**args, **specimen.network_args}
        model = timm.create_model(name, num_classes=CLASSES, **args)
        if edit is not None:
            edit(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                tensor.copy_(torch.from_numpy(fill(name, tuple(tensor.shape))))
    return model


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


def compare(specimen: Specimen) -> dict[str, float]:
    """The largest relative differences between ours, with their converted weights, and theirs.

    Returns:
      by key, as in `theirs`.
    """
    model = build(specimen)
    state = {
        name: tensor.numpy().copy()  # training changes the statistics in place
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    want = theirs(specimen, model)
    del model
    checkpoint = Checkpoint("the reference", state, {})
    converted = convert(checkpoint, specimen.name, args=specimen.network_args)
    assert not converted.changes, converted.changes
    return differences(ours(specimen, converted.variables), want)


def theirs(specimen: Specimen, model: nn.Module) -> dict[str, np.ndarray]:
    """The outputs of PyTorch's network, from `build`.

    Returns:
      every tap in evaluation by its key; for a network with running statistics also, from one
      training-mode pass, each statistic after it by "train/" and its name, and Inception's
      "train/aux_logits".
    """
    model.eval()
    taps = Taps()
    finish = _HOOKS[type(model).__name__](model, taps)
    with torch.no_grad():
        logits = model(_nchw(images(specimen.batch, specimen.size)))
    taps = finish(taps, logits)
    records = {key: _ours(tap) for key, tap in taps.items()}
    if specimen.train_size:
        records.update(_train(model, specimen))
    return records


def _train(model: nn.Module, specimen: Specimen) -> dict[str, np.ndarray]:
    model.train()
    records = {}
    if hasattr(model, "aux_logits"):
        model.aux_logits = True
    with torch.no_grad():
        out = model(_nchw(images(specimen.train_batch, specimen.train_size)))
    if hasattr(model, "aux_logits"):
        records["train/aux_logits"] = out[1].numpy()
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            records[f"train/{name}"] = tensor.numpy()
    return records


def _nchw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.transpose(0, 3, 1, 2)).contiguous()


def _ours(tap: Any) -> np.ndarray:
    return tap.numpy() if isinstance(tap, torch.Tensor) else np.asarray(tap)


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


_HOOKS = {
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
