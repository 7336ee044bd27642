"""Instance relationship graphs, against NumPy in float64."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import PAIRS, cnn, gradient_fn, pair, reached, vit
from tests.methods.reference import LEVELS, level_maps
from xkd_jax.methods.irg import IRG, edges, transforms

pytestmark = pytest.mark.usefixtures("quick_compilation")


def expected_edges(x):
    """Squared distances between a map's means [N, h, w, C], divided by the largest of them."""
    x = np.float64(x).mean((1, 2))
    squares = np.array([[sum((a - b) ** 2) for b in x] for a in x])
    return squares / squares.max()


def expected_terms(name):
    """Vertices, edges, transforms: each the mean of squared differences."""
    teacher, student = (np.float64(out["logits"]) for out in pair(name))
    vertex = np.mean((teacher - student) ** 2)
    graphs = [[expected_edges(x) for x in both] for both in level_maps(name)]
    edge = np.mean([np.mean((t - s) ** 2) for t, s in graphs])
    changes = []
    for (t, s), (next_t, next_s) in pairwise(graphs):
        changes.append(np.mean(((next_t - t) ** 2 - (next_s - s) ** 2) ** 2))
    return vertex, edge, np.mean(changes)


@pytest.fixture(scope="module", params=PAIRS)
def learnt(request):
    """A pair's name, the gradient function, loss and gradients."""
    outs, method = pair(request.param), IRG()
    method.check(*outs)
    assert method.init(None, *outs) == ({}, {})
    gradient = gradient_fn(method, *outs)
    return request.param, gradient, *gradient({}, *outs)


def test_loss_is_that_of_vertices_edges_and_transforms(learnt):
    name, _, loss, _ = learnt
    vertex, edge, transform = expected_terms(name)
    np.testing.assert_allclose(loss, 0.1 * vertex + 5 * edge + 5 * transform, rtol=1e-5)


def test_logits_and_every_level_learn_and_the_teacher_does_not(learnt):
    name, _, _, (_, of_teacher, of_student) = learnt
    assert reached(of_teacher) == set()
    assert reached(of_student) == {"logits", *LEVELS[name][1]}


def test_a_step_down_the_gradient_lowers_the_loss(learnt):
    name, gradient, loss, (_, _, of_student) = learnt
    teacher, student = pair(name)
    nearer = {k: v - 1e-2 * of_student[k] for k, v in student.items() if k != "grid"}
    assert gradient({}, teacher, nearer)[0] < loss


def test_the_terms_are_reported_plain_and_weighted():
    name = "ViT to CNN"
    method = IRG(vertex_weight=2.0, edge_weight=3.0, transform_weight=4.0)
    loss, state, metrics, _ = method.loss({}, {}, *pair(name), {}, jax.random.key(0), jnp.zeros(()))
    terms = dict(
        zip(("irg_vertex", "irg_edge", "irg_transform"), expected_terms(name), strict=True)
    )
    for (term, value), weight in zip(terms.items(), (2, 3, 4), strict=True):
        np.testing.assert_allclose(metrics[term], value, rtol=1e-5)
        np.testing.assert_allclose(metrics[f"{term}_weighted"], weight * value, rtol=1e-5)
    np.testing.assert_allclose(loss, np.dot((2, 3, 4), list(terms.values())), rtol=1e-5)
    assert state == {}


def test_translation_rotation_and_scaling_of_all_points_keep_the_edges():
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))
    for same in (x + 3, 7 * x, np.float32(x @ turn)):
        np.testing.assert_allclose(edges(same), edges(x), atol=2e-6)
    assert np.max(edges(x)) == 1
    assert np.max(np.abs(edges(x * np.arange(1, 7)) - edges(x))) > 0.1


def test_the_largest_distance_is_a_constant_for_the_gradient():
    x = jnp.array([[0.0], [1.0], [3.0]])
    gradient = jax.grad(lambda x: jnp.sum(edges(x)))(x)
    # The gradient of 2 ((a - b)^2 + (b - c)^2 + (a - c)^2) / 9, with the 9 held constant.
    np.testing.assert_allclose(gradient[:, 0], [-16 / 9, -4 / 9, 20 / 9], rtol=1e-6)


def test_transforms_are_squared_changes():
    graphs = np.random.default_rng(0).random(size=(3, 2, 2))
    found = transforms(graphs)
    assert found.shape == (2, 2, 2)
    np.testing.assert_allclose(found[1, 0, 1], (graphs[2, 0, 1] - graphs[1, 0, 1]) ** 2)


def test_a_single_level_has_edges_but_no_transforms():
    outs = vit(0, depth=1), cnn(1)
    metrics = IRG().loss({}, {}, *outs, {}, jax.random.key(0), jnp.zeros(())).metrics
    assert "irg_edge" in metrics
    assert "irg_transform" not in metrics
    assert all(np.isfinite(value) for value in metrics.values())


def test_equal_points_keep_the_gradient_finite():
    loss, gradient = jax.value_and_grad(lambda x: jnp.sum(edges(x)))(jnp.ones((3, 2)))
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)
