"""Resizing of images and pasting of masks for detectors against torchvision's own."""

import io

import numpy as np
import pytest
from PIL import Image

from xkd_jax.data.decode import decode_resize
from xkd_jax.data.frame import Frame
from xkd_jax.data.masks import paste_mask

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def detection():
    from tests.parity.reference import torch  # first: it makes torchvision importable

    assert torch
    from torchvision.models import detection

    return detection


def test_masks_are_pasted_as_by_torchvision(detection):
    import torch

    rng = np.random.default_rng(0)
    corners = rng.uniform(-5, 90, (40, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.2, 60, (40, 2))], axis=1)
    boxes = boxes.astype(np.float32)
    masks = rng.random((40, 28, 28), np.float32)
    paste = detection.roi_heads.paste_masks_in_image
    expected = paste(torch.tensor(masks[:, None]), torch.tensor(boxes), (100, 120))[:, 0].numpy()
    found = [paste_mask(mask, box, 100, 120) for mask, box in zip(masks, boxes, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("size", [(480, 640), (427, 1280), (333, 500), (640, 421)])
def test_images_are_enlarged_as_by_torchvision(detection, size):
    """The same size, pixels and boxes; images are only rounded to 8 bits in addition."""
    import torch

    pixels = np.random.default_rng(1).integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(pixels).resize(size[::-1]))  # without hard edges
    transform = detection.transform.GeneralizedRCNNTransform(800, 1333, [0.0] * 3, [1.0] * 3)
    image = torch.tensor(pixels / 255).permute(2, 0, 1).float()
    boxes = torch.tensor([[10.0, 20, 200, 300]])
    images, targets = transform([image], [{"boxes": boxes, "labels": torch.ones(1)}])
    fitted = Frame().fit(*size)
    assert images.image_sizes == [fitted]
    scale = np.tile([fitted[1] / size[1], fitted[0] / size[0]], 2)
    np.testing.assert_allclose(targets[0]["boxes"], boxes.numpy() * scale, rtol=1e-5)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    found = decode_resize(file.getvalue(), size, fitted)
    expected = images.tensors[0, :, : fitted[0], : fitted[1]].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found / 255, expected, atol=1.5 / 255)
