"""Activation boundaries, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import (
    PAIRS,
    assert_levels_learn,
    cnn,
    gradient_fn,
    init,
    learn,
    pair,
    reached,
    step_down,
    vit,
)
from tests.methods.reference import LEVELS, conv_norm, level_maps, on_grid
from xkd_jax.errors import UserError
from xkd_jax.methods.ab import AB, boundary_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")


def hinge(s, t):
    """The paper's two cases, for one neuron: how far it is on the wrong side of the margin."""
    if t > 0:
        return (s - 1) ** 2 if s < 1 else 0.0
    return (s + 1) ** 2 if s > -1 else 0.0


def boundaries(student, teacher):
    return sum(hinge(s, t) for s, t in zip(student.flat, teacher.flat, strict=True)) / len(student)


def expected(name, params):
    """3 / 1000 times the sum of the levels' losses, weighted 1, 1/2, 1/4, ... from the deepest."""
    maps, total = level_maps(name, before_activation=True), 0.0
    for k, (teacher, student) in enumerate(reversed(maps)):
        student = on_grid(student, teacher.shape[1:3])
        level = LEVELS[name][1][-1 - k]
        if level in params:
            student = conv_norm(params[level], student)
        total += 2.0**-k * boundaries(student, teacher)
    return 0.003 * total


@pytest.fixture(scope="module", params=PAIRS)
def learnt(request):
    """A pair's name, the method's parameters, its gradient function, loss and gradients."""
    return request.param, *learn(AB(), request.param, progress=-1.0)


def test_loss_is_the_squared_hinge_over_all_levels(learnt):
    name, params, _, loss, _ = learnt
    levels = zip(LEVELS[name][1], level_maps(name), strict=True)
    assert params.keys() == {level for level, (t, s) in levels if t.shape[-1] != s.shape[-1]}
    np.testing.assert_allclose(loss, expected(name, params), rtol=1e-5)


def test_every_level_and_connector_learns_and_the_teacher_does_not(learnt):
    name, *_, gradients = learnt
    assert_levels_learn(name, LEVELS[name][1], gradients)


def test_a_step_down_the_gradient_lowers_the_loss(learnt):
    name, params, gradient, loss, (of_params, _, _) = learnt
    assert gradient(step_down(params, of_params, loss), *pair(name), -1.0)[0] < loss


def test_after_the_first_phase_nothing_is_left(learnt):
    name, params, gradient, _, _ = learnt
    loss, gradients = gradient(params, *pair(name), 0.0)
    assert loss == 0
    assert reached(gradients[2]) == set()
    assert AB().first_phase == 30
    assert AB(first_epochs=2).first_phase == 2


def test_equal_widths_meet_without_a_connector():
    outs = cnn(0), cnn(1)
    params, _ = init(AB(), *outs)
    assert params == {}
    loss, _ = gradient_fn(AB(), *outs)({}, *outs, -1.0)
    total = sum(
        2.0 ** (i - 4) * boundaries(*(np.float64(out[f"stage{i}_pre"]) for out in outs[::-1]))
        for i in (1, 2, 3, 4)
    )
    np.testing.assert_allclose(loss, 0.003 * total, rtol=1e-5)


def test_only_the_side_counts_and_beyond_the_margin_nothing_is_lost():
    student, teacher = (out["stage1_pre"] for out in (cnn(0), cnn(1)))
    loss = boundary_loss(student, teacher)
    np.testing.assert_allclose(boundary_loss(student, 5 * teacher), loss)
    side = jnp.where(teacher > 0, 1.0, -1.0)
    assert boundary_loss(1.01 * side, teacher) == 0
    assert boundary_loss(side * (1 + jnp.abs(student)), teacher) == 0
    # At 0 the loss is 1 per neuron, at the wrong side's margin it is 4.
    neurons = student[0].size
    np.testing.assert_allclose(boundary_loss(0 * side, teacher), neurons)
    np.testing.assert_allclose(boundary_loss(-side, teacher), 4 * neurons)
    np.testing.assert_allclose(boundary_loss(0 * side - 1, 0 * side), 0)


def test_a_method_without_a_first_phase_is_refused():
    with pytest.raises(UserError, match="first_epochs=0 must be at least 1"):
        AB(first_epochs=0).check(vit(0), cnn(1))
