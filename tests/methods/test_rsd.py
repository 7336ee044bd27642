"""Redundancy suppression, against NumPy in float64."""

from math import erf

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import init, learn, pair, reached, step_down
from xkd_jax.errors import UserError
from xkd_jax.methods import create_method
from xkd_jax.methods.rsd import RSD, cross_correlation, redundancy_losses

pytestmark = pytest.mark.usefixtures("quick_compilation")


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def standardize(x):
    x = np.float64(x)
    return (x - x.mean(0)) / (x.std(0) + 1e-5)


def project(params, x):
    params = jax.tree.map(np.float64, params["params"])
    x = np.float64(x) @ params["expand"]["kernel"]
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * params["scale"] + params["bias"]
    x = x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2  # the exact GELU
    return x @ params["project"]["kernel"]


def expected_losses(teacher, student):
    """The two sums, element by element."""
    a, b = standardize(teacher), standardize(student)
    on, off = 0.0, 0.0
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            correlation = np.mean(a[:, i] * b[:, j])
            if i == j:
                on += (correlation - 1) ** 2
            else:
                off += correlation**2
    return on, off


def losses(teacher, student):
    return redundancy_losses(cross_correlation(teacher, student))


@pytest.fixture(scope="module", params=["CNN to CNN", "ViT to CNN", "Swin to ViT"])
def learnt(request):
    return request.param, *learn(RSD(), request.param)


def test_loss_is_that_of_the_projected_features(learnt):
    name, params, _, loss, _ = learnt
    teacher, student = (out["pooled"] for out in pair(name))
    on, off = expected_losses(teacher, project(params, student))
    np.testing.assert_allclose(loss, 0.1 * (on + 0.01 * off), rtol=1e-4)


def test_the_pooled_features_and_the_projector_learn_and_the_teacher_does_not(learnt):
    _, _, _, _, (of_params, of_teacher, of_student) = learnt
    assert reached(of_teacher) == set()
    assert reached(of_student) == {"pooled"}
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(of_params))


def test_a_step_down_the_gradient_lowers_the_loss(learnt):
    name, params, gradient, loss, (of_params, _, of_student) = learnt
    teacher, student = pair(name)
    assert gradient(step_down(params, of_params, loss), teacher, student)[0] < loss
    pooled = step_down(student["pooled"], of_student["pooled"], loss)
    assert gradient(params, teacher, student | {"pooled": pooled})[0] < loss


def test_both_parts_are_sums_over_the_matrix():
    teacher, student = draw(0, 9, 5), draw(1, 9, 5)
    np.testing.assert_allclose(
        losses(teacher, student), expected_losses(teacher, student), rtol=1e-4
    )


def test_a_case_by_hand():
    """Correlations of 1 and 1/2 on the diagonal, and of 1/4 and 0 elsewhere."""
    on, off = redundancy_losses(jnp.array([[1.0, 0.25], [0.0, 0.5]]))
    assert (on, off) == (0.25, 0.0625)


def test_equal_decorrelated_features_cost_nothing():
    features = np.float32([[1, 1], [1, -1], [-1, 1], [-1, -1]])  # standardised, uncorrelated
    np.testing.assert_allclose(losses(features, features), 0, atol=1e-6)
    # Correlated ones cost something, although they are equal.
    mixed = features @ np.float32([[1, 1], [0, 1]])
    on, off = losses(mixed, mixed)
    np.testing.assert_allclose(on, 0, atol=1e-6)
    np.testing.assert_allclose(off, 2 * 0.5, rtol=1e-4)


def test_scale_and_shift_of_a_feature_change_nothing_but_its_sign_does():
    teacher, student = draw(0, 9, 3), draw(1, 9, 3)
    right = losses(teacher, student)
    scale = np.float32([0.5, 3, 20])
    np.testing.assert_allclose(losses(teacher * scale + 7, student), right, rtol=1e-3)
    np.testing.assert_allclose(losses(teacher, student * scale - 4), right, rtol=1e-3)
    on, _ = losses(teacher, -teacher)
    np.testing.assert_allclose(on, 3 * 4, rtol=1e-4)


def test_a_constant_feature_keeps_the_gradient_finite():
    teacher, student = draw(0, 6, 3), draw(1, 6, 3)
    student[:, 1] = 2

    def total(student):
        return sum(losses(teacher, student))

    loss, gradient = jax.value_and_grad(total)(student)
    np.testing.assert_allclose(loss, sum(expected_losses(teacher, student)), rtol=1e-4)
    assert np.all(np.isfinite(gradient))


def test_a_batch_of_one_image_is_finite():
    outs, method = pair("ViT to CNN"), RSD()
    params, _ = init(method, *outs)
    one = [{"pooled": out["pooled"][:1]} for out in outs]
    loss = method.loss(params, {}, *one, {}, None, jnp.zeros(())).value
    np.testing.assert_allclose(loss, 0.1 * 8, rtol=1e-5)


@pytest.mark.parametrize(("expansion", "hidden"), [(2, 12), (5, 30)])
def test_the_projector_leads_from_the_students_width_to_the_teachers(expansion, hidden):
    params, state = init(RSD(expansion=expansion), *pair("ViT to CNN"))
    shapes = jax.tree.map(jnp.shape, params["params"])
    assert shapes == {
        "expand": {"kernel": (6, hidden)},
        "scale": (hidden,),
        "bias": (hidden,),
        "project": {"kernel": (hidden, 8)},
    }
    assert state == {}


def test_the_terms_are_weighted_and_reported():
    outs, method = pair("ViT to CNN"), RSD(weight=0.5, decorrelation=0.2)
    params, _ = init(method, *outs)
    loss, _, metrics, _ = method.loss(params, {}, *outs, {}, None, jnp.zeros(()))
    on, off = expected_losses(outs[0]["pooled"], project(params, outs[1]["pooled"]))
    np.testing.assert_allclose(metrics["rsd_invariance"], on, rtol=1e-4)
    np.testing.assert_allclose(metrics["rsd_redundancy"], 0.2 * off, rtol=1e-4)
    total = 0.5 * (metrics["rsd_invariance"] + metrics["rsd_redundancy"])
    np.testing.assert_allclose(loss, total, rtol=1e-6)


def test_with_a_logit_term_the_labels_keep_their_weight():
    weights = {"logits": {"label_weight": 1.0, "weight": 1.0}}
    assert create_method("rsd+logits", weights).label_weight == 1
    assert create_method("rsd", {}).label_weight == 1


def test_the_defaults_are_the_authors():
    method = RSD()
    assert (method.weight, method.decorrelation, method.expansion) == (0.1, 0.01, 2)
    assert not method.hard_labels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decorrelation": -0.1}, r"method.rsd.decorrelation=-0\.1 must be at least 0"),
        ({"expansion": 0}, "method.rsd.expansion=0 must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        RSD(**options).check(*pair("ViT to CNN"))
