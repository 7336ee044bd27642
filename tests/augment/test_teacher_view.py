"""A teacher with a larger input sees the student's pixels, at its own resolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.augment.images import images_of, key
from xkd_jax.augment import multiview, ops
from xkd_jax.augment.pipeline import Pipeline
from xkd_jax.config import default_config
from xkd_jax.experiment import create_experiment
from xkd_jax.tasks.classification import create_views

pytestmark = pytest.mark.usefixtures("quick_compilation")

PLAIN = multiview.MultiView(brightness=0, contrast=0, saturation=0, noise=0, mask_ratio=0)
SIDE, SMALL, PATCH = 112, 32, 14


def markers(n=24):
    """Black images with a red square of 14 pixels at a known place, and its centre [n, 2]."""
    rng = np.random.default_rng(0)
    corner = rng.integers(30, 68, (n, 2))
    images = np.zeros((n, SIDE, SIDE, 3), np.float32)
    for image, (top, left) in zip(images, corner, strict=True):
        image[top : top + PATCH, left : left + PATCH, 0] = 1
    return images, (corner + PATCH / 2) / SIDE


def centroid(view):
    """Of the red pixels, relative to the image's sides: [N, 2]."""
    mass = np.asarray(view)[..., 0]
    place = (np.arange(view.shape[1]) + 0.5) / view.shape[1]
    total = mass.sum((1, 2))
    return np.stack([(mass.sum(2) * place).sum(1) / total, (mass.sum(1) * place).sum(1) / total], 1)


def cells(view, side):
    """The mean redness of each cell of a grid of `side` x `side` pixels: [N, cells, cells]."""
    n, h, w, _ = view.shape
    return np.asarray(view)[..., 0].reshape(n, h // side, side, w // side, side).mean((2, 4))


def views(pipeline, images, multiple=True):
    targets = jnp.zeros((len(images), 2))
    return jax.jit(pipeline, static_argnums=3)(key(), images, targets, multiple)


@pytest.mark.parametrize("multiple", [False, True])
def test_a_marker_lies_at_the_same_place_in_both_views(multiple):
    images, before = markers()
    pipeline = Pipeline(crop_padding=3, flip=True, views=PLAIN, student_size=SMALL)
    teacher, student, _ = views(pipeline, images, multiple)
    assert teacher.shape == (24, SIDE, SIDE, 3)
    assert student.shape == (24, SMALL, SMALL, 3)
    moved = np.abs(centroid(teacher) - before).max(1)
    assert moved.max() > 0.1  # cropped, flipped, rotated
    np.testing.assert_allclose(centroid(student), centroid(teacher), atol=0.1 / SMALL)
    # Token t of the teacher and cell t of the student's 8 x 8 map cover the same place.
    of_teacher, of_student = cells(teacher, PATCH), cells(student, SMALL * PATCH // SIDE)
    np.testing.assert_allclose(of_student, of_teacher, atol=0.1)
    flat = of_teacher.reshape(24, -1)
    clear = np.sort(flat)[:, -1] - np.sort(flat)[:, -2] > 0.1
    assert clear.sum() > 5
    best = of_student.reshape(24, -1).argmax(1)
    np.testing.assert_array_equal(best[clear], flat.argmax(1)[clear])


def test_the_crop_moves_as_many_pixels_of_the_student_as_without_a_teacher():
    pipeline = Pipeline(crop_padding=4, student_size=SMALL)
    assert pipeline.padding(SIDE) == 14
    assert pipeline.padding(SMALL) == Pipeline(crop_padding=4).padding(SIDE) == 4


def test_noise_and_mask_are_in_the_students_pixels():
    images = images_of(64, 48, 48)
    options = multiview.MultiView(geometry="off", brightness=0, contrast=0, saturation=0, noise=0)
    teacher, student, _ = views(Pipeline(views=options, student_size=16), images)
    np.testing.assert_array_equal(teacher, images)
    plain = np.asarray(ops.resize(jnp.asarray(images), 16))
    masked = (np.abs(np.asarray(student) - plain) > 1e-6).any(3).reshape(64, 4, 4, 4, 4)
    assert (masked.any((2, 4)) == masked.all((2, 4))).all()  # whole patches of 4 pixels
    assert masked.any()


@pytest.mark.parametrize("geometry", multiview.GEOMETRY_MODES)
def test_equal_sizes_change_nothing(geometry):
    pipeline = Pipeline(crop_padding=1, flip=True, views=multiview.MultiView(geometry=geometry))
    images = images_of(8, 12, 12)
    plain = views(pipeline, images)
    for other, same in zip(
        views(Pipeline(1, True, views=pipeline.views, student_size=12), images), plain, strict=True
    ):
        np.testing.assert_array_equal(other, same)


def photo_experiment(folder, teacher_size, feed="host", method="logits"):
    """Checkerboards of single pixels, which a student of half the size can't resolve."""
    board = (np.indices((56, 56)).sum(0) % 2 * 255).astype(np.uint8)
    for i in range(8):
        path = folder / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.repeat(board[..., None], 3, 2)).save(path)
    config = default_config()
    config.method.name = method
    config.data.update(name=f"folder:{folder}", feed=feed)
    config.data.update(train="train", eval="train", test="train")
    config.image_size, config.batch_size, config.crop_scale = 28, 4, (1.0, 1.0)
    config.student.args = {"layers": (1, 1, 1, 1), "width": 0.125, "stem": "cifar"}
    config.teacher.update(model="vit_tiny_patch16_224", weights="random")
    config.teacher.args = {
        "img_size": teacher_size, "patch_size": 14, "embed_dim": 16, "depth": 1, "num_heads": 2,
    }  # fmt: skip
    config.augment.update(crop_padding=0, flip=True)
    return create_experiment(config)


def test_the_teacher_sees_detail_that_the_student_cannot_hold(tmp_path):
    experiment = photo_experiment(tmp_path, 56)
    batch = next(iter(experiment.create_loader().batches(0)))
    shapes = experiment.batch_shapes()
    assert {name: x.shape for name, x in batch.items()} == {
        name: x.shape for name, x in shapes.items()
    }
    assert batch["image"].shape == (4, 56, 56, 3)
    distiller = experiment.distiller
    teacher, student, _ = create_views(distiller, key(), batch["image"], batch["label"])
    assert (teacher.shape, student.shape) == ((4, 56, 56, 3), (4, 28, 28, 3))
    in_units = np.asarray(teacher) * np.asarray(distiller.teacher.std)
    assert in_units.std((1, 2)).min() > 0.45  # black and white
    assert np.asarray(student)[:, 2:-2, 2:-2].std((1, 2)).max() < 0.05  # grey


def test_without_a_larger_teacher_the_crop_is_the_students(tmp_path):
    for teacher_size, method in ((28, "logits"), (56, "none")):
        experiment = photo_experiment(tmp_path, teacher_size, method=method)
        assert experiment.batch_shapes()["image"].shape == (4, 28, 28, 3)
    resident = photo_experiment(tmp_path, 112, feed="resident")
    assert resident.create_loader().arrays["image"].shape == (8, 56, 56, 3)
    assert resident.distiller.augment.student_size == 0
