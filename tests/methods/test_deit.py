"""DeiT's distillation token, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import cnn, swin, vit
from tests.methods.test_logits import logits, softmax
from xkd_jax.errors import UserError
from xkd_jax.methods.base import PairError
from xkd_jax.methods.deit import DeiT, hard_loss, soft_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")


def student(seed=1):
    return vit(seed, distilled=True)


def run(method, teacher, student):
    return method.loss({}, {}, teacher, student, {}, jax.random.key(0), jnp.zeros(()))


def test_hard_is_the_cross_entropy_with_the_teachers_prediction():
    a, b = logits(0), logits(1)
    total = 0.0
    for probabilities, teacher in zip(softmax(a), b, strict=True):
        total -= np.log(probabilities[list(teacher).index(max(teacher))])
    np.testing.assert_allclose(hard_loss(a, b), total / len(a), rtol=1e-5)
    # Only the predicted class matters.
    np.testing.assert_allclose(hard_loss(a, 7 * b + 2), hard_loss(a, b), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_averages_over_classes_too(temperature):
    a, b = logits(0), logits(1)
    total = 0.0
    for s, t in zip(softmax(a / temperature), softmax(b / temperature), strict=True):
        total += sum(p * np.log(p / q) for p, q in zip(t, s, strict=True))
    np.testing.assert_allclose(
        soft_loss(a, b, temperature), temperature**2 * total / a.size, rtol=1e-5
    )
    np.testing.assert_allclose(soft_loss(b, b, temperature), 0, atol=1e-6)


@pytest.mark.parametrize("teacher", [cnn, vit, swin])
@pytest.mark.parametrize("variant", ["hard", "soft"])
def test_only_the_distillation_head_learns_and_from_any_teacher(teacher, variant):
    method, teacher_out, student_out = DeiT(variant=variant), teacher(0), student()
    method.check(teacher_out, student_out)
    assert method.init(jax.random.key(0), teacher_out, student_out) == ({}, {})
    heads = {k: v for k, v in student_out.items() if k.endswith("logits")}

    def loss_fn(teacher_logits, heads):
        return run(method, {"logits": teacher_logits}, heads).value

    gradient = jax.value_and_grad(loss_fn, (0, 1))
    loss, (to_teacher, to_heads) = gradient(teacher_out["logits"], heads)
    assert not np.any(np.asarray(to_teacher))
    assert [k for k, v in to_heads.items() if np.any(np.asarray(v))] == ["dist_logits"]
    stepped = jax.tree.map(lambda a, g: a - 0.1 * g, heads, to_heads)
    assert loss_fn(teacher_out["logits"], stepped) < loss


def test_the_term_is_weighted_and_the_label_term_has_the_class_token():
    method, teacher_out, student_out = DeiT(weight=0.25), cnn(0), student()
    loss, state, metrics, _ = run(method, teacher_out, student_out)
    expected = hard_loss(student_out["dist_logits"], teacher_out["logits"])
    np.testing.assert_allclose(loss, 0.25 * expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["deit_hard"], expected, rtol=1e-6)
    assert state == {}
    assert method.label_logits(student_out) is student_out["cls_logits"]
    assert (DeiT().label_weight, DeiT().weight) == (0.5, 0.5)
    assert "deit_soft" in run(DeiT(variant="soft"), teacher_out, student_out).metrics


@pytest.mark.parametrize("other", [cnn, vit, swin])
def test_students_without_a_distillation_token_are_refused(other):
    with pytest.raises(PairError, match="distillation token, but this student has none"):
        DeiT().check(student(), other(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "softer"}, "variant of deit 'softer'; did you mean soft"),
        ({"temperature": 0.0}, r"temperature=0\.0 must be above 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DeiT(**options).check(cnn(0), student())
