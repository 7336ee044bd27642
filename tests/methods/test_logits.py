"""Hinton's distillation, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xkd_jax.errors import UserError
from xkd_jax.methods.logits import Logits, mean_squared_distance, softened_kl

pytestmark = pytest.mark.usefixtures("quick_compilation")


def logits(seed, n=4, classes=6):
    return (3 * np.random.default_rng(seed).normal(size=(n, classes))).astype(np.float32)


def softmax(x):
    e = np.exp(np.float64(x) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_loss_is_the_divergence_of_softened_probabilities(temperature):
    student, teacher = logits(0), logits(1)
    total = 0.0
    for s, t in zip(softmax(student / temperature), softmax(teacher / temperature), strict=True):
        total += sum(p * np.log(p / q) for p, q in zip(t, s, strict=True))
    loss = softened_kl(student, teacher, temperature)
    np.testing.assert_allclose(loss, temperature**2 * total / len(student), rtol=1e-5)


def test_equal_logits_cost_nothing():
    x = logits(0)
    np.testing.assert_allclose(softened_kl(x, x, 4.0), 0, atol=1e-6)
    # Shifting all logits changes no probability.
    np.testing.assert_allclose(softened_kl(x + 5, x, 4.0), 0, atol=1e-5)
    assert softened_kl(logits(1), x, 4.0) > 0.1


def test_gradient_pulls_the_students_probabilities_to_the_teachers():
    student, teacher, temperature = logits(0), logits(1), 3.0
    gradient = jax.grad(softened_kl)(student, teacher, temperature)
    expected = softmax(student / temperature) - softmax(teacher / temperature)
    np.testing.assert_allclose(gradient, temperature * expected / len(student), atol=1e-6)


def test_extreme_logits_stay_finite():
    student, teacher = jnp.array([[1e4, -1e4]]), jnp.array([[-1e4, 1e4]])
    loss, gradient = jax.value_and_grad(softened_kl)(student, teacher, 1.0)
    assert loss == 2e4
    np.testing.assert_allclose(gradient, [[1, -1]])


def test_bfloat16_logits_are_compared_in_float32():
    student, teacher = (jnp.asarray(logits(i), jnp.bfloat16) for i in (0, 1))
    loss = softened_kl(student, teacher, 4.0)
    assert loss.dtype == jnp.float32
    full = softened_kl(student.astype(jnp.float32), teacher.astype(jnp.float32), 4.0)
    np.testing.assert_allclose(loss, full)


def test_the_mse_is_over_images_and_classes():
    student, teacher = logits(0), logits(1)
    pairs = zip(student.ravel(), teacher.ravel(), strict=True)
    total = sum((float(a) - float(b)) ** 2 for a, b in pairs)
    np.testing.assert_allclose(mean_squared_distance(student, teacher), total / 24, rtol=1e-5)
    half = mean_squared_distance(jnp.asarray(student, jnp.bfloat16), teacher)
    assert half.dtype == jnp.float32


@pytest.mark.parametrize("variant", ["kl", "mse"])
def test_the_method_weights_the_term_and_reports_it_unweighted_too(variant):
    teacher, student = {"logits": logits(1)}, {"logits": logits(0)}
    method = Logits(weight=0.3, temperature=2.0, variant=variant)
    method.check(teacher, student)
    args = {}, jax.random.key(0), jnp.zeros(())
    loss, state, metrics, _ = method.loss({}, {}, teacher, student, *args)
    kl, mse = softened_kl(logits(0), logits(1), 2.0), np.mean((logits(0) - logits(1)) ** 2)
    name, term = f"logits_{variant}", kl if variant == "kl" else mse
    assert metrics.keys() == {name, f"{name}_weighted"}
    np.testing.assert_allclose(metrics[name], term, rtol=1e-6)
    np.testing.assert_allclose(metrics[f"{name}_weighted"], loss)
    np.testing.assert_allclose(loss, 0.3 * term, rtol=1e-6)
    assert state == {}
    assert method.needs_teacher
    assert not method.adversary_period


def test_the_weights_are_repdistillers():
    method = Logits()
    assert (method.label_weight, method.weight, method.temperature) == (0.1, 0.9, 4.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "mae"}, "variant of logits 'mae'; did you mean mse"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be above 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Logits(**options).check({}, {})
