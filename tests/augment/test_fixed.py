"""Fixed views: functions of the view's and the image's number alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.augment.images import images_of, key
from xkd_jax.augment import fixed, multiview
from xkd_jax.augment.pipeline import Pipeline
from xkd_jax.augment.policies import Augment

pytestmark = pytest.mark.usefixtures("quick_compilation")

STRONG = Augment(auto="randaugment", brightness=0.2, hue=0.1, blur=0.5, erasing=0.5)
PIPELINE = Pipeline(2, True, STRONG)
INDEX = jnp.arange(16)


@jax.jit
def shared(view, index, images):
    keys = fixed.view_keys(jnp.full_like(index, view), index)
    return fixed.shared_view(PIPELINE, keys, images, True)


@pytest.mark.slow
def test_a_view_depends_on_its_number_and_the_image_alone():
    images = jnp.asarray(images_of(16, 12, 12))
    whole, transformed = shared(0, INDEX, images)
    assert whole.shape == images.shape
    assert transformed.shape == (16, 1, 1, 1)
    assert 2 < np.asarray(transformed).sum() < 14
    reverse, _ = shared(0, INDEX[::-1], images[::-1])
    np.testing.assert_allclose(reverse[::-1], whole, atol=1e-6)
    part, _ = shared(0, INDEX[4:8], images[4:8])
    np.testing.assert_allclose(part, whole[4:8], atol=1e-6)
    other, _ = shared(1, INDEX, images)
    assert (np.asarray(other) != np.asarray(whole)).any((1, 2, 3)).mean() > 0.9
    same = jnp.broadcast_to(images[:1], images.shape)
    views, _ = shared(0, INDEX, same)
    assert len(np.unique(np.asarray(views).reshape(16, -1), axis=0)) > 12


@pytest.mark.parametrize("geometry", multiview.GEOMETRY_MODES)
def test_only_the_students_part_changes_from_step_to_step(geometry):
    pipeline = Pipeline(2, True, views=multiview.MultiView(geometry=geometry), label_smoothing=0.1)
    images, targets = jnp.asarray(images_of(64, 12, 12)), jax.nn.one_hot(jnp.zeros(64, int), 2)
    keys = fixed.view_keys(jnp.zeros(64, int), jnp.arange(64))
    step = jax.jit(lambda k: fixed.fixed_views(pipeline, k, keys, images, targets, True))
    (teacher, student, smooth), (same, other, _) = step(key(0)), step(key(1))
    np.testing.assert_array_equal(teacher, same)
    np.testing.assert_allclose(smooth[0], [0.95, 0.05], rtol=1e-6)
    moved = [(np.asarray(view) != np.asarray(teacher)).any((1, 2, 3)) for view in (student, other)]
    assert all(10 < m.sum() < 54 for m in moved)
    # With shared geometry the view says which images are transformed; else every step does.
    assert (moved[0] == moved[1]).all() == (geometry == "shared")
    assert (np.asarray(student) != np.asarray(other)).any((1, 2, 3)).sum() > 10


@pytest.mark.slow
def test_the_statistics_are_those_of_fresh_views():
    """The mean over many images of a gradient image agrees: crop, flip and warp are as likely."""
    pipeline = Pipeline(3, True, views=multiview.MultiView(brightness=0, contrast=0, saturation=0))
    ramp = np.broadcast_to(np.linspace(0, 1, 12)[:, None, None], (12, 12, 3)).astype(np.float32)
    images = jnp.broadcast_to(ramp, (800, 12, 12, 3))
    keys = fixed.view_keys(jnp.zeros(800, int), jnp.arange(800))
    seen, _ = fixed.shared_view(pipeline, keys, images, True)
    fresh, _, _ = pipeline(key(), images, jnp.zeros((800, 2)), True)
    np.testing.assert_allclose(seen.mean(0), fresh.mean(0), atol=0.05)


def test_the_recipe_names_what_matters():
    plain = fixed.recipe(PIPELINE, 12, True)
    assert plain == fixed.recipe(Pipeline(2, True, STRONG, label_smoothing=0.1), 12, True)
    assert plain != fixed.recipe(Pipeline(1, True, STRONG), 12, True)
    assert plain != fixed.recipe(PIPELINE, 12, False)
    assert plain != fixed.recipe(PIPELINE, 24, True)
    noisy = Pipeline(2, True, STRONG, multiview.MultiView(noise=0.3))
    assert plain == fixed.recipe(noisy, 12, True)
