"""Attention transfer, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.outputs import PAIRS, cnn, gradient_fn, learn, pair, reached, step_down, vit
from tests.methods.reference import LEVELS, level_maps, on_grid
from xkd_jax.methods.at import AT, attention_loss, attention_map

pytestmark = pytest.mark.usefixtures("quick_compilation")


def normalised_energy(x):
    """sum_c x_c^2 at each position of one image [h, w, C], divided by its Euclidean length."""
    energy = np.array([[sum(c**2 for c in place) for place in row] for row in x])
    return energy / np.sqrt(np.sum(energy**2))


def expected(name):
    """1000 times the levels' mean squared distances."""
    total = 0.0
    for maps in level_maps(name, standardize=False):
        grid = np.min([x.shape[1:3] for x in maps], axis=0)
        teacher, student = (on_grid(x, grid) for x in maps)
        squares = [
            (normalised_energy(s) - normalised_energy(t)) ** 2
            for s, t in zip(student, teacher, strict=True)
        ]
        total += np.mean(squares)
    return 1000 * total


@pytest.fixture(scope="module", params=PAIRS)
def learnt(request):
    """A pair's name, the (empty) parameters, the gradient function, loss and gradients."""
    return request.param, *learn(AT(), request.param)


def test_loss_is_the_distance_of_normalised_energies(learnt):
    name, _, _, loss, _ = learnt
    np.testing.assert_allclose(loss, expected(name), rtol=1e-5)


def test_every_level_of_the_student_learns_and_the_teacher_does_not(learnt):
    name, params, _, _, (_, of_teacher, of_student) = learnt
    assert params == {}
    assert reached(of_teacher) == set()
    # A map with a single position has all its attention there: its gradient is rounding error.
    sides = [min(t.shape[1], s.shape[1]) for t, s in level_maps(name)]
    taps = {tap for tap, side in zip(LEVELS[name][1], sides, strict=True) if side > 1}
    assert taps <= reached(of_student) <= set(LEVELS[name][1])


def test_a_step_down_the_gradient_lowers_the_loss(learnt):
    name, params, gradient, loss, (_, _, of_student) = learnt
    teacher, student = pair(name)
    taps, slopes = ({tap: out[tap] for tap in LEVELS[name][1]} for out in (student, of_student))
    assert gradient(params, teacher, student | step_down(taps, slopes, loss))[0] < loss


def test_scales_permuted_channels_and_rotations_of_them_change_nothing():
    student, teacher = cnn(0)["stage1"], vit(1)["block01"].reshape(4, 4, 4, 8)
    loss = attention_loss(student, teacher)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))
    for same in (3 * teacher, -teacher, teacher[..., ::-1], teacher @ jnp.float32(rotation)):
        np.testing.assert_allclose(attention_loss(student, same), loss, rtol=1e-5)
    np.testing.assert_allclose(attention_loss(teacher, -2 * teacher), 0, atol=1e-12)
    elsewhere = teacher[:, ::-1]
    assert attention_loss(student, elsewhere) != pytest.approx(float(loss), rel=1e-3)


def test_a_dead_map_keeps_the_gradient_finite():
    outs = cnn(0), cnn(1)
    outs[1]["stage2"] = jnp.zeros_like(outs[1]["stage2"])
    loss, (_, _, of_student) = gradient_fn(AT(), *outs)({}, *outs)
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(gradient)) for gradient in of_student.values())


def test_the_maps_are_of_length_one():
    np.testing.assert_allclose(np.sum(attention_map(cnn(0)["stage1"]) ** 2, -1), 1, rtol=1e-6)
