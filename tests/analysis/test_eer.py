"""The Equal Error Rate, compared with hand-made cases and with counting at every threshold."""

import numpy as np
import pytest

from xkd_jax.analysis.eer import equal_error_rate
from xkd_jax.errors import UserError


def test_perfect_reversed_and_constant_scores():
    labels = np.array([0, 0, 0, 1, 1])
    assert equal_error_rate(np.array([1, 2, 3, 4, 5]), labels) == 0
    assert equal_error_rate(np.array([5, 4, 3, 2, 1]), labels) == 1
    assert equal_error_rate(np.zeros(5), labels) == 0.5


@pytest.mark.parametrize(
    ("negatives", "positives", "rate"),
    [
        ([0.1, 0.2, 0.3, 0.8], [0.4, 0.6, 0.7, 0.9], 0.25),  # 1 of 4 wrong on both sides
        ([1, 3], [2, 4], 0.5),  # the classes alternate
        ([1, 4], [2, 3, 5], 0.5),  # on the step where half of the negatives err
        ([1, 2, 3], [2.5, 5], 1 / 3),  # on the step where a third of the negatives err
        ([0, 1], [1, 2], 0.25),  # tied scores: half of a diagonal step
        ([0, 1, 1], [1, 2], 2 / 7),  # (2/3) t = (1/2) (1 - t)
    ],
)
def test_by_hand(negatives, positives, rate):
    scores = np.array([*negatives, *positives])
    labels = np.array([0] * len(negatives) + [1] * len(positives))
    np.testing.assert_allclose(equal_error_rate(scores, labels), rate, rtol=1e-12)


def by_counting(scores, labels):
    """Bisects the curve through the error rates counted at each threshold."""
    thresholds = [np.inf, *sorted(set(scores), reverse=True)]
    curve = [
        (np.mean(scores[labels == 0] >= t), np.mean(scores[labels == 1] < t)) for t in thresholds
    ]

    def at(place):
        i = min(int(place), len(curve) - 2)
        return np.array(curve[i]) + (place - i) * (np.array(curve[i + 1]) - np.array(curve[i]))

    low, high = 0.0, len(curve) - 1.0
    for _ in range(60):
        middle = (low + high) / 2
        false_positive, false_negative = at(middle)
        low, high = (middle, high) if false_positive < false_negative else (low, middle)
    return at(low)[0]


@pytest.mark.parametrize("decimals", [1, 8])  # 1: many ties
def test_it_agrees_with_counting(decimals):
    rng = np.random.default_rng(0)
    for _ in range(50):
        labels = np.append([0, 1], rng.integers(0, 2, rng.integers(0, 40)))
        scores = np.round(rng.normal(size=len(labels)) + labels * rng.uniform(0, 2), decimals)
        rate = equal_error_rate(scores, labels)
        np.testing.assert_allclose(rate, by_counting(scores, labels), atol=1e-9)
        # The order, the scale and which class is 1 don't matter.
        order = rng.permutation(len(labels))
        for same in (
            equal_error_rate(scores[order], labels[order]),
            equal_error_rate(np.exp(scores), labels),
            equal_error_rate(-scores, 1 - labels),
        ):
            np.testing.assert_allclose(same, rate, atol=1e-12)


@pytest.mark.parametrize(
    ("says", "scores", "labels"),
    [
        ("the labels hold 1.", [0.1, 0.2], [1, 1]),
        ("the labels hold 0, 1, 2.", [0.1, 0.2, 0.3], [0, 1, 2]),
        ("the labels hold nothing.", [], []),
        ("finite scores", [0.1, np.nan], [0, 1]),
        ("has shapes (3,) and (2,)", [1, 2, 3], [0, 1]),
    ],
)
def test_inputs_without_an_equal_error_rate(says, scores, labels):
    with pytest.raises(UserError) as error:
        equal_error_rate(np.array(scores), np.array(labels))
    assert says in str(error.value)
