"""Detectors' losses and gradients against torchvision's, with samplers that take everything."""

import jax
import numpy as np
import pytest

from tests.parity.test_detection import (  # noqa: F401
    SIDE,
    SIZES,
    both,
    close,
    photographs,
    theirs,
)
from xkd_jax.convert.files import to_state
from xkd_jax.models.detection.detector import Detector
from xkd_jax.models.detection.losses import mask_targets

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity


def objects():
    """Objects away from the edges, with masks of as many pixels as their boxes have."""
    box, side = np.zeros((2, 4, 4), np.float32), 40
    box[0, :3, :2] = [[10, 20], [60, 50], [101, 71]]
    box[1, :2, :2] = [[30, 40], [71, 9]]
    box[..., 2:] = box[..., :2] + side
    classes = np.int32([[1, 3, 2, 0], [2, 2, 0, 0]])
    box *= (classes > 0)[..., None]
    masks = np.random.default_rng(0).integers(0, 2, (2, 4, side, side)).astype(np.uint8) * 255
    return {"boxes": box, "classes": classes, "masks": masks}


def their_targets(targets):
    for box, classes, masks in zip(*targets.values(), strict=True):
        full = np.zeros((len(box), *SIDE), np.uint8)
        for mask, (x1, y1, x2, y2), whole in zip(masks, box.astype(int), full, strict=True):
            whole[y1:y2, x1:x2] = mask[: y2 - y1, : x2 - x1] // 255
        real = classes > 0
        yield {
            "boxes": torch.tensor(box[real]),
            "labels": torch.tensor(classes[real], dtype=torch.int64),
            "masks": torch.tensor(full[real]),
        }


def test_losses_and_gradients(both, theirs, photographs):
    model, ours, variables = both
    targets = objects()
    model.train()
    images = theirs.image_list(photographs, SIZES)
    features = model.backbone(images.tensors)
    want_targets = list(their_targets(targets))
    proposals, losses = model.rpn(images, features, want_targets)
    _, more = model.roi_heads(features, proposals, images.image_sizes, want_targets)
    losses |= more
    model.eval()

    def loss(params):
        found, _ = ours.apply(
            {**variables, "params": params},
            photographs,
            SIZES,
            targets,
            jax.random.key(0),
            method=Detector.losses,
        )
        return sum(found.values()), found

    (_, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    names = {
        "rpn_objectness": "loss_objectness",
        "rpn_box": "loss_rpn_box_reg",
        "roi_class": "loss_classifier",
        "roi_box": "loss_box_reg",
        "roi_mask": "loss_mask",
    }
    assert found.keys() == names.keys()
    for name, their_name in names.items():
        np.testing.assert_allclose(found[name], losses[their_name].item(), rtol=1e-4)
    parameters = dict(model.named_parameters())
    want = torch.autograd.grad(sum(losses.values()), list(parameters.values()))
    got = to_state({"params": grads}, "maskrcnn_resnet50_fpn")
    for name, grad in zip(parameters, want, strict=True):
        close(got[name], grad.numpy(), 1e-3)


def test_mask_targets(theirs):
    targets = objects()
    (want_targets, _) = their_targets(targets)
    moved = targets["boxes"][0, :3] + np.float32([-5, 3, 6, -8])
    index = torch.arange(3)
    project = theirs.roi_heads.project_masks_on_boxes
    want = project(want_targets["masks"], torch.tensor(moved), index, 28)
    got = mask_targets(targets["masks"][0, :3], targets["boxes"][0, :3], moved, 28)
    close(got, want)
