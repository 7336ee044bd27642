import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.detection import reference
from xkd_jax.errors import UserError
from xkd_jax.models.detection import anchors, boxes, targets
from xkd_jax.models.detection.losses import delta_targets, mask_targets
from xkd_jax.models.detection.nms import nms
from xkd_jax.models.detection.roi_align import map_levels, roi_align

pytestmark = pytest.mark.usefixtures("quick_compilation")

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def test_decode_inverts_encode():
    rng = np.random.default_rng(0)
    wanted, references = (reference.random_boxes(rng, 50, 200) for _ in range(2))
    deltas = boxes.encode(wanted, references, WEIGHTS)
    np.testing.assert_allclose(boxes.decode(deltas, references, WEIGHTS), wanted, atol=1e-3)


def test_encode_by_hand():
    # Twice as wide, half as high, and shifted by half the width.
    deltas = boxes.encode(
        jnp.asarray([5.0, 5.0, 25.0, 10.0]), jnp.asarray([0.0, 0.0, 10.0, 10.0]), (1, 1, 1, 1)
    )
    np.testing.assert_allclose(deltas, [1.0, 0.25, np.log(2), np.log(0.5)], rtol=1e-6)


def test_decode_limits_growth():
    deltas = jnp.asarray([0.0, 0.0, 100.0, 100.0])
    decoded = boxes.decode(deltas, jnp.asarray([0.0, 0.0, 16.0, 16.0]), (1, 1, 1, 1))
    np.testing.assert_allclose(decoded, [-492, -492, 508, 508], rtol=1e-4)


def test_clip_area_and_size():
    clipped = boxes.clip(jnp.asarray([[-3.0, 4.0, 9.0, 30.0]]), jnp.asarray([20.0, 8.0]))
    np.testing.assert_array_equal(clipped, [[0, 4, 8, 20]])
    np.testing.assert_array_equal(boxes.area(clipped), [128])
    assert boxes.is_large(clipped, 8.0).tolist() == [True]
    assert boxes.is_large(clipped, 8.1).tolist() == [False]


def test_iou():
    rng = np.random.default_rng(0)
    first, second = (reference.random_boxes(rng, 20, 50) for _ in range(2))
    want = np.stack([reference.iou(box, second) for box in first])
    np.testing.assert_allclose(boxes.iou(first[:, None], second), want, rtol=1e-5, atol=1e-7)
    empty = jnp.zeros(4)
    assert boxes.iou(empty, empty) == 0


def test_anchors_of_one_cell():
    (level,) = anchors.make_anchors((32, 32), [(1, 1)], (32,), (0.5, 1.0, 2.0))
    # Heights are 32 times the root of the ratio; rounded.
    want = [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]
    np.testing.assert_array_equal(level, want)


def test_anchors_lie_on_a_grid():
    first, last = anchors.make_anchors((64, 96), [(4, 6), (2, 3)], (8, 16), (1.0,))
    assert first.shape == (24, 4)
    np.testing.assert_array_equal(first[7], [16 - 4, 16 - 4, 16 + 4, 16 + 4])
    np.testing.assert_array_equal(last[-1], [64 - 8, 32 - 8, 64 + 8, 32 + 8])
    with pytest.raises(UserError, match="anchor_sizes must have 1 entries"):
        anchors.make_anchors((64, 96), [(4, 6)], (8, 16), (1.0,))


def test_anchors_in_added_padding():
    (level,) = anchors.make_anchors((96, 96), [(6, 6)], (8,), (1.0,))
    inside = anchors.inside(level, jnp.asarray([[20.0, 33.0], [96.0, 96.0]]))
    want = np.zeros((6, 6), bool)
    want[:2, :4] = True  # 32 and 64 pixels of 16 each
    np.testing.assert_array_equal(inside[0].reshape(6, 6), want)
    assert inside[1].all()


@pytest.mark.parametrize("groups", [1, 3])
def test_nms_is_greedy(groups):
    rng = np.random.default_rng(groups)
    box = reference.random_boxes(rng, 80, 60, 20)
    scores = np.round(rng.uniform(size=80), 1).astype(np.float32)  # with ties
    group = rng.integers(groups, size=80).astype(np.int32)
    want = reference.nms(box, scores, group, 0.4)
    index, valid = nms(box, scores, group, threshold=0.4, count=80)
    assert index[valid].tolist() == want
    few, _ = nms(box, scores, group, threshold=0.4, count=5)
    assert few.tolist() == want[:5]


def test_nms_skips_padding():
    box = np.tile(np.float32([0, 0, 10, 10]), (4, 1))
    box[3] = 0  # empty
    scores = np.float32([-np.inf, 0.5, 0.9, 0.1])
    index, valid = nms(box, scores, np.zeros(4, np.int32), threshold=0.5, count=4)
    assert valid.tolist() == [True, True, False, False]
    assert index[:2].tolist() == [2, 3]


def test_levels_by_size():
    sides = np.float32([1, 111, 113, 223, 224, 447, 449, 2000])
    box = np.stack([0 * sides, 0 * sides, sides, sides], -1)
    assert map_levels(box, (4, 8, 16, 32)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert map_levels(np.zeros((1, 4), np.float32), (1, 2, 4, 8)).tolist() == [0]


@pytest.fixture(scope="module")
def regions():
    rng = np.random.default_rng(3)
    pyramid = [rng.normal(size=(2, 64 // s, 96 // s, 3)).astype(np.float32) for s in (4, 8, 16, 32)]
    box = np.stack([reference.random_boxes(rng, 6, 64) for _ in range(2)])
    box[0, 0] = [90, 60, 96, 64]  # less than a cell, at the edge: samples lie outside
    box[1, 0] = [0, 0, 96, 64]
    return pyramid, box, rng.normal(size=(2, 6, 2, 2, 3)).astype(np.float32)


def pooled(pyramid, box, bins):
    strides = [4, 8, 16, 32]
    levels = np.asarray(map_levels(box, strides))
    return np.stack(
        [
            [
                reference.roi_align(pyramid[level][n], box[n, i], 1 / strides[level], bins)
                for i, level in enumerate(levels[n])
            ]
            for n in range(len(box))
        ]
    )


def test_roi_align_reads_bilinearly(regions):
    pyramid, box, _ = regions
    got = roi_align(pyramid, box, (64, 96), 2)
    np.testing.assert_allclose(got, pooled(pyramid, box, 2), atol=1e-5)


def test_roi_align_of_other_levels():
    rng = np.random.default_rng(4)
    pyramid = [
        rng.normal(size=(1, 512 // s, 512 // s, 2)).astype(np.float32) for s in (4, 8, 16, 32)
    ]
    box = np.float32([[[0, 0, 500, 480], [10, 20, 250, 270], [100, 50, 230, 200], [1, 2, 40, 50]]])
    assert map_levels(box, (4, 8, 16, 32)).tolist() == [[3, 2, 1, 0]]
    got = roi_align(pyramid, box, (512, 512), 3)
    np.testing.assert_allclose(got, pooled(pyramid, box, 3), atol=1e-5)


def test_roi_align_is_linear_in_the_features(regions):
    pyramid, box, cotangent = regions

    def loss(pyramid, box):
        return jnp.sum(cotangent * roi_align(pyramid, box, (64, 96), 2))

    of_features, of_boxes = jax.grad(loss, (0, 1))(pyramid, box)
    product = sum(np.vdot(a, b) for a, b in zip(of_features, pyramid, strict=True))
    np.testing.assert_allclose(product, loss(pyramid, box), rtol=1e-4)
    assert not of_boxes.any()


def match(box, objects, real=None, **kwargs):
    real = np.ones(len(objects), bool) if real is None else real
    usable = np.ones(len(box), bool)
    options = {"high": 0.7, "low": 0.3, "keep_best": False, **kwargs}
    return targets.match(jnp.asarray(box), usable, jnp.asarray(objects), real, **options)


def test_match_by_overlap():
    objects = np.float32([[0, 0, 10, 10], [20, 0, 30, 10]])
    box = np.float32([[0, 0, 10, 9], [20, 0, 30, 5], [20, 0, 30, 2], [50, 50, 60, 60]])
    index, label = match(box, objects)
    assert label.tolist() == [targets.POSITIVE, targets.IGNORED, targets.NEGATIVE, targets.NEGATIVE]
    assert index[:3].tolist() == [0, 1, 1]
    # The best box of each object is positive, however small the overlap.
    _, label = match(box, objects, keep_best=True)
    assert label.tolist() == [1, 1, 0, 0]


def test_match_ignores_padding():
    objects = np.float32([[0, 0, 10, 10], [0, 0, 0, 0]])
    box = np.float32([[0, 0, 10, 10], [0, 0, 0, 0]])
    _, label = match(box, objects, np.array([False, False]), keep_best=True)
    assert label.tolist() == [0, 0]
    usable = np.array([False, True])
    options = {"high": 0.7, "low": 0.3, "keep_best": True}
    _, label = targets.match(jnp.asarray(box), usable, objects, np.array([True, False]), **options)
    assert label.tolist() == [targets.IGNORED, targets.NEGATIVE]


@pytest.mark.parametrize(
    ("positives", "negatives", "want"),
    [(30, 60, (4, 12)), (2, 60, (2, 14)), (0, 60, (0, 16)), (30, 3, (4, 3)), (0, 0, (0, 0))],
)
def test_sample_counts(positives, negatives, want):
    labels = np.full(90, targets.IGNORED)
    labels[:positives] = 2
    labels[30 : 30 + negatives] = 0
    labels = np.random.default_rng(0).permutation(labels)
    index, valid = targets.sample(jax.random.key(0), jnp.asarray(labels), 16, 0.25)
    assert index.shape == valid.shape == (16,)
    chosen = labels[index[valid]]
    assert ((chosen > 0).sum(), (chosen == 0).sum()) == want
    assert len(set(index[valid].tolist())) == sum(want)
    assert (chosen[: want[0]] > 0).all()


def test_samples_are_random():
    labels = jnp.arange(400) % 2
    first, second = (targets.sample(jax.random.key(i), labels, 16, 0.5)[0] for i in range(2))
    assert set(first.tolist()) != set(second.tolist())
    every, valid = targets.sample(jax.random.key(0), labels, 1000, 0.5)
    assert sorted(every.tolist()) == list(range(400))
    assert valid.all()


def test_delta_targets_of_padding_are_finite():
    deltas = delta_targets(jnp.zeros((2, 4)), jnp.zeros((2, 4)), jnp.zeros(2, bool), WEIGHTS)
    assert not deltas.any()


def test_mask_targets_by_hand():
    # The object's left half; the region is the object's upper right quarter and as much beyond.
    masks = np.zeros((1, 8, 8), np.uint8)
    masks[..., :4] = 255
    objects, box = np.float32([[10, 10, 90, 90]]), np.float32([[30, 10, 130, 50]])
    got = mask_targets(masks, objects, box, 10)
    want = np.zeros((1, 10, 10))
    want[..., :2] = 1
    want[..., 1:3] = 0.85, 0.1  # samples between the centres of the mask's pixels
    want[:, 0] *= 0.75
    np.testing.assert_allclose(got, want, atol=1e-6)
