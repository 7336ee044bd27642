"""Other libraries' names: torchvision, Hugging Face, and CIFAR ResNets without projections."""

import functools
import importlib

import numpy as np
import pytest

from tests.convert.test_conversion import TINY_RESNET, TINY_SWIN, TINY_VIT, checkpoint, message
from tests.parity.blockwise import blockwise
from xkd_jax.augment.normalization import CIFAR10_MEAN, CIFAR10_STD, IMAGENET_MEAN
from xkd_jax.convert.configs import state_network
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import Checkpoint
from xkd_jax.convert.layouts import add_shortcuts, find_layout, rename
from xkd_jax.models import create_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

TORCHVISION_VIT = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
HUGGING_FACE_RESNET = "resnet.embedder.embedder.convolution.weight"
TORCHVISION_REGNET = "trunk_output.block1.block1-0.f.se.fc1.weight"
HUGGING_FACE_REGNET = "encoder.stages.0.layers.0.layer.2.attention.0.weight"  # a RegNetModel's
STAGES = "resnet.encoder.stages"


@pytest.mark.parametrize(
    ("marker", "theirs", "timms"),
    [
        (TORCHVISION_VIT, "class_token", "cls_token"),
        (TORCHVISION_VIT, "encoder.pos_embedding", "pos_embed"),
        (TORCHVISION_VIT, "conv_proj.bias", "patch_embed.proj.bias"),
        (TORCHVISION_VIT, "encoder.layers.encoder_layer_11.ln_2.bias", "blocks.11.norm2.bias"),
        (TORCHVISION_VIT, TORCHVISION_VIT, "blocks.0.attn.qkv.weight"),
        (TORCHVISION_VIT, "encoder.layers.encoder_layer_3.mlp.0.bias", "blocks.3.mlp.fc1.bias"),
        (TORCHVISION_VIT, "heads.head.weight", "head.weight"),
        (HUGGING_FACE_RESNET, HUGGING_FACE_RESNET, "conv1.weight"),
        (HUGGING_FACE_RESNET, "resnet.embedder.embedder.normalization.weight", "bn1.weight"),
        (
            HUGGING_FACE_RESNET,
            f"{STAGES}.1.layers.0.shortcut.convolution.weight",
            "layer2.0.downsample.0.weight",
        ),
        (
            HUGGING_FACE_RESNET,
            f"{STAGES}.3.layers.2.layer.2.normalization.bias",
            "layer4.2.bn3.bias",
        ),
        (
            HUGGING_FACE_RESNET,
            f"{STAGES}.0.layers.1.layer.0.convolution.weight",
            "layer1.1.conv1.weight",
        ),
        (HUGGING_FACE_RESNET, "classifier.1.bias", "fc.bias"),
        (TORCHVISION_REGNET, TORCHVISION_REGNET, "s1.b1.se.fc1.weight"),
        (TORCHVISION_REGNET, "stem.1.running_var", "stem.bn.running_var"),
        (
            TORCHVISION_REGNET,
            "trunk_output.block3.block3-16.f.c.1.bias",
            "s3.b17.conv3.bn.bias",
        ),
        (
            TORCHVISION_REGNET,
            "trunk_output.block2.block2-0.proj.0.weight",
            "s2.b1.downsample.conv.weight",
        ),
        (TORCHVISION_REGNET, "fc.bias", "head.fc.bias"),
        (HUGGING_FACE_REGNET, HUGGING_FACE_REGNET, "s1.b1.se.fc1.weight"),
        (HUGGING_FACE_REGNET, "embedder.embedder.convolution.weight", "stem.conv.weight"),
        (
            HUGGING_FACE_REGNET,
            "regnet.encoder.stages.3.layers.1.layer.3.normalization.bias",
            "s4.b2.conv3.bn.bias",
        ),
        (
            HUGGING_FACE_REGNET,
            "regnet.encoder.stages.1.layers.0.shortcut.normalization.weight",
            "s2.b1.downsample.bn.weight",
        ),
    ],
)
def test_names(marker, theirs, timms):
    layout = find_layout([marker])
    assert layout
    assert rename(theirs, layout) == timms


def hugging_face_blocks(state, block, attention, theirs):
    """The tensors of a Transformer's block under Hugging Face's names."""
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    names |= {"attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense"}
    names |= {"mlp.fc2": "output.dense"}
    for leaf in ("weight", "bias"):
        for timms, name in names.items():
            yield f"{theirs}.{name}.{leaf}", state[f"{block}.{timms}.{leaf}"]
        parts = np.split(state[f"{block}.attn.qkv.{leaf}"], 3)
        for part, array in zip(("query", "key", "value"), parts, strict=True):
            yield f"{theirs}.{attention}.{part}.{leaf}", array


def hugging_face_vit(args):
    state = checkpoint("vit_tiny_patch16_224", args).state
    theirs = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
        "vit.pooler.dense.weight": np.zeros((8, 8), np.float32),
    }
    names = {"patch_embed.proj": "vit.embeddings.patch_embeddings.projection"}
    names |= {"norm": "vit.layernorm", "head": "classifier"}
    for timms, name in names.items():
        theirs |= {f"{name}.{leaf}": state[f"{timms}.{leaf}"] for leaf in ("weight", "bias")}
    for i in range(args["depth"]):
        theirs |= hugging_face_blocks(
            state, f"blocks.{i}", "attention.attention", f"vit.encoder.layer.{i}"
        )
    return state, theirs


@pytest.mark.slow
def test_a_vit_of_hugging_face():
    state, theirs = hugging_face_vit(TINY_VIT)
    result = convert(Checkpoint("w", theirs, {}), "vit_tiny_patch16_224", args=TINY_VIT)
    assert result.changes == ["renamed the tensors from Hugging Face's names"]
    want = convert(Checkpoint("w", state, {}), "vit_tiny_patch16_224", args=TINY_VIT).variables
    qkv = result.variables["params"]["blocks_0"]["attn"]["qkv"]
    np.testing.assert_array_equal(qkv["kernel"], state["blocks.0.attn.qkv.weight"].T)
    np.testing.assert_array_equal(want["params"]["blocks_0"]["attn"]["qkv"]["bias"], qkv["bias"])
    del theirs["vit.encoder.layer.0.attention.attention.key.bias"]
    assert "blocks.0.attn.qkv.bias [24] is missing" in message(
        Checkpoint("w", theirs, {}), "vit_tiny_patch16_224", args=TINY_VIT
    )


def test_a_swin_of_hugging_face():
    model, args = "swin_tiny_patch4_window7_224", {**TINY_SWIN, "img_size": 32, "window_size": 4}
    state = checkpoint(model, args).state
    theirs, table = {}, "relative_position_bias_table"
    for layer, depth in enumerate(TINY_SWIN["depths"]):
        for i in range(depth):
            block, name = f"layers.{layer}.blocks.{i}", f"swin.encoder.layers.{layer}.blocks.{i}"
            theirs |= hugging_face_blocks(state, block, "attention.self", name)
            theirs[f"{name}.attention.self.{table}"] = state[f"{block}.attn.{table}"]
            index = np.zeros((16, 16), np.int64)
            theirs[f"{name}.attention.self.relative_position_index"] = index
        for part in ("norm.weight", "norm.bias", "reduction.weight") if layer else ():
            name = f"swin.encoder.layers.{layer - 1}.downsample.{part}"
            theirs[name] = state[f"layers.{layer}.downsample.{part}"]
    names = {"patch_embed.proj": "swin.embeddings.patch_embeddings.projection"}
    names |= {"patch_embed.norm": "swin.embeddings.norm"}
    names |= {"norm": "swin.layernorm", "head.fc": "classifier"}
    for timms, name in names.items():
        theirs |= {f"{name}.{leaf}": state[f"{timms}.{leaf}"] for leaf in ("weight", "bias")}
    result = convert(Checkpoint("w", theirs, {}), model, args=args)
    want = convert(Checkpoint("w", state, {}), model, args=args)
    np.testing.assert_equal(result.variables, want.variables)


def pytorch_resnet_cifar10(depth=8, classes=10):
    """A CIFAR ResNet's tensors under the names of akamaster/pytorch_resnet_cifar10."""
    state = checkpoint("resnet8", {"depth": depth}, classes=classes).state
    return {
        name.replace("fc.", "linear."): array
        for name, array in state.items()
        if "downsample" not in name
    }


def test_shortcuts_of_option_a():
    theirs = pytorch_resnet_cifar10()
    state = add_shortcuts(theirs)
    assert not any(name.startswith("layer1.0.downsample") for name in state)
    kernel = state["layer2.0.downsample.0.weight"]
    assert kernel.shape == (32, 16, 1, 1)
    # Channel 0 of 16 becomes channel 8 of 32, with 8 zeros on each side.
    np.testing.assert_array_equal(kernel[8:24, :, 0, 0], np.eye(16))
    assert kernel.sum() == 16
    result = convert(Checkpoint("w", theirs, {}), "resnet8")
    assert result.changes == [
        "renamed the tensors from pytorch_resnet_cifar10's names",
        "wrote the shortcuts of option A, which have no weights, as convolutions",
    ]
    norm = result.variables["batch_stats"]["layer2_0"]["downsample_1"]
    # The BatchNorm is the identity to the last bit.
    assert (1 / np.sqrt(norm["var"] + np.float32(1e-5)) == 1).all()
    # Its authors normalise CIFAR-10 with ImageNet's statistics.
    assert result.metadata["mean"] == list(IMAGENET_MEAN)
    assert convert(Checkpoint("w", theirs, {})).metadata["model"] == "resnet8"


def test_shortcuts_that_are_projections_stay():
    state = checkpoint("resnet8").state
    theirs = {
        k.replace("fc.", "linear.").replace("downsample", "shortcut"): state[k] for k in state
    }
    result = convert(Checkpoint("w", theirs, {}), "resnet8")
    assert result.changes == ["renamed the tensors from pytorch-cifar's names"]
    want = convert(Checkpoint("w", state, {}), "resnet8").variables
    np.testing.assert_equal(result.variables, want)


def test_cifar10_statistics():
    ten = convert(checkpoint("resnet8", classes=10), "resnet8")
    assert ten.metadata["mean"] == list(CIFAR10_MEAN)
    assert ten.metadata["std"] == list(CIFAR10_STD)
    assert "(CIFAR-10's)" in ten.assumed
    for classes in (7, 100):
        other = convert(checkpoint("resnet8", classes=classes), "resnet8")
        assert "mean 0.5071 0.4865 0.4409 and std 0.2673 0.2564 0.2762 (CIFAR-100's)" in (
            other.assumed
        )
    # A new head doesn't change the images that the network was trained with.
    again = convert(checkpoint("resnet8", classes=100), "resnet8", num_classes=10)
    assert again.metadata["mean"] == other.metadata["mean"]
    given = convert(checkpoint("resnet8", classes=10), "resnet8", mean=(0, 0, 0), std=(1, 1, 1))
    assert given.metadata["mean"] == [0, 0, 0]
    assert "mean" not in given.assumed


def test_networks_that_are_known_and_not_read():
    for name, network in (
        ("features.denseblock1.norm.weight", "torchvision's DenseNet"),
        ("backbone.layers.0.ln1.weight", "mmpretrain's ViT"),
        ("blocks.0.mlp.w12.weight", "DINOv2's ViT-g"),
    ):
        theirs = Checkpoint("w", {name: np.zeros(3, np.float32)}, {})
        assert f"w looks like {network}" in message(theirs)
        assert "--timm NAME" in message(theirs, "resnet18", args=TINY_RESNET)


@pytest.fixture
def torch():
    import torch

    torch.manual_seed(0)
    return torch


def randomise(torch, module):
    """Weights and statistics that leave no tensor at a special value, and the signal alive."""
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.ndim > 1:
            tensor.normal_(0, (2 / max(tensor[0].numel(), 2)) ** 0.5)
        else:
            scale = name.endswith(("running_var", "weight"))
            tensor.uniform_(0.5 if scale else -0.5, 1.5 if scale else 0.5)
    return module.eval()


def compare(torch, theirs, model, args, size):
    state = {
        name: tensor.numpy()
        for name, tensor in theirs.state_dict().items()
        if "num_batches" not in name
    }
    result = convert(Checkpoint("w", state, {}), model, args=args)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        want = theirs(images).numpy()
    metadata = result.metadata
    model, classes = metadata["model"], metadata["num_classes"]
    module = create_model(model, num_classes=classes, **metadata["args"])
    with blockwise():
        got, _ = module.apply(result.variables, images.numpy().transpose(0, 2, 3, 1))
    scale = max(1, np.abs(want).max())
    np.testing.assert_allclose(np.asarray(got) / scale, want / scale, atol=1e-4)
    assert np.abs(want[0] - want[1]).max() > 1e-3 * scale
    return result


@pytest.mark.parity
def test_option_a_is_pytorchs(torch):
    from torch import nn
    from torch.nn import functional as F

    from tests.parity.cifar_torch import BasicBlock, CifarResNet

    class Shortcut(nn.Module):
        def forward(self, x):
            pad = x.shape[1] // 2
            return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad))

    theirs = CifarResNet(20, (16, 16, 32, 64), 10)
    for block in theirs.modules():
        if isinstance(block, BasicBlock) and block.downsample is not None:
            block.downsample = nn.Sequential(Shortcut())
    randomise(torch, theirs)

    class Logits(nn.Module):
        def state_dict(self):
            return {k.replace("fc.", "linear."): v for k, v in theirs.state_dict().items()}

        def forward(self, images):
            return theirs(images)[0]

    compare(torch, Logits(), "resnet20", None, 32)


@pytest.mark.parity
def test_torchvisions_networks(torch):

    from tests.parity import reference

    assert reference.timm  # its import makes torchvision's possible
    models = importlib.import_module("torchvision.models")

    vit = models.VisionTransformer(32, 8, 2, 2, 32, 128, num_classes=5)
    args = {"embed_dim": 32, "num_heads": 2, "depth": 2, "patch_size": 8, "img_size": 32}
    result = compare(torch, randomise(torch, vit), "vit_tiny_patch16_224", args, 32)
    assert result.changes == ["renamed the tensors from torchvision's names"]
    assert result.metadata["mean"] == list(IMAGENET_MEAN)
    swin = models.SwinTransformer([4, 4], 16, [2, 2, 2, 1], [1, 2, 4, 8], [4, 4], num_classes=5)
    args = {"embed_dim": 16, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 4, 8)}
    args |= {"window_size": 4, "img_size": 128}
    compare(torch, randomise(torch, swin), "swin_tiny_patch4_window7_224", args, 128)
    mobile = models.mobilenet_v2(width_mult=0.5, num_classes=5)
    compare(torch, randomise(torch, mobile), "mobilenetv2_050", None, 64)
    efficient = models.efficientnet_b0(num_classes=5)
    compare(torch, randomise(torch, efficient), "efficientnet_b0", None, 64)
    sizes = ((8, 16, 1), (16, 24, 1), (24, 32, 2), (32, None, 1))
    blocks = [models.convnext.CNBlockConfig(*size) for size in sizes]
    convnext = models.ConvNeXt(blocks, num_classes=5)
    args = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}
    compare(torch, randomise(torch, convnext), "convnext_tiny", args, 64)
    resnet = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    compare(torch, randomise(torch, resnet), "resnet18", {"layers": (1, 1, 1, 1)}, 64)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("theirs", "timms"),
    [
        ("regnet_y_400mf", "regnety_004"),
        ("regnet_y_800mf", "regnety_008_tv"),  # the widths of timm's regnety_008 differ
        ("regnet_y_1_6gf", "regnety_016"),
        ("regnet_y_3_2gf", "regnety_032"),
    ],
)
def test_torchvisions_regnets(torch, theirs, timms):
    from tests.parity import reference

    assert reference.timm  # its import makes torchvision's possible
    models = importlib.import_module("torchvision.models")
    model = randomise(torch, getattr(models, theirs)(num_classes=5))
    for name, tensor in model.state_dict().items():
        if name.endswith("f.c.1.weight"):
            tensor.mul_(0.2)  # otherwise 27 blocks magnify rounding errors
    result = compare(torch, model, "", None, 64)
    assert result.metadata["model"] == timms
    assert state_network(theirs) == {"model": timms}
    assert result.metadata["mean"] == list(IMAGENET_MEAN)


@pytest.mark.parity
def test_torchvisions_mobile_networks(torch):
    from tests.parity import reference

    assert reference.timm  # its import makes torchvision's possible
    models = importlib.import_module("torchvision.models")
    for theirs, ours in (
        ("mobilenet_v3_small", "mobilenetv3_small_100"),
        ("mobilenet_v3_large", "mobilenetv3_large_100"),
        # With random weights, B1 amplifies PyTorch's own rounding to more than 1e-4.
        ("efficientnet_b0", "efficientnet_b0"),
    ):
        network = getattr(models, theirs)(num_classes=5)
        result = compare(torch, randomise(torch, network), ours, None, 64)
        assert result.metadata["mean"] == list(IMAGENET_MEAN)
    # Of all its blocks, random ones would magnify rounding errors too much.
    rows, last = models.efficientnet._efficientnet_conf("efficientnet_v2_s")
    for row in rows:
        row.num_layers = -(-row.num_layers // 4)
    norm = functools.partial(torch.nn.BatchNorm2d, eps=1e-3)
    network = models.EfficientNet(rows, 0, num_classes=5, norm_layer=norm, last_channel=last)
    args = {"depth": 0.25}
    result = compare(torch, randomise(torch, network), "tf_efficientnetv2_s", args, 64)
    assert result.metadata["args"] == {"padding": None, "bn_epsilon": 1e-3, "depth": 0.25}
