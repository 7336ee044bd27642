"""FitNet, against NumPy in float64."""

import jax
import numpy as np
import pytest

from tests.methods.outputs import (
    PAIRS,
    cnn,
    gradient_fn,
    init,
    learn,
    pair,
    reached,
    step_down,
    swin,
    vit,
)
from tests.methods.reference import LEVELS, conv_norm, level_maps, on_grid
from xkd_jax.errors import UserError
from xkd_jax.methods.fitnet import FitNet, hint_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

MIDDLE = 1  # of three levels and of four


def expected(name, params):
    """100 times the mean squared distance at the middle level."""
    teacher, student = level_maps(name)[MIDDLE]
    prediction = conv_norm(params, on_grid(student, teacher.shape[1:3]))
    if name.startswith("CNN"):
        prediction = np.maximum(prediction, 0)
    squares = [(a - b) ** 2 for a, b in zip(prediction.flat, teacher.flat, strict=True)]
    return 100 * sum(squares) / len(squares)


@pytest.fixture(scope="module", params=PAIRS)
def learnt(request):
    """A pair's name, the method's parameters, its gradient function, loss and gradients."""
    return request.param, *learn(FitNet(), request.param)


def test_loss_is_the_hint_at_the_middle_level(learnt):
    name, params, _, loss, _ = learnt
    np.testing.assert_allclose(loss, expected(name, params), rtol=1e-5)


def test_the_student_and_the_regressor_learn_and_the_teacher_does_not(learnt):
    name, _, _, _, (of_params, of_teacher, of_student) = learnt
    assert reached(of_teacher) == set()
    assert reached(of_student) == {LEVELS[name][1][MIDDLE]}
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(of_params))


def test_a_step_down_the_gradient_lowers_the_loss(learnt):
    name, params, gradient, loss, (of_params, _, of_student) = learnt
    teacher, student = pair(name)
    assert gradient(step_down(params, of_params, loss), teacher, student)[0] < loss
    tap = LEVELS[name][1][MIDDLE]
    nearer = student | {tap: step_down(student[tap], of_student[tap], loss)}
    assert gradient(params, teacher, nearer)[0] < loss


def test_the_hints_distance_is_a_mean():
    teacher, student = (np.float64(cnn(seed)["stage2"]) for seed in (0, 1))
    total = sum((a - b) ** 2 for a, b in zip(student.flat, teacher.flat, strict=True))
    np.testing.assert_allclose(hint_loss(student, teacher), total / teacher.size, rtol=1e-5)
    assert hint_loss(teacher, teacher) == 0


@pytest.mark.parametrize(("level", "width"), [(1, 4), (2, 8), (4, 32), (0, 8)])
def test_the_level_can_be_chosen(level, width):
    method = FitNet(level=level)
    method.check(swin(0), cnn(1))
    params, _ = init(method, swin(0), cnn(1))
    assert params["params"]["scale"].shape == (width,)


def test_two_stages_are_the_hint_then_the_labels():
    assert FitNet().first_phase == 0
    method, outs = FitNet(hint_epochs=2), (vit(0), cnn(1))
    assert method.first_phase == 2
    params, _ = init(method, *outs)
    gradient = gradient_fn(method, *outs)
    loss, _ = gradient(params, *outs, progress=-0.01)
    np.testing.assert_allclose(loss, expected("ViT to CNN", params), rtol=1e-5)
    loss, gradients = gradient(params, *outs, progress=0.0)
    assert loss == 0
    assert reached(gradients[2]) == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 4}, r"level=4 doesn't exist; .* the levels 1 \(the shallowest\) to 3, and 0"),
        ({"level": -1}, "level=-1 doesn't exist"),
        ({"hint_epochs": -1}, "hint_epochs=-1 must be at least 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        FitNet(**options).check(vit(0), cnn(1))
