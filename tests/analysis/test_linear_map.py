"""Ridge regression, cosine similarity and CKA, against direct formulas."""

import numpy as np
import pytest

from xkd_jax.analysis import linear_map
from xkd_jax.analysis.linear_map import cosines, fit_linear_map, fit_ridge, linear_cka


def pair(n=40, c=5, d=3, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, c)) * [1, 10, 0.1, 1, 2][:c] + 3
    y = x @ rng.normal(size=(c, d)) + noise * rng.normal(size=(n, d)) - 2
    return x.astype(np.float32), y.astype(np.float32)


def test_ridge_solves_its_normal_equations(monkeypatch):
    x, y = pair()
    strengths = (1e-3, 0.1, 10.0)
    monkeypatch.setattr(linear_map, "_ROWS", 7)  # accumulated over several slices
    for strength, fit in zip(strengths, fit_ridge(x, y, strengths), strict=True):
        z = (x - x.mean(0)) / x.std(0)
        penalty = np.sqrt(strength * len(x)) * np.eye(x.shape[1])
        stacked = np.concatenate([z, penalty]), np.concatenate([y - y.mean(0), np.zeros((5, 3))])
        kernel = np.linalg.lstsq(*stacked, rcond=None)[0]
        np.testing.assert_allclose(fit(x), z @ kernel + y.mean(0), rtol=1e-3, atol=1e-3)


def test_constant_features_are_ignored():
    x, y = pair()
    x[:, 2] = 7
    (fit,) = fit_ridge(x, y, (1e-4,))
    assert np.isfinite(fit.kernel).all()
    assert np.isfinite(fit(x)).all()


def test_an_exact_map_is_found_and_noise_needs_more_regularisation():
    x, y = pair(noise=0)
    held = np.arange(len(x)) % 4 == 0
    fit, strength = fit_linear_map(x, y, held)
    assert strength <= 1e-4
    assert cosines(fit(x), y).min() > 0.999
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(60, 40)), rng.normal(size=(60, 8)) + 1
    _, strength = fit_linear_map(x, y, np.arange(60) % 4 == 0)
    assert strength >= 0.1


def test_cosines_are_those_of_the_rows():
    a, b = np.array([[1.0, 0], [3, 4], [0, 0]]), np.array([[2.0, 0], [-4, 3], [1, 1]])
    np.testing.assert_allclose(cosines(a, b), [1, 0, 0])


def direct_cka(x, y):
    def hsic(k, m):
        n = len(k)
        k, m = (a - np.diag(np.diag(a)) for a in (k, m))
        one = np.ones(n)
        total = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        cross = 2 / (n - 2) * (one @ k @ m @ one)
        return (np.trace(k @ m) + total - cross) / (n * (n - 3))

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def test_cka_is_the_debiased_estimate(monkeypatch):
    x, y = (a.astype(np.float64) for a in pair(noise=3))
    monkeypatch.setattr(linear_map, "_ROWS", 7)
    assert linear_cka(x, y) == pytest.approx(direct_cka(x, y), abs=1e-9)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)


def test_cka_of_independent_features_is_zero_even_with_few_examples():
    rng = np.random.default_rng(0)
    draws = [linear_cka(rng.normal(size=(20, 50)), rng.normal(size=(20, 50))) for _ in range(50)]
    assert abs(np.mean(draws)) < 0.03
