"""Detectors against torchvision's, part by part, with random weights."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.parity.test_real_weights import folder_of
from xkd_jax.convert.conversion import convert
from xkd_jax.convert.files import Checkpoint, to_state
from xkd_jax.convert.layouts_detection import COCO_CATEGORIES
from xkd_jax.model import create_model
from xkd_jax.models import create_model as create_module
from xkd_jax.models.detection import anchors, boxes
from xkd_jax.models.detection.detector import Detector
from xkd_jax.models.detection.losses import mask_targets
from xkd_jax.models.detection.roi_align import roi_align
from xkd_jax.models.detection.rpn import propose

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_compilation")]

from tests.models.detection.reference import random_boxes  # noqa: E402

SIDE = (128, 160)
SIZES = np.float32([[128, 160], [120, 131]])  # what is padded to multiples of 32 is SIDE
EVERY = 10**6  # more than there are: samplers take all, so that nothing is random
OURS = {
    "backbone": "resnet18",
    "backbone_args": {"layers": (1, 1, 1, 1)},
    "rpn_pre_nms_train": 300,
    "rpn_pre_nms_test": 200,
    "rpn_post_nms_train": 10,
    "rpn_post_nms_test": 100,
    "rpn_samples": EVERY,
    "box_samples": 14,  # the proposals and the objects
    "box_positive": 1.0,
    "max_detections": 50,
}
THEIRS = {
    "rpn_pre_nms_top_n_train": 300,
    "rpn_pre_nms_top_n_test": 200,
    "rpn_post_nms_top_n_train": 10,
    "rpn_post_nms_top_n_test": 100,
    "rpn_batch_size_per_image": EVERY,
    "box_batch_size_per_image": 14,
    "box_positive_fraction": 1.0,
    "box_detections_per_img": 50,
}


@pytest.fixture(scope="module")
def theirs():
    from tests.parity import detection_torch

    return detection_torch


def state_of(model):
    return {
        name: tensor.numpy().copy()
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.fixture(scope="module")
def photographs():
    paths = sorted(folder_of("foolbox").glob("data/imagenet_*.jpg"))[:2]
    images = np.zeros((2, *SIDE, 3), np.float32)
    for image, path, (height, width) in zip(images, paths, SIZES.astype(int), strict=True):
        photo = Image.open(path).convert("RGB").resize((width, height))
        pixels = np.asarray(photo, np.float32) / 255
        image[:height, :width] = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return images


@pytest.fixture(scope="module")
def both(theirs):
    """torchvision's network, ours, and its converted variables."""
    model = theirs.mask_rcnn(**THEIRS)
    args = {"backbone": "resnet18", "backbone_args": {"layers": (1, 1, 1, 1)}}
    checkpoint = Checkpoint("the reference", state_of(model), {})
    converted = convert(checkpoint, "maskrcnn_resnet50_fpn", args=args)
    assert converted.metadata["num_classes"] == theirs.OUTPUTS - 1
    assert not converted.changes
    ours = create_module("maskrcnn_resnet50_fpn", num_classes=theirs.OUTPUTS - 1, **OURS)
    back = to_state(converted.variables, "maskrcnn_resnet50_fpn")
    assert back.keys() == checkpoint.state.keys()
    assert all(np.array_equal(back[name], checkpoint.state[name]) for name in back)
    return model, ours, converted.variables


@pytest.fixture(scope="module")
def outputs(both, theirs, photographs):
    """Intermediate results of torchvision's network."""
    model, _, _ = both
    with torch.no_grad():
        images = theirs.image_list(photographs, SIZES)
        features = model.backbone(images.tensors)
        logits, deltas = model.rpn.head(list(features.values()))
        proposals, _ = model.rpn(images, features)
        found, _ = model.roi_heads(features, proposals, images.image_sizes)
    return {
        "features": features,
        "logits": logits,
        "deltas": deltas,
        "proposals": proposals,
        "found": found,
    }


def run(both, method, *args):
    _, ours, variables = both
    return jax.jit(lambda v, *args: ours.apply(v, *args, method=method))(variables, *args)


def ours_of(tensor):
    """A feature map in our layout."""
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def close(got, want, tolerance=1e-4):
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_box_coding(theirs):
    from torchvision.models.detection._utils import BoxCoder

    rng = np.random.default_rng(0)
    wanted, references = (random_boxes(rng, 30, 200) for _ in range(2))
    for weights in ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)):
        coder = BoxCoder(weights)
        deltas = coder.encode_single(torch.tensor(wanted), torch.tensor(references))
        close(boxes.encode(wanted, references, weights), deltas)
        large = 3 * rng.normal(size=(30, 4)).astype(np.float32)
        decoded = coder.decode_single(torch.tensor(large), torch.tensor(references))
        close(boxes.decode(large, references, weights), decoded)


def test_overlap_and_clipping(theirs):
    rng = np.random.default_rng(0)
    first, second = random_boxes(rng, 20, 200), random_boxes(rng, 30, 200)
    want = theirs.box_ops.box_iou(torch.tensor(first), torch.tensor(second))
    close(boxes.iou(first[:, None], second), want)
    moved = first - 40
    want = theirs.box_ops.clip_boxes_to_image(torch.tensor(moved), (90, 110))
    close(boxes.clip(moved, np.float32([90, 110])), want)


@pytest.mark.parametrize("side", [(128, 160), (800, 1088)])
def test_anchors(theirs, side):
    from torchvision.models.detection.faster_rcnn import _default_anchorgen

    grids = [(side[0] // s, side[1] // s) for s in (4, 8, 16, 32)]
    grids.append(tuple(-(-length // 2) for length in grids[-1]))
    features = [torch.zeros(1, 1, *grid) for grid in grids]
    images = theirs.image_list(np.zeros((1, *side, 3), np.float32), [side])
    (want,) = _default_anchorgen()(images, features)
    got = anchors.make_anchors(side, grids, (32, 64, 128, 256, 512), (0.5, 1.0, 2.0))
    np.testing.assert_array_equal(np.concatenate(got), want)


@pytest.mark.parametrize("bins", [7, 14])
def test_roi_align_and_its_gradient(theirs, bins):
    from torchvision.ops import MultiScaleRoIAlign

    rng = np.random.default_rng(0)
    side = (448, 512)
    pyramid = [
        rng.normal(size=(2, side[0] // s, side[1] // s, 4)).astype(np.float32)
        for s in (4, 8, 16, 32)
    ]
    box = np.stack([random_boxes(rng, 12, 448, 20) for _ in range(2)])
    box[0, 0] = [0, 0, 512, 448]
    box[0, 1] = [508.5, 10, 512, 200]  # samples lie outside
    theirs_pyramid = {
        str(i): torch.tensor(level.transpose(0, 3, 1, 2), requires_grad=True)
        for i, level in enumerate(pyramid)
    }
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], bins, 2)
    pooled = pool(theirs_pyramid, [torch.tensor(b) for b in box], [side, side])
    cotangent = rng.normal(size=(2, 12, bins, bins, 4)).astype(np.float32)
    flat = cotangent.reshape(-1, bins, bins, 4).transpose(0, 3, 1, 2)
    grads = torch.autograd.grad(pooled, list(theirs_pyramid.values()), torch.tensor(flat))

    def ours(pyramid):
        got = roi_align(pyramid, box, side, bins)
        return jnp.sum(got * cotangent), got

    got_grads, got = jax.jit(jax.grad(ours, has_aux=True))(pyramid)
    close(got.reshape(-1, bins, bins, 4), ours_of(pooled))
    for one, other in zip(got_grads, grads, strict=True):
        close(one, ours_of(other))
    # The operator of these tests is torchvision's, wherever no sample lies outside.
    level, rois = theirs_pyramid["0"], torch.tensor([[1, 30.0, 40.0, 90.0, 70.0]])
    module = importlib.import_module("torchvision.ops.roi_align")
    eager = module._roi_align.__wrapped__(level, rois, 0.25, bins, bins, 2, False)
    close(theirs.roi_align(level, rois, (bins, bins), 0.25, 2).detach(), eager.detach())


def test_feature_pyramid(both, outputs, photographs):
    pyramid, _ = run(both, Detector.features, photographs)
    for got, want in zip(pyramid, outputs["features"].values(), strict=True):
        close(got, ours_of(want))


def test_proposals(both, outputs):
    pyramid = [ours_of(level) for level in outputs["features"].values()]

    def both_steps(detector, pyramid):
        logits, deltas = detector.rpn(pyramid)
        grids = detector._anchors(pyramid, SIDE)
        found = propose(logits, deltas, grids, SIZES, before=200, after=100, threshold=0.7)
        return logits, deltas, *found

    logits, deltas, box, valid = run(both, both_steps, pyramid)
    for level, (want_logits, want_deltas) in enumerate(
        zip(outputs["logits"], outputs["deltas"], strict=True)
    ):
        close(logits[level], ours_of(want_logits).reshape(2, -1))
        close(deltas[level], ours_of(want_deltas).reshape(2, -1, 4))
    for image, want in enumerate(outputs["proposals"]):
        assert valid[image].sum() == len(want)
        close(box[image][valid[image]], want)


def test_box_and_mask_heads(both, theirs, outputs):
    model, _, _ = both
    pyramid = [ours_of(level) for level in outputs["features"].values()]
    proposals = [proposal[:20] for proposal in outputs["proposals"]]
    classes = np.arange(40).reshape(2, 20) % theirs.OUTPUTS
    sizes = [SIDE, SIDE]
    with torch.no_grad():
        heads, features = model.roi_heads, outputs["features"]
        pooled = heads.box_head(heads.box_roi_pool(features, proposals, sizes))
        logits, deltas = heads.box_predictor(pooled)
        masks = heads.mask_predictor(
            heads.mask_head(heads.mask_roi_pool(features, proposals, sizes))
        )
    want = masks.numpy()[np.arange(40), classes.reshape(-1)]

    def both_heads(detector, pyramid, box):
        segment = detector.roi_heads.segment(pyramid, box, classes, SIDE)
        return *detector.roi_heads.classify(pyramid, box, SIDE), segment

    got = run(both, both_heads, pyramid, np.stack(proposals))
    close(got[0].reshape(40, -1), logits)
    close(got[1].reshape(40, -1), deltas)
    close(got[2].reshape(40, 28, 28), want)


def test_detections_on_photographs(both, outputs, photographs):
    _, ours, variables = both
    found, _ = jax.jit(ours.apply)(variables, photographs, sizes=SIZES)
    for image, want in enumerate(outputs["found"]):
        count = len(want["scores"])
        assert count == (found.classes[image] > 0).sum() > 10
        close(found.scores[image, :count], want["scores"])
        np.testing.assert_array_equal(found.classes[image, :count], want["labels"])
        close(found.boxes[image, :count], want["boxes"])
        close(found.masks[image, :count], want["masks"][:, 0])


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
        # Not each number: a ReLU whose input rounding takes across 0 changes a few of them.
        difference = np.linalg.norm(got[name] - grad.numpy())
        assert difference < 1e-3 * np.linalg.norm(grad.numpy()), name


def test_mask_targets(theirs):
    targets = objects()
    (want_targets, _) = their_targets(targets)
    moved = targets["boxes"][0, :3] + np.float32([-5, 3, 6, -8])
    index = torch.arange(3)
    project = theirs.roi_heads.project_masks_on_boxes
    want = project(want_targets["masks"], torch.tensor(moved), index, 28)
    got = mask_targets(targets["masks"][0, :3], targets["boxes"][0, :3], moved, 28)
    close(got, want)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_own_networks_are_recognised_and_converted(theirs, name, monkeypatch):
    from torchvision.models._meta import _COCO_CATEGORIES

    from xkd_jax.convert import networks

    few = {key: networks.MODELS[key] for key in ("resnet34", "resnet50", "resnet101")}
    monkeypatch.setattr(networks, "MODELS", few)
    checkpoint = Checkpoint("theirs", state_of(theirs.full(name)), {})
    converted = convert(checkpoint)
    assert converted.changes == [f"recognised {name}"]
    assert converted.metadata["num_classes"] == 90
    assert converted.metadata["args"] == {}
    assert _COCO_CATEGORIES[1:] == COCO_CATEGORIES
    model = create_model(name, num_classes=90)
    want = jax.tree.map(lambda leaf: leaf.shape, model.shapes)
    assert jax.tree.map(np.shape, converted.variables) == want
