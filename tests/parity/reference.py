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
from tests.parity.hooks import HOOKS, Taps
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
    finish = HOOKS[type(model).__name__](model, taps)
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
