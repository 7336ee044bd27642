"""CAKD's term on pooled features, which is not in the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.cakd_reference import method_params, run_loss
from tests.methods.outputs import cnn, reached, vit
from xkd_jax.errors import UserError
from xkd_jax.methods import cakd
from xkd_jax.methods.cakd import CAKD
from xkd_jax.methods.cakd_release import CAKDRelease

pytestmark = pytest.mark.usefixtures("quick_compilation")


def outputs():
    return vit(0), cnn(1)


def test_it_is_the_squared_distance_in_units_of_the_teachers_variance():
    rng = np.random.default_rng(0)
    teacher = rng.normal(3.0, 5.0, (6, 4)).astype(np.float32)
    guess = rng.normal(size=(6, 4)).astype(np.float32)
    wide = np.float64(teacher)
    expected = np.mean((wide - guess) ** 2) / np.mean((wide - wide.mean(0)) ** 2)
    np.testing.assert_allclose(cakd.pooled_loss(teacher, guess), expected, rtol=1e-5)
    np.testing.assert_allclose(
        cakd.pooled_loss(teacher, np.broadcast_to(wide.mean(0), (6, 4))), 1.0, rtol=1e-5
    )
    # The scale of the teacher's features doesn't matter.
    np.testing.assert_allclose(cakd.pooled_loss(100 * teacher, 100 * guess), expected, rtol=1e-5)
    equal = jnp.ones((6, 4))
    assert np.isfinite(cakd.pooled_loss(equal, equal + 1))


def test_the_prediction_is_a_linear_map_and_the_term_is_weighted():
    teacher, student = outputs()
    method = CAKD(pooled_weight=0.7)
    params, _ = method_params(method, teacher, student)
    assert params.keys() == {"pca", "gl", "pooled"}
    total, metrics = run_loss(method, teacher, student)
    dense = params["pooled"]["params"]
    guess = np.float64(student["pooled"]) @ np.float64(dense["kernel"]) + dense["bias"]
    expected = cakd.pooled_loss(teacher["pooled"], guess.astype(np.float32))
    np.testing.assert_allclose(metrics["pooled"], expected, rtol=1e-4)
    weighted = [value for name, value in metrics.items() if name.endswith("_weighted")]
    np.testing.assert_allclose(total, sum(weighted), rtol=1e-5)
    np.testing.assert_allclose(metrics["pooled_weighted"], 0.7 * metrics["pooled"], rtol=1e-6)


def test_it_reaches_the_students_pooled_features_and_not_the_teachers():
    teacher, student = outputs()
    method = CAKD(pooled_weight=1.0)

    def loss(teacher_arrays, student_arrays):
        return run_loss(method, teacher | teacher_arrays, student | student_arrays)[0]

    arrays = ({"pooled": teacher["pooled"]}, {"pooled": student["pooled"]})
    of_teacher, of_student = jax.grad(loss, (0, 1))(*arrays)
    assert not np.asarray(of_teacher["pooled"]).any()
    assert reached(of_student) == {"pooled"}


def test_without_it_nothing_changes():
    teacher, student = outputs()
    params, _ = method_params(CAKD(), teacher, student)
    assert params.keys() == {"pca", "gl"}
    assert "pooled" not in run_loss(CAKD(), teacher, student)[1]


def test_the_release_has_a_term_of_its_own():
    with pytest.raises(UserError, match="pooled_weight has no effect; set class_token_weight"):
        CAKDRelease(pooled_weight=1.0).check(*outputs())
