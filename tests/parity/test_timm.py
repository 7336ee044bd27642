"""The networks against timm's own, with the same random weights, tap by tap.

Run with `pytest -m parity`, where the extra `parity` is installed; without it these fail.
"""

import importlib
import sys

import jax
import numpy as np
import pytest

from xkd_jax.models import create_model
from xkd_jax.weights import check_weights

pytestmark = pytest.mark.parity

# timm's name and arguments, then our name and arguments.
VITS = {
    "token": ("vit_tiny_patch16_224", {}, "vit_tiny_patch16_224", {}),
    "avg": (
        "vit_small_patch16_224",
        {"patch_size": 4, "img_size": 28, "global_pool": "avg", "depth": 4},
        "vit_small_patch4_32",
        {"img_size": 28, "global_pool": "avg", "depth": 4},
    ),
    "avg_normed_tokens": (
        "vit_tiny_patch16_224",
        {"patch_size": 4, "img_size": 28, "global_pool": "avg", "fc_norm": False, "depth": 2},
        "vit_tiny_patch4_32",
        {"img_size": 28, "global_pool": "avg", "fc_norm": False, "depth": 2},
    ),
    "no_class_token": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "global_pool": "avg", "class_token": False, "depth": 2, "qkv_bias": False},
        "vit_tiny_patch16_224",
        {"img_size": 32, "global_pool": "avg", "class_token": False, "depth": 2, "qkv_bias": False},
    ),
}


@pytest.fixture(scope="module")
def torch():
    import torch

    torch.set_num_threads(2)
    return torch


@pytest.fixture(scope="module")
def timm(torch):
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        # PyPI's torchvision beside a CPU build of torch lacks the C++ operators, and timm needs
        # only the import: declaring their schemas is enough for it.
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        torch.xkd_library = library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("timm")


def randomize(torch, model):
    """Every weight and statistic random, at a scale that keeps activations near 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(t, mean, std):
        t.copy_(mean + std * torch.randn(t.shape, generator=generator))

    for name, t in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            t.copy_(0.5 + torch.rand(t.shape, generator=generator))
        elif t.ndim > 1 and name.endswith("weight"):
            normal(t, 0.0, t[0].numel() ** -0.5)
        else:
            normal(t, 1.0 if name.endswith("weight") else 0.0, 0.2)


def variables_of(model):
    """timm's state dict as our variables: numbered parts join the name before them."""
    tree = {}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        *path, leaf = name.split(".")
        if leaf == "num_batches_tracked":
            continue
        collection = "params"
        if leaf.startswith("running_"):
            collection, leaf = "batch_stats", leaf.removeprefix("running_")
        elif leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        node = tree.setdefault(collection, {})
        parts = []
        for part in path:
            if part.isdigit():
                parts[-1] += f"_{part}"
            else:
                parts.append(part)
        for part in parts:
            node = node.setdefault(part, {})
        node[leaf] = np.ascontiguousarray(array)
    return tree


def record(taps, key):
    """A hook that keeps a copy of a module's output: the next ReLU works in place."""

    def hook(module, args, output):
        taps[key] = output.clone()

    return hook


def record_input(taps, key):
    def hook(module, args):
        taps[key] = args[0].clone()

    return hook


def run_both(torch, theirs, ours, taps, size):
    """Both networks on the same images; their hooks have filled `taps` afterwards."""
    theirs.eval()
    randomize(torch, theirs)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = theirs.forward_features(images)
        taps["pooled"] = theirs.forward_head(features, pre_logits=True)
        taps["logits"] = theirs(images)
    variables = variables_of(theirs)
    x = images.numpy().transpose(0, 2, 3, 1)
    expected = jax.eval_shape(ours.init, jax.random.key(0), x)
    check_weights("timm's weights", variables, expected)
    _, out = jax.jit(ours.apply)(variables, x)
    return out


def assert_close(out, taps):
    for key, want in taps.items():
        want = want.numpy()
        got = np.asarray(out[key])
        assert got.shape == want.shape, key
        error = np.abs(got - want).max() / np.abs(want).max()
        print(f"{key}: {error:.1e}")
        assert error < 1e-4, f"{key}: {error:.1e}"


@pytest.mark.parametrize("case", VITS)
def test_vit(torch, timm, case):
    name, args, our_name, our_args = VITS[case]
    theirs = timm.create_model(name, num_classes=10, **args)
    ours = create_model(our_name, num_classes=10, **our_args)
    prefix, heads = theirs.num_prefix_tokens, theirs.blocks[0].attn.num_heads
    taps = {}
    theirs.norm.register_forward_hook(record(taps, "norm"))
    for i, block in enumerate(theirs.blocks, start=1):
        block.register_forward_hook(record(taps, f"block{i:02d}"))
        block.attn.qkv.register_forward_hook(record(taps, f"block{i:02d}_qkv"))
    out = run_both(torch, theirs, ours, taps, theirs.patch_embed.img_size[0])

    wanted = {"pooled": taps.pop("pooled"), "logits": taps.pop("logits")}
    for key, tap in taps.items():
        if key.endswith("_qkv"):
            n, t, _ = tap.shape
            split = tap.reshape(n, t, 3, heads, -1).permute(2, 0, 3, 1, 4)[:, :, :, prefix:]
            for short, part in zip(("query", "key", "value"), split, strict=True):
                wanted[short] = wanted[key.replace("qkv", short)] = part
        else:
            wanted["tokens" if key == "norm" else key] = tap[:, prefix:]
            if key == "norm" and prefix:
                wanted["cls"] = tap[:, 0]
    assert set(wanted) == set(out) - {"grid"}
    assert out["grid"] == theirs.patch_embed.grid_size
    assert_close(out, wanted)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 224), ("resnet50", 224), ("resnet50", 97)])
def test_resnet(torch, timm, name, size):
    theirs = timm.create_model(name, num_classes=10)
    ours = create_model(name, num_classes=10)
    taps = {}
    for stage in range(1, 5):
        layer = getattr(theirs, f"layer{stage}")
        layer.register_forward_hook(record(taps, f"stage{stage}"))
        last_relu = layer[-1].act3 if hasattr(layer[-1], "act3") else layer[-1].act2
        last_relu.register_forward_pre_hook(record_input(taps, f"stage{stage}_pre"))
    out = run_both(torch, theirs, ours, taps, size)
    wanted = {
        key: tap.permute(0, 2, 3, 1) if key.startswith("stage") else tap
        for key, tap in taps.items()
    }
    assert set(wanted) == set(out)
    assert_close(out, wanted)
