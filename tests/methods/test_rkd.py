"""Relational distillation, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import gradient_fn, pair, reached
from xkd_jax.methods.rkd import RKD, relations, smooth_l1

pytestmark = pytest.mark.usefixtures("quick_compilation")


def points(seed, n=5, width=6):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def expected_relations(x):
    """Distances divided by their mean, and the cosine at corner j of the triangle i, j, k."""
    x, n = np.float64(x), len(x)
    distances, angles = np.zeros((n, n)), np.zeros((n, n, n))
    for j in range(n):
        for i in range(n):
            distances[j, i] = np.linalg.norm(x[i] - x[j])
            for k in range(n):
                if j not in (i, k):
                    a, b = x[i] - x[j], x[k] - x[j]
                    angles[j, i, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return distances / np.mean(distances[distances > 0]), angles


def huber(a, b):
    """l_delta of the paper: a parabola up to 1, then a line."""
    sizes = np.abs(a - b).ravel()
    return np.mean([d**2 / 2 if d <= 1 else d - 0.5 for d in sizes])


@pytest.fixture(scope="module", params=["CNN to CNN", "Swin to ViT"])
def learnt(request):
    """A pair, the gradient function, loss and gradients."""
    outs, method = pair(request.param), RKD()
    method.check(*outs)
    assert method.init(None, *outs) == ({}, {})
    gradient = gradient_fn(method, *outs)
    return outs, gradient, *gradient({}, *outs)


def test_loss_is_that_of_distances_and_angles(learnt):
    (teacher, student), _, loss, _ = learnt
    of_teacher, of_student = (expected_relations(o["pooled"]) for o in (teacher, student))
    distance, angle = (huber(s, t) for s, t in zip(of_student, of_teacher, strict=True))
    np.testing.assert_allclose(loss, 25 * distance + 50 * angle, rtol=1e-5)


def test_the_pooled_features_learn_and_the_teacher_does_not(learnt):
    _, _, _, (_, of_teacher, of_student) = learnt
    assert reached(of_teacher) == set()
    assert reached(of_student) == {"pooled"}


def test_a_step_down_the_gradient_lowers_the_loss(learnt):
    (teacher, student), gradient, loss, (_, _, of_student) = learnt
    nearer = student | {"pooled": student["pooled"] - 1e-2 * of_student["pooled"]}
    assert gradient({}, teacher, nearer)[0] < loss


def test_relations_are_those_of_the_paper():
    for found, right in zip(relations(points(0)), expected_relations(points(0)), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


def test_translation_rotation_and_scaling_of_all_points_change_nothing():
    x = points(0)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))
    for same in (x + 3, 7 * x, np.float32(x @ turn), np.pad(x, ((0, 0), (0, 4)))):
        for found, right in zip(relations(same), relations(x), strict=True):
            np.testing.assert_allclose(found, right, atol=2e-6)
    for found, right in zip(relations(x * np.arange(1, 7)), relations(x), strict=True):
        assert np.max(np.abs(found - right)) > 0.1


def test_points_far_from_the_origin_keep_their_relations():
    x = np.float32(points(0) + 1000)  # float32 has seven digits
    for found, right in zip(relations(x), expected_relations(x), strict=True):
        np.testing.assert_allclose(found, right, atol=1e-5)


def test_large_differences_count_linearly():
    a, b = jnp.array([0.0, 0.5, 3.0]), jnp.zeros(3)
    np.testing.assert_allclose(smooth_l1(a, b), (0.125 + 2.5) / 3)


@pytest.mark.parametrize("equal", [2, 4])
def test_equal_points_keep_the_gradient_finite(equal):
    teacher, student = pair("CNN to CNN")
    pooled = student["pooled"].at[:equal].set(student["pooled"][0])
    student = student | {"pooled": pooled}
    loss, (_, _, of_student) = gradient_fn(RKD(), teacher, student)({}, teacher, student)
    assert np.isfinite(loss)
    assert np.max(np.abs(of_student["pooled"])) < 1e3
