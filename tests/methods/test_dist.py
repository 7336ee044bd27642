"""DIST, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import gradient_fn, pair, reached
from xkd_jax.errors import UserError
from xkd_jax.methods.dist import DIST, pearson, relation_losses

pytestmark = pytest.mark.usefixtures("quick_compilation")


def logits(seed, n=4, classes=6):
    return (3 * np.random.default_rng(seed).normal(size=(n, classes))).astype(np.float32)


def softmax(x):
    e = np.exp(np.float64(x) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def expected_losses(student, teacher, temperature):
    """With the correlations of np.corrcoef."""
    s, t = softmax(student / temperature), softmax(teacher / temperature)
    inter = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    intra = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    return temperature**2 * (1 - inter), temperature**2 * (1 - intra)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_losses_are_the_papers(temperature):
    student, teacher = logits(0), logits(1)
    losses = relation_losses(student, teacher, temperature)
    np.testing.assert_allclose(losses, expected_losses(student, teacher, temperature), rtol=1e-4)


def test_a_correlation_by_hand():
    a, b = jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), jnp.array([[3.0, 5.0, 7.0], [1, 0, -1]])
    np.testing.assert_allclose(pearson(a, b, 1), [1, -1], rtol=1e-6)
    np.testing.assert_allclose(pearson(a[:1], jnp.array([[0.0, 1.0, 0.0]]), 1), 0, atol=1e-6)


def test_positive_scaling_and_shifts_change_no_correlation():
    """The paper relaxes the match: relations between probabilities, not probabilities."""
    a, b = softmax(logits(0)).astype(np.float32), softmax(logits(1)).astype(np.float32)
    for axis in (0, 1):
        found = pearson(a, b, axis)
        scale = np.array([[2.0], [0.5], [7.0], [1.0]]) if axis else np.arange(1.0, 7)
        np.testing.assert_allclose(pearson(a * scale + 3, b, axis), found, atol=1e-5)
        np.testing.assert_allclose(pearson(-a, b, axis), -found, atol=1e-5)


def test_equal_probabilities_cost_nothing():
    np.testing.assert_allclose(relation_losses(logits(0) + 5, logits(0), 4.0), 0, atol=1e-4)
    assert min(relation_losses(logits(1), logits(0), 4.0)) > 0.1


def test_both_losses_lie_between_0_and_2():
    opposite = relation_losses(-logits(0), logits(0), 1.0)
    assert all(1 < loss <= 2 for loss in opposite)


def test_constant_probabilities_keep_the_gradient_finite():
    """A classifier that starts at zero predicts the same for every class and image."""

    def total(student):
        return sum(relation_losses(student, logits(0), 4.0))

    loss, gradient = jax.value_and_grad(total)(jnp.zeros((4, 6)))
    np.testing.assert_allclose(loss, 32, rtol=1e-3)
    assert np.all(np.isfinite(gradient))


def test_bfloat16_logits_are_compared_in_float32():
    student, teacher = (jnp.asarray(logits(i), jnp.bfloat16) for i in (0, 1))
    losses = relation_losses(student, teacher, 4.0)
    full = relation_losses(student.astype(jnp.float32), teacher.astype(jnp.float32), 4.0)
    assert {loss.dtype for loss in losses} == {jnp.dtype("float32")}
    np.testing.assert_allclose(losses, full)


@pytest.mark.parametrize("name", ["ViT to CNN", "CNN to ViT"])
def test_the_logits_learn_and_the_teacher_does_not(name):
    (teacher, student), method = pair(name), DIST()
    method.check(teacher, student)
    gradient = gradient_fn(method, teacher, student)
    loss, (_, of_teacher, of_student) = gradient({}, teacher, student)
    expected = expected_losses(np.asarray(student["logits"]), np.asarray(teacher["logits"]), 4.0)
    np.testing.assert_allclose(loss, 2 * sum(expected), rtol=1e-4)
    assert reached(of_teacher) == set()
    assert reached(of_student) == {"logits"}
    nearer = student | {"logits": student["logits"] - 1e-3 * of_student["logits"]}
    assert gradient({}, teacher, nearer)[0] < loss


def test_the_terms_are_weighted_and_reported():
    outs, method = pair("CNN to CNN"), DIST(inter_weight=0.5, intra_weight=3.0, temperature=2.0)
    loss, state, metrics, _ = method.loss({}, {}, *outs, {}, None, jnp.zeros(()))
    np.testing.assert_allclose(loss, 0.5 * metrics["dist_inter"] + 3 * metrics["dist_intra"])
    assert state == {}


def test_the_defaults_are_the_authors():
    method = DIST()
    assert (method.label_weight, method.inter_weight, method.intra_weight) == (1, 2, 2)
    assert method.temperature == 4
    assert DIST(**DIST.imagenet).temperature == 1


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(UserError, match=r"method.dist.temperature=0\.0 must be above 0"):
        DIST(temperature=0.0).check({}, {})
