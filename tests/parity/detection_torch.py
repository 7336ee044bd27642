"""torchvision's detectors, small and with random weights, also without its C++ operators."""

import math
import re

import numpy as np
import torch

from tests.models.detection import reference as plain
from tests.parity.reference import import_timm

import_timm()

import torchvision  # noqa: E402
from torchvision.models.detection import MaskRCNN, roi_heads  # noqa: E402
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor  # noqa: E402
from torchvision.models.detection.image_list import ImageList  # noqa: E402
from torchvision.models.resnet import BasicBlock, ResNet  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d, poolers  # noqa: E402
from torchvision.ops import boxes as box_ops  # noqa: E402

OUTPUTS = 4  # three classes and the background


def nms(boxes, scores, threshold):
    """torchvision's operator of this name."""
    boxes, scores = boxes.numpy(), scores.numpy()
    kept = plain.nms(boxes, scores, np.zeros(len(boxes), int), threshold)
    return torch.tensor(kept, dtype=torch.int64)


def roi_align(features, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
    """torchvision's operator of this name, with the rules of its C++ code at the edges.

    Where the number of samples is left to it, it takes two in each direction.
    """
    assert not aligned
    bins, samples = output_size[0], 2 if sampling_ratio < 0 else sampling_ratio
    height, width = features.shape[-2:]
    pooled = []
    for image, *box in boxes.tolist():
        x1, y1, x2, y2 = (torch.tensor(side) * spatial_scale for side in box)
        rows = _interpolation(y1, y2, bins, samples, height)
        columns = _interpolation(x1, x2, bins, samples, width)
        pooled.append(rows @ features[int(image)] @ columns.T)
    return torch.stack(pooled) if pooled else features.new_zeros(0, features.shape[1], bins, bins)


def _interpolation(low, high, bins, samples, length):
    """The weights [bins, length] of the features along an axis."""
    step = torch.clamp(high - low, min=1) / (bins * samples)
    at = low + (torch.arange(bins * samples) + 0.5) * step
    used = (at >= -1) & (at <= length)
    at = torch.clamp(at, 0, length - 1)
    weights = torch.clamp(1 - torch.abs(at[:, None] - torch.arange(length)), min=0)
    return (weights * used[:, None]).reshape(bins, samples, length).mean(1)


def install():
    """Lets torchvision use the operators above."""
    box_ops.nms = nms
    poolers.roi_align = roi_heads.roi_align = roi_align


install()


def fill(model, seed=0):
    """Random weights and statistics that keep features and scores diverse."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.2 * noise.abs())
            elif tensor.ndim > 1:
                # Without these, the scores of random classes are 0 or 1, and boxes endless.
                gain = 0.1 if re.search("bbox_pred|cls_score", name) else 1.4
                tensor.copy_(noise * gain / math.sqrt(math.prod(tensor.shape[1:])))
            elif name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            else:
                tensor.copy_(0.1 * noise)
    return model


def mask_rcnn(**args):
    """A Mask R-CNN over a shallow ResNet with basic blocks."""
    body = ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d)
    backbone = _resnet_fpn_extractor(body, 5)
    return fill(MaskRCNN(backbone, OUTPUTS, **args)).eval()


def image_list(images, sizes):
    """torchvision's batch of normalised images [N, H, W, 3] and their sizes without padding."""
    batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return ImageList(batch, [tuple(int(side) for side in size) for size in sizes])


def full(name):
    """torchvision's own network of this name, with its own random weights."""
    return getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None)
