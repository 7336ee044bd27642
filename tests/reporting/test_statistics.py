"""Statistics over seeds, against SciPy and NumPy."""

import math

import numpy as np
import pytest
from scipy import stats

from xkd_jax.reporting.statistics import adjust, compare_with_best, subtract

A = {0: 71.2, 1: 70.4, 2: 72.9, 3: 70.8, 4: 71.5}
B = {0: 70.1, 1: 70.6, 2: 71.0, 3: 69.9, 4: 70.2}


def test_paired_differences_are_those_of_scipy():
    found = subtract(A, B)
    expected = stats.ttest_rel(list(A.values()), list(B.values()))
    interval = expected.confidence_interval(0.95)
    differences = np.subtract(list(A.values()), list(B.values()))
    assert found.mean == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(expected.pvalue)


def test_only_shared_seeds_are_compared():
    assert subtract({0: 1.0}, {1: 1.0}) is None
    alone = subtract({0: 3.0, 1: 9.0}, {0: 1.0, 2: 0.0})
    assert alone.mean == 2
    assert math.isnan(alone.low)
    assert math.isnan(alone.p)
    assert subtract(A | {5: 0.0}, B | {6: 99.0}) == subtract(A, B)


def test_equal_differences_leave_no_deviation_to_test_against():
    found = subtract({0: 80.1, 1: 83.3}, {0: 79.0, 1: 82.2})
    assert found.mean == pytest.approx(1.1)
    assert math.isnan(found.p)
    assert math.isnan(found.high)


def test_holm():
    # By hand: 4 x 0.005, 3 x 0.01, then 2 x 0.03 and 1 x 0.04, raised to 0.06.
    found = adjust({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": math.nan})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert adjust({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert adjust({}) == {}


def test_each_cell_is_compared_with_the_best_other_one():
    c = {seed: score - 0.7 - 0.1 * (seed % 2) for seed, score in B.items()}
    cells = {"a": A, "b": B, "c": c, "lucky": {0: 99.0}}
    found = compare_with_best(cells, dict.fromkeys(cells, "none"))
    assert {name: rival.name for name, rival in found.items()} == {"a": "b", "b": "a", "c": "a"}
    p = {
        pair: stats.ttest_rel(list(one.values()), list(other.values())).pvalue
        for pair, one, other in (("ab", A, B), ("ca", c, A))
    }
    # "a" and "b" share one test, so there are two.
    low, high = sorted(p, key=lambda pair: p[pair])
    expected = {low: 2 * p[low], high: max(2 * p[low], p[high])}
    assert found["a"].p == found["b"].p == pytest.approx(expected["ab"])
    assert found["c"].p == pytest.approx(expected["ca"])
    assert found["c"].is_significant == (expected["ca"] < 0.05)
    assert found["b"].difference.mean == pytest.approx(-found["a"].difference.mean)


def test_cells_are_compared_within_their_group():
    cells = {"a": A, "b": B, "other": {seed: score + 50 for seed, score in A.items()}}
    found = compare_with_best(cells, {"a": "small", "b": "small", "other": "large"})
    assert {name: rival.name for name, rival in found.items()} == {"a": "b", "b": "a"}
