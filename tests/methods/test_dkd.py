"""Decoupled distillation, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import gradient_fn, pair, reached
from xkd_jax.errors import UserError
from xkd_jax.methods.dkd import DKD, decoupled_kl
from xkd_jax.methods.logits import softened_kl

pytestmark = pytest.mark.usefixtures("quick_compilation")

LABELS = np.array([0, 3, 2, 5])
WARM = 20.0  # epochs after which the weights have their full values


def logits(seed, n=4, classes=6):
    return (3 * np.random.default_rng(seed).normal(size=(n, classes))).astype(np.float32)


def softmax(x):
    e = np.exp(np.float64(x) - np.max(x))
    return e / e.sum()


def divergence(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))


def expected_parts(student, teacher, labels, temperature):
    """TCKD and NCKD, image by image."""
    tckd, nckd = 0.0, 0.0
    for s, t, label in zip(student / temperature, teacher / temperature, labels, strict=True):
        p, q = softmax(t), softmax(s)
        tckd += divergence([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        nckd += divergence(softmax(np.delete(t, label)), softmax(np.delete(s, label)))
    return temperature**2 * tckd / len(labels), temperature**2 * nckd / len(labels)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_parts_are_the_papers(temperature):
    student, teacher = logits(0), logits(1)
    parts = decoupled_kl(student, teacher, LABELS, temperature)
    expected = expected_parts(student, teacher, LABELS, temperature)
    np.testing.assert_allclose(parts, expected, rtol=1e-5)


def test_a_case_by_hand():
    """The teacher has 1/2, 1/4, 1/4, the student 1/4, 1/4, 1/2."""
    teacher, student = np.log([[2.0, 1.0, 1.0]]), np.log([[1.0, 1.0, 2.0]])
    tckd, nckd = decoupled_kl(student, teacher, np.array([0]), 1.0)
    np.testing.assert_allclose(tckd, np.log(2) / 2 + np.log(2 / 3) / 2, rtol=1e-5)
    np.testing.assert_allclose(nckd, np.log(3 / 2) / 2 + np.log(3 / 4) / 2, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_tckd_and_the_teachers_doubt_times_nckd(temperature):
    """KL = TCKD + (1 - p_T) NCKD for each image, the paper's reformulation."""
    for i, label in enumerate(LABELS):
        student, teacher = logits(0)[[i]], logits(1)[[i]]
        doubt = 1 - softmax(teacher[0] / temperature)[label]
        tckd, nckd = decoupled_kl(student, teacher, np.array([label]), temperature)
        kl = softened_kl(student, teacher, temperature)
        np.testing.assert_allclose(tckd + doubt * nckd, kl, rtol=2e-5)


def test_each_part_ignores_what_belongs_to_the_other():
    student, teacher = logits(0), logits(1)
    tckd, nckd = decoupled_kl(student, teacher, LABELS, 4.0)
    raised = student.copy()
    raised[np.arange(4), LABELS] += 2
    other = decoupled_kl(raised, teacher, LABELS, 4.0)
    np.testing.assert_allclose(other[1], nckd, rtol=1e-5)
    assert abs(other[0] - tckd) > 0.1
    # A permutation of the other classes keeps the target's probability.
    swapped = student.copy()
    for row, label in zip(swapped, LABELS, strict=True):
        a, b = [i for i in range(6) if i != label][:2]
        row[[a, b]] = row[[b, a]]
    other = decoupled_kl(swapped, teacher, LABELS, 4.0)
    np.testing.assert_allclose(other[0], tckd, rtol=1e-4)
    assert abs(other[1] - nckd) > 0.1


def test_equal_logits_cost_nothing():
    np.testing.assert_allclose(decoupled_kl(logits(0) + 5, logits(0), LABELS, 4.0), 0, atol=1e-5)


def test_with_two_classes_there_is_nothing_among_the_others():
    student, teacher = logits(0, classes=2), logits(1, classes=2)
    tckd, nckd = decoupled_kl(student, teacher, LABELS % 2, 4.0)
    assert nckd == 0
    np.testing.assert_allclose(tckd, softened_kl(student, teacher, 4.0), rtol=1e-5)


@pytest.mark.parametrize("label", [0, 1])
def test_extreme_logits_stay_finite(label):
    student, teacher = jnp.array([[1e4, -1e4, 0]]), jnp.array([[-1e4, 1e4, 0]])

    def total(student):
        return sum(decoupled_kl(student, teacher, jnp.array([label]), 1.0))

    loss, gradient = jax.value_and_grad(total)(student)
    assert np.isfinite(loss)
    assert loss > 1e3
    assert np.all(np.isfinite(gradient))


def test_bfloat16_logits_are_compared_in_float32():
    student, teacher = (jnp.asarray(logits(i), jnp.bfloat16) for i in (0, 1))
    parts = decoupled_kl(student, teacher, LABELS, 4.0)
    full = decoupled_kl(student.astype(jnp.float32), teacher.astype(jnp.float32), LABELS, 4.0)
    assert {part.dtype for part in parts} == {jnp.dtype("float32")}
    np.testing.assert_allclose(parts, full)


@pytest.mark.parametrize("name", ["ViT to CNN", "CNN to ViT"])
def test_the_logits_learn_and_the_teacher_does_not(name):
    outs, method = pair(name), DKD()
    method.check(*outs)
    gradient = gradient_fn(method, *outs)
    loss, (_, of_teacher, of_student) = gradient({}, *outs, WARM)
    teacher, student = (np.asarray(out["logits"]) for out in outs)
    tckd, nckd = expected_parts(student, teacher, np.arange(4), 4.0)
    np.testing.assert_allclose(loss, tckd + 8 * nckd, rtol=1e-5)
    assert reached(of_teacher) == set()
    assert reached(of_student) == {"logits"}
    for epoch, share in ((0.0, 0), (5.0, 1 / 4), (200.0, 1)):
        np.testing.assert_allclose(gradient({}, *outs, epoch)[0], share * loss, rtol=1e-5)


def test_the_terms_are_reported_and_the_warm_up_can_be_left_out():
    outs = pair("CNN to CNN")
    method = DKD(target_weight=0.5, non_target_weight=3.0, warmup_epochs=0)
    batch = {"label": LABELS % 5}
    loss, state, metrics, _ = method.loss({}, {}, *outs, batch, None, jnp.zeros(()))
    total = 0.5 * metrics["dkd_target"] + 3 * metrics["dkd_non_target"]
    np.testing.assert_allclose(loss, total, rtol=1e-6)
    assert loss > 0
    assert state == {}


def test_the_defaults_are_the_authors():
    method = DKD()
    assert (method.label_weight, method.target_weight, method.non_target_weight) == (1, 1, 8)
    assert (method.temperature, method.warmup_epochs) == (4, 20)
    assert method.hard_labels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"method.dkd.temperature=0\.0 must be above 0"),
        ({"warmup_epochs": -1}, "method.dkd.warmup_epochs=-1 must be at least 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DKD(**options).check({}, {})
