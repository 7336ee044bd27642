"""Mixup and CutMix: the weights of the labels match those of the pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.augment.images import key
from xkd_jax.augment.mixup import mix

pytestmark = pytest.mark.usefixtures("quick_compilation")

N, H, W = 6, 12, 10
jitted = jax.jit(mix, static_argnums=(3, 4))


# Image i has the constant value i and class i, so that each pixel reveals its source.
IMAGES = jnp.broadcast_to(jnp.arange(N, dtype=jnp.float32)[:, None, None, None], (N, H, W, 3))
TARGETS = jnp.eye(N)


def many(count: int, mixup: float, cutmix: float) -> tuple[np.ndarray, np.ndarray]:
    """Batches [count, N, H, W, 3] and targets [count, N, N], for `count` keys."""
    mixed = jax.jit(jax.vmap(lambda k: mix(k, IMAGES, TARGETS, mixup, cutmix)))
    images, targets = mixed(jax.random.split(key(), count))
    return np.asarray(images), np.asarray(targets)


@pytest.fixture(scope="module")
def both():
    return many(600, 0.8, 1.0)


def cut(images: np.ndarray) -> np.ndarray:
    """Which batches CutMix made: every pixel comes from one of the two images."""
    return (images == np.round(images)).all((1, 2, 3, 4))


def test_targets_stay_probabilities(both):
    np.testing.assert_allclose(both[1].sum(-1), 1, atol=1e-6)
    assert both[1].min() >= 0


def test_partners_are_mirrored(both):
    own = np.arange(N)
    for targets in both[1][:20]:
        rest = targets.copy()
        rest[own, own] = rest[own, N - 1 - own] = 0
        assert not rest.any()


def test_weights_match_the_pixels(both):
    images, targets = both
    own, partner = np.arange(N), N - 1 - np.arange(N)
    share = targets[:, own, own]
    expected = share * own + (1 - share) * partner
    np.testing.assert_allclose(images.mean((2, 3, 4)), expected, atol=1e-5)
    np.testing.assert_allclose(share, np.broadcast_to(share[:, :1], share.shape))


def test_each_method_gets_half_of_the_batches(both):
    assert abs(cut(both[0]).mean() - 0.5) < 5 * 0.5 / np.sqrt(600)


def test_cutmix_pastes_one_rectangle_of_the_exact_share():
    images, targets = many(600, 0.0, 1.0)
    assert cut(images).all()
    pasted = images[:, 0, :, :, 0] == N - 1
    rows, columns = pasted.any(2), pasted.any(1)
    np.testing.assert_array_equal(pasted, rows[:, :, None] & columns[:, None])
    for lines in (rows, columns):  # contiguous
        assert (np.abs(np.diff(np.pad(lines.astype(int), ((0, 0), (1, 1))))).sum(1) <= 2).all()
    share = 1 - pasted.mean((1, 2))
    np.testing.assert_allclose(targets[:, 0, 0], share, atol=1e-6)
    assert share.min() < 0.2
    assert share.max() == 1
    # Centres are uniform: corners are covered too, but less often than the middle.
    often = pasted.mean(0)
    assert often.min() > 0.1
    assert often[H // 2, W // 2] > 1.3 * often[0, 0]


def test_mixup_weights_follow_the_beta_distribution():
    alpha = 0.2
    share = many(2000, alpha, 0.0)[1][:, 0, 0]
    assert abs(share.mean() - 0.5) < 0.05
    np.testing.assert_allclose(share.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.1)


def test_a_key_decides_and_views_agree():
    other_view = IMAGES + 100
    images, targets = jitted(key(3), IMAGES, TARGETS, 0.8, 1.0)
    again, _ = jitted(key(3), IMAGES, TARGETS, 0.8, 1.0)
    other, _ = jitted(key(4), IMAGES, TARGETS, 0.8, 1.0)
    view, view_targets = jitted(key(3), other_view, TARGETS, 0.8, 1.0)
    np.testing.assert_array_equal(images, again)
    assert (np.asarray(images) != np.asarray(other)).any()
    np.testing.assert_allclose(view - 100, images, atol=1e-4)
    np.testing.assert_array_equal(view_targets, targets)


def test_off_is_off():
    images, targets = mix(key(), IMAGES, TARGETS, 0.0, 0.0)
    assert images is IMAGES
    assert targets is TARGETS
