"""Scores of a classifier, against loops and cases by hand."""

import numpy as np
import pytest

from xkd_jax.analysis.classification import calibration_error, score


def test_scores_equal_a_loop_over_the_images():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 7)).astype(np.float32), rng.integers(0, 6, 200)
    found = score(logits, labels)
    confusion, top5 = np.zeros((7, 7), int), 0
    for row, label in zip(logits, labels, strict=True):
        order = sorted(range(7), key=lambda c: -row[c])
        confusion[label, order[0]] += 1
        top5 += label in order[:5]
    np.testing.assert_array_equal(found.confusion, confusion)
    assert found.top1 == pytest.approx(np.trace(confusion) / 200)
    assert found.top5 == pytest.approx(top5 / 200)
    for label in range(6):
        of_class = logits[labels == label].argmax(1) == label
        assert found.per_class[label] == pytest.approx(of_class.mean())
    assert np.isnan(found.per_class[6])  # which has no images


def test_calibration_error_by_hand():
    # Two bins: confidences 0.4 and 0.5, one correct: |0.5 - 0.45|; 0.9 and 1.0, both correct:
    # |1 - 0.95|. Each holds half of the images.
    confidence = np.array([0.4, 0.5, 0.9, 1.0])
    correct = np.array([True, False, True, True])
    assert calibration_error(confidence, correct, bins=2) == pytest.approx(0.05)
    assert calibration_error(np.ones(3), np.ones(3, bool)) == 0


def test_confidence_is_the_softmax_of_the_best_class():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]]))
    found = score(logits, np.array([0, 1]))
    assert found.calibration_error == pytest.approx((0.3 + 0.4) / 2)


def test_extreme_logits_are_finite():
    found = score(np.array([[1e4, -1e4], [-1e4, 1e4]]), np.array([0, 0]))
    assert (found.top1, found.top5, found.calibration_error) == (0.5, 1.0, 0.5)
