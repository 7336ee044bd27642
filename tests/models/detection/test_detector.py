import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.networks import init
from xkd_jax.errors import UserError
from xkd_jax.model import create_model
from xkd_jax.models import create_model as create_module
from xkd_jax.models.detection import DETECTORS
from xkd_jax.models.detection.detections import select
from xkd_jax.models.detection.detector import Detector

pytestmark = pytest.mark.usefixtures("quick_compilation")

BACKBONE = {"backbone": "resnet18", "backbone_args": {"width": 0.125, "layers": (1, 1, 1, 1)}}
FEW = {
    "rpn_pre_nms_train": 40,
    "rpn_pre_nms_test": 40,
    "rpn_post_nms_train": 30,
    "rpn_post_nms_test": 30,
    "rpn_samples": 32,
    "box_samples": 24,
    "max_detections": 8,
}


def tiny(name="maskrcnn_resnet50_fpn", classes=3, **args):
    return create_module(name, num_classes=classes, **{**BACKBONE, **FEW, **args})


def some_images(n=2, size=64):
    return jnp.asarray(np.random.default_rng(1).normal(size=(n, size, size, 3)), jnp.float32)


SIZES = np.float32([[64, 64], [40, 60]])


def objects(padding=2):
    count = 2 + padding
    boxes, classes = np.zeros((2, count, 4), np.float32), np.zeros((2, count), np.int32)
    boxes[0, :2] = [[4, 6, 40, 50], [30, 20, 60, 44]]
    boxes[1, :1] = [[2, 2, 30, 38]]
    classes[0, :2], classes[1, :1] = [1, 3], [2]
    masks = np.zeros((2, count, 16, 16), np.uint8)
    masks[:, :, 4:, :] = 255
    return {"boxes": boxes, "classes": classes, "masks": masks}


@pytest.fixture(scope="module")
def detector():
    module = tiny()
    return module, init(module, 64)


def losses_of(module):
    """The compiled losses of random images with objects, and the new statistics."""

    def run(variables, targets):
        return module.apply(
            variables,
            some_images(),
            SIZES,
            targets,
            jax.random.key(0),
            method=Detector.losses,
            mutable=["batch_stats"],
        )

    return jax.jit(run)


@pytest.fixture(scope="module")
def losses(detector):
    module, variables = detector
    compiled = losses_of(module)
    return lambda targets: compiled(variables, targets)


def test_detections_have_static_shapes(detector):
    module, variables = detector
    found, out = jax.jit(module.apply)(variables, some_images(), sizes=SIZES)
    assert found.boxes.shape == (2, 8, 4)
    assert found.masks.shape == (2, 8, 28, 28)
    assert found.classes.dtype == jnp.int32
    assert {"stage1", "stage4_pre"} <= out.keys()
    assert "logits" not in out
    present = np.asarray(found.classes) > 0
    assert present.any()
    assert (np.asarray(found.scores)[present] > 0.05).all()
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert not np.asarray(found.boxes)[~present].any()
    # Boxes stay inside the images without their padding.
    assert (found.boxes[1, :, 2] <= 60).all()
    assert (found.boxes[1, :, 3] <= 40).all()


@pytest.mark.slow
def test_losses_and_outputs(losses):
    (found, outs), _ = losses(objects())
    assert found.keys() == {"rpn_objectness", "rpn_box", "roi_class", "roi_box", "roi_mask"}
    assert all(np.isfinite(loss) and loss > 0 for loss in found.values())
    assert outs["proposals"].shape == (2, 24, 4)
    assert outs["logits"].shape == (2, 24, 4)
    assert outs["valid"].dtype == bool
    assert "stage4" in outs["taps"]


@pytest.mark.slow
def test_classify_gives_the_same_logits(detector, losses):
    module, variables = detector
    (_, outs), _ = losses(objects())
    classify = jax.jit(lambda *args: module.apply(*args, method=Detector.classify))
    logits, deltas = classify(variables, some_images(), outs["proposals"])
    np.testing.assert_allclose(logits, outs["logits"], atol=1e-5)
    assert deltas.shape == (2, 24, 4, 4)


def test_padding_of_objects_has_no_effect(losses):
    targets = objects()
    (want, _), _ = losses(targets)
    padding = targets["classes"] == 0
    targets["boxes"][padding] = [10, 10, 42, 42]
    targets["masks"][padding] = 255
    (found, _), _ = losses(targets)
    assert found == want


def test_images_without_objects(losses):
    (found, _), _ = losses(jax.tree.map(np.zeros_like, objects()))
    assert found["roi_class"] > 0
    assert found["rpn_box"] == found["roi_box"] == found["roi_mask"] == 0


def test_frozen_norm_keeps_statistics(detector, losses):
    _, variables = detector
    _, updated = losses(objects())
    jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], updated["batch_stats"])


@pytest.mark.slow
def test_trained_norm_updates_statistics(detector):
    _, variables = detector
    _, updated = losses_of(tiny(frozen_norm=False))(variables, objects())
    before, after = variables["batch_stats"], updated["batch_stats"]
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))


def gradients(module, variables, names):
    def loss(params):
        found, _ = module.apply(
            {**variables, "params": params},
            some_images(),
            SIZES,
            objects(),
            jax.random.key(0),
            method=Detector.losses,
        )
        return sum(found[name] for name in names)

    return jax.jit(jax.grad(loss))(variables["params"])


@pytest.mark.slow
def test_gradients_reach_all_but_frozen_norms(detector):
    _, variables = detector
    names = ("rpn_objectness", "rpn_box", "roi_class", "roi_box", "roi_mask")
    grads = gradients(tiny(rpn_samples=2000), variables, names)  # anchors of every level
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        frozen = "body" in name and ("bn" in name or "downsample_1" in name)
        assert jnp.isfinite(leaf).all(), name
        assert leaf.any() != frozen, name


@pytest.mark.slow
def test_no_gradient_through_proposals(detector):
    """The heads' losses are functions of the features alone, for given regions."""
    grads = gradients(*detector, ("roi_class", "roi_box"))
    assert grads["roi_heads"]["box_head"]["fc6"]["kernel"].any()
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["rpn"]))


@pytest.mark.slow
def test_invalid_proposals_have_no_effect():
    rng = np.random.default_rng(0)
    proposals = np.float32([[[0, 0, 20, 20], [30, 30, 60, 50], [10, 10, 50, 60], [0, 0, 0, 0]]])
    logits = rng.normal(size=(1, 4, 3)).astype(np.float32)
    deltas = rng.normal(size=(1, 4, 3, 4)).astype(np.float32)
    options = {"min_score": 0.05, "threshold": 0.5, "count": 9}
    valid = np.array([[True, True, False, False]])
    padded = select(logits, deltas, proposals, valid, np.float32([[64, 64]]), **options)
    short = select(
        logits[:, :2], deltas[:, :2], proposals[:, :2], valid[:, :2], np.float32([[64, 64]]),
        **options,
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, padded, short)
    assert padded.classes[0, 0] > 0
    assert padded.classes[0, -1] == 0  # there are four candidates at most


@pytest.mark.parametrize("name", DETECTORS)
def test_every_name_builds(name):
    model = create_model(name, num_classes=5)
    hash(model.module)
    assert model.is_detector
    assert model.num_classes == 5
    assert model.image_size == 1344


def test_backbones_of_other_families():
    args = {"backbone": "mobilenetv2_050", "backbone_args": {}}
    model = create_model("fasterrcnn_resnet50_fpn", num_classes=5, image_size=64, **args, **FEW)
    assert model.output_shapes["stage4"].shape[:3] == (1, 2, 2)
    assert "fpn" in model.shapes["params"]["backbone"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"backbone": "resnet5"}, "unknown backbone 'resnet5'"),
        ({"backbone": "vit_tiny_patch16_224", "backbone_args": {}}, "needs a CNN"),
        ({"backbone_args": {"widht": 2}}, "unknown resnet18 argument 'widht'; did you mean width"),
        ({"masks": True}, "unknown fasterrcnn_resnet50_fpn argument 'masks'; did you mean mask"),
        ({"classes": 0}, "needs at least one class"),
    ],
)
def test_wrong_arguments(args, message):
    with pytest.raises(UserError, match=message):
        tiny("fasterrcnn_resnet50_fpn", **args)


def test_wrong_images(detector):
    module, variables = detector
    with pytest.raises(UserError, match="multiples of 32 pixels, not 64 x 60"):
        jax.eval_shape(module.apply, variables, jnp.zeros((1, 64, 60, 3)))
