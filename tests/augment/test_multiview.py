"""The multi-view generator: which parts reach which view."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.augment.images import images_of, key
from xkd_jax.augment import multiview
from xkd_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

multi_view = jax.jit(multiview.multi_view, static_argnums=2)


def changed(view, x) -> np.ndarray:
    return (np.asarray(view) != np.asarray(x)).any((1, 2, 3))


@pytest.mark.parametrize("geometry", multiview.GEOMETRY_MODES)
def test_half_of_the_images_are_transformed(geometry):
    x = images_of(300)
    teacher, student = multi_view(key(), x, multiview.MultiView(geometry=geometry))
    moved = changed(student, x)
    # Within five standard deviations; all other images are unchanged, bit for bit.
    assert abs(moved.mean() - 0.5) < 5 * 0.5 / np.sqrt(300)
    if geometry == "shared":
        np.testing.assert_array_equal(changed(teacher, x), moved)
    else:
        np.testing.assert_array_equal(teacher, x)
    for view in (teacher, student):
        assert view.shape == x.shape
        assert view.dtype == jnp.float32
        assert np.asarray(view).min() >= 0
        assert np.asarray(view).max() <= 1 + 1e-6


PLAIN = multiview.MultiView(brightness=0, contrast=0, saturation=0, noise=0, mask_ratio=0)


def test_shared_geometry_is_the_same_for_both():
    """Without photometric parts the views agree; with them the teacher's view is the same."""
    x = images_of(300)
    teacher, student = multi_view(key(1), x, PLAIN)
    np.testing.assert_allclose(student, teacher, atol=1e-6)
    assert changed(teacher, x).any()
    full_teacher, full_student = multi_view(key(1), x, multiview.MultiView())
    np.testing.assert_allclose(full_teacher, teacher, atol=1e-6)
    assert (changed(full_student, teacher) == changed(teacher, x)).all()


def test_student_geometry_warps_the_student_as_shared_does():
    x = images_of(300)
    _, shared = multi_view(key(1), x, PLAIN)
    teacher, student = multi_view(key(1), x, dataclasses.replace(PLAIN, geometry="student"))
    np.testing.assert_array_equal(teacher, x)
    np.testing.assert_allclose(student, shared, atol=1e-6)


def test_without_any_part_nothing_changes():
    x = images_of(300)
    teacher, student = multi_view(key(1), x, dataclasses.replace(PLAIN, geometry="off"))
    np.testing.assert_array_equal(teacher, x)
    np.testing.assert_allclose(student, x, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{name: 0.3} for name in ("brightness", "contrast", "saturation", "noise", "mask_ratio")],
    ids=lambda change: next(iter(change)),
)
def test_photometric_parts_reach_only_the_student(change):
    x = images_of(300)
    options = dataclasses.replace(PLAIN, geometry="off", **change)
    teacher, student = multi_view(key(1), x, options)
    np.testing.assert_array_equal(teacher, x)
    assert np.abs(np.asarray(student) - x).max() > 0.01


def test_a_key_decides_everything():
    x = images_of(300)
    first, again, other = (multi_view(key(k), x, multiview.MultiView()) for k in (1, 1, 2))
    for view in (0, 1):
        np.testing.assert_array_equal(first[view], again[view])
        assert changed(first[view], other[view]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"geometry": "share"}, "unknown geometry mode 'share'; did you mean shared"),
        ({"min_scale": 0.0}, r"min_scale 0.0 is not within \(0, 1\]"),
        ({"mask_ratio": 1.5}, r"mask_ratio 1.5 is not within \[0, 1\]"),
        ({"mask_patch": 0}, "mask_patch 0"),
        ({"noise": -0.1}, "noise -0.1 is negative"),
    ],
)
def test_wrong_options_are_named(change, message):
    with pytest.raises(UserError, match=message):
        multiview.MultiView(**change)
