"""LONDON, against NumPy in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import assert_levels_learn, learn, pair, step_down, vit
from tests.methods.reference import LEVELS, on_grid
from tests.methods.test_ofd import connected, mean_of_negatives, partial
from xkd_jax.errors import UserError
from xkd_jax.methods.london import LONDON, spectral_distance, top_singular_value

pytestmark = pytest.mark.usefixtures("quick_compilation")


def features(seed, side, width):
    """Maps with a dominant direction, so that the power iteration converges quickly."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, side, side, width)) + 2 * rng.normal(size=width)
    return x.astype(np.float32)


def transmitting_matrices(shallow, deep):
    """F_i^T F_(i+1) / (h w) of each image, on the smaller of the two grids."""
    grid = np.minimum(shallow.shape[1:3], deep.shape[1:3])
    shallow, deep = (on_grid(np.float64(x), grid) for x in (shallow, deep))
    matrices = np.zeros((len(shallow), shallow.shape[-1], deep.shape[-1]))
    for i, j in np.ndindex(*grid):
        matrices += shallow[:, i, j, :, None] * deep[:, i, j, None, :] / np.prod(grid)
    return matrices


def singular_values(shallow, deep):
    return np.linalg.svd(transmitting_matrices(shallow, deep), compute_uv=False)[:, 0]


def start(width):
    return jax.random.normal(jax.random.key(0), (width,))


@pytest.mark.parametrize("sides", [(4, 4), (4, 2), (2, 3)])
def test_the_iteration_finds_the_top_singular_value(sides):
    shallow, deep = features(0, sides[0], 5), features(1, sides[1], 6)
    values = top_singular_value(shallow, deep, start(5))
    np.testing.assert_allclose(values, singular_values(shallow, deep), rtol=1e-5)


def test_its_gradient_is_the_outer_product_of_the_singular_vectors():
    shallow, deep = features(0, 2, 3), features(1, 2, 4)
    gradient = jax.grad(lambda x: jnp.sum(top_singular_value(x, deep, start(3))))(shallow)
    left, _, right = np.linalg.svd(transmitting_matrices(shallow, deep))
    # d sigma / d M = u v^T, and M = F^T G / (h w).
    expected = np.einsum("nc,nd,nijd->nijc", left[:, :, 0], right[:, 0], np.float64(deep)) / 4
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_it_grows_with_the_maps_and_no_rotation_of_channels_changes_it():
    shallow, deep = features(0, 2, 3), features(1, 2, 4)
    value = top_singular_value(shallow, deep, start(3))
    np.testing.assert_allclose(
        top_singular_value(2 * shallow, deep, start(3)), 2 * value, rtol=1e-5
    )
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0].astype(np.float32)
    np.testing.assert_allclose(
        top_singular_value(shallow, deep @ rotation, start(3)), value, rtol=1e-5
    )


def test_a_map_of_zeros_has_a_finite_gradient():
    shallow, deep = features(0, 2, 3), features(1, 2, 4)
    gradient = jax.grad(lambda x: jnp.sum(top_singular_value(x, deep, start(3))))(0 * shallow)
    assert np.all(np.isfinite(gradient))


@pytest.mark.slow
def test_the_distances_between_levels_are_weighted_by_depth():
    teacher, student = (
        [features(seed + i, side, 3 + i) for i, side in enumerate((4, 4, 2, 2))] for seed in (0, 9)
    )
    loss = spectral_distance(jax.random.key(0), list(zip(teacher, student, strict=True)))
    total = 0.0
    for i, weight in enumerate((1 / 8, 1 / 4, 1 / 2)):
        values = [singular_values(x[i], x[i + 1]) for x in (teacher, student)]
        total += weight * np.mean((values[0] - values[1]) ** 2)
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    same = spectral_distance(jax.random.key(0), list(zip(teacher, teacher, strict=True)))
    assert same == 0


@pytest.fixture(scope="module", params=["CNN to CNN", "ViT to CNN", "Swin to ViT"])
def learnt(request):
    return request.param, *learn(LONDON(), request.param)


def power_iteration(matrix, vector):
    """Ten iterations with M M^T: the square root of the eigenvalue that they find."""
    for _ in range(10):
        vector = matrix @ (matrix.T @ vector)
        vector /= np.linalg.norm(vector)
    return np.linalg.norm(matrix.T @ vector)


def test_loss_is_ofds_and_the_spectral_distance_of_its_maps(learnt):
    name, params, _, loss, _ = learnt
    maps = list(connected(name, params))
    total = 0.0
    for k, (teacher, student) in enumerate(reversed(maps)):
        total += 1e-3 * partial(teacher, student, mean_of_negatives(teacher)) / 2**k
    for i, (shallow, deep) in enumerate(itertools.pairwise(maps)):
        key = jax.random.fold_in(jax.random.key(0), i)
        vector = np.float64(jax.random.normal(key, shallow[0].shape[-1:]))
        values = [
            np.array([power_iteration(m, vector) for m in transmitting_matrices(*of_network)])
            for of_network in zip(shallow, deep, strict=True)
        ]
        weight = 0.8 / 200 / 2 ** (len(maps) - 1 - i)
        total += weight * np.mean((values[0] - values[1]) ** 2)
    np.testing.assert_allclose(loss, total, rtol=1e-5)


def test_every_level_and_connector_learns_and_the_teacher_does_not(learnt):
    name, *_, gradients = learnt
    assert_levels_learn(name, LEVELS[name][1], gradients)


def test_a_step_down_the_gradient_lowers_the_loss(learnt):
    name, params, gradient, loss, (of_params, _, _) = learnt
    nearer = step_down(params, of_params, loss)
    assert gradient(nearer, *pair(name))[0] < loss


def test_two_levels_are_needed():
    with pytest.raises(UserError, match="this pair has only one level"):
        LONDON().check(vit(0), vit(1, depth=1))
