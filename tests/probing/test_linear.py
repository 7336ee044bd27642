"""k-NN accuracy and logistic regression, against NumPy by hand."""

import numpy as np
import pytest

from xkd_jax.probing.linear import accuracy, choose_strength, fit_linear, hold_out, knn_accuracy

pytestmark = pytest.mark.usefixtures("quick_compilation")


def blobs(count, seed, spread=1.0):
    """Three overlapping classes in four dimensions, of very different scales."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 3).astype(np.int32)
    centres = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    features = centres[labels] + spread * rng.normal(size=(count, 4))
    return (features * [1, 10, 0.1, 1] + [0, 5, 0, 3]).astype(np.float32), labels


def test_neighbours_vote_by_their_cosine_similarity():
    train, test = blobs(60, 0), blobs(300, 1)
    hits = 0
    for query, label in zip(*test, strict=True):
        norms = np.linalg.norm(train[0], axis=1) * np.linalg.norm(query)
        similarity = train[0] @ query / norms
        votes = np.zeros(3)
        for i in np.argsort(-similarity)[:20]:
            votes[train[1][i]] += np.exp(similarity[i] / 0.07)
        hits += votes.argmax() == label
    assert knn_accuracy(train, test, 3) == pytest.approx(hits / 300, abs=1 / 299)
    assert 0.4 < hits / 300 < 1


def test_the_fit_is_a_minimum_of_the_penalised_cross_entropy():
    features, labels = blobs(90, 0)
    (fit,) = fit_linear(features, labels, 3, [0.01])
    mean, std = features.mean(0), features.std(0)
    kernel = fit.kernel * std[:, None]  # of standardised features
    logits = fit(features)
    np.testing.assert_allclose(
        logits, (features - mean) / std @ kernel + fit.bias + mean @ fit.kernel, atol=1e-4
    )
    likelihood = np.exp(logits - logits.max(1, keepdims=True))
    error = likelihood / likelihood.sum(1, keepdims=True) - np.eye(3)[labels]
    gradient = ((features - mean) / std).T @ error / 90 + 0.01 * kernel
    assert np.abs(gradient).max() < 2e-4
    assert np.abs(error.mean(0)).max() < 2e-4
    assert accuracy(logits, labels)["top1"] > 0.5


def test_constant_features_do_no_harm():
    features, labels = blobs(30, 0)
    (fit,) = fit_linear(np.hstack([features, np.ones((30, 1))]), labels, 3, [0.1])
    assert np.isfinite(fit.kernel).all()
    assert not fit.kernel[-1].any()


def test_the_strength_is_chosen_on_held_out_examples():
    features, labels = blobs(40, 0, spread=3.0)
    noise = np.random.default_rng(1).normal(size=(40, 100)).astype(np.float32)
    strength, scores = choose_strength(np.hstack([features, noise]), labels, 3, (1e-5, 1.0))
    assert scores.keys() == {1e-5, 1.0}
    assert strength == max((1.0, 1e-5), key=scores.get)


def test_a_share_of_every_class_is_held_out():
    labels = np.array([0] * 20 + [1] * 2 + [2])
    held = hold_out(labels, 0.2, seed=0)
    assert [held[labels == label].sum() for label in range(3)] == [4, 1, 0]
    assert (held == hold_out(labels, 0.2, seed=0)).all()


def test_top5():
    logits = np.tile(np.arange(8.0, dtype=np.float32), (4, 1))
    assert accuracy(logits, np.array([7, 6, 3, 2])) == {"top1": 0.25, "top5": 0.75}
