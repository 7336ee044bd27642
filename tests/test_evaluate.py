"""Evaluation over a whole split."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from xkd_jax.data import Split
from xkd_jax.distributed import sharding
from xkd_jax.evaluate import IMAGES_PER_DEVICE, create_eval_step, evaluate
from xkd_jax.model import Model

pytestmark = pytest.mark.usefixtures("quick_compilation")


class FirstRow(nn.Module):
    """A network whose ten logits are the image's first row."""

    @nn.compact
    def __call__(self, images, train=False):
        return images[:, 0, :, 0], {}


@pytest.fixture(scope="module")
def network():
    return Model(FirstRow(), 10, (0.0,) * 3, (1.0,) * 3)


@pytest.fixture(scope="module")
def split():
    """300 images, so that the last batch isn't full, with random labels."""
    rng = np.random.default_rng(0)
    # No two values of a row are equal: ties would make the rank ambiguous.
    rows = rng.permuted(np.tile(np.arange(10) * 25, (300, 1)), axis=1)
    images = np.broadcast_to(rows[:, None, :, None], (300, 10, 10, 3)).astype(np.uint8)
    labels = rng.integers(0, 10, 300).astype(np.int32)
    return Split(images, labels, tuple("abcdefghij"))


def test_every_image_counts_once(network, split):
    assert len(split) % IMAGES_PER_DEVICE
    scores = evaluate(create_eval_step(network), {}, split, sharding.create_mesh())
    logits = split.images[:, 0, :, 0].astype(np.float64) / 255
    rank = (logits > logits[np.arange(300), split.labels][:, None]).sum(axis=1)
    assert scores["top1"] == pytest.approx(np.mean(rank < 1), abs=1e-9)
    assert scores["top5"] == pytest.approx(np.mean(rank < 5), abs=1e-9)
    likelihood = logits[np.arange(300), split.labels] - np.log(np.exp(logits).sum(axis=1))
    assert scores["loss"] == pytest.approx(-likelihood.mean(), rel=1e-5)


def test_noise_is_the_same_each_time_and_changes_the_images(network, split):
    noisy = create_eval_step(network, noisy=True)
    mesh = sharding.create_mesh()
    first = evaluate(noisy, {}, split, mesh)
    assert first == evaluate(noisy, {}, split, mesh)
    assert first["loss"] != evaluate(create_eval_step(network), {}, split, mesh)["loss"]


class Pixels(nn.Module):
    """A network whose ten logits are pixels from all over its input."""

    @nn.compact
    def __call__(self, images, train=False):
        return images[:, ::3, ::2, 1].reshape(len(images), -1)[:, :10], {}


@pytest.mark.parametrize(("crop_pct", "resized"), [(0.0, 8), (1.0, 8), (0.8, 10), (0.5, 16)])
def test_resident_images_are_centre_cropped(crop_pct, resized):
    """As with Pillow: resized with its antialiased filter, then cropped."""
    y, x = np.mgrid[:20, :20] / 6
    waves = [127 + 100 * np.sin(phase + x + 0.7 * y) for phase in range(12)]
    images = np.stack(waves).astype(np.uint8)[..., None].repeat(3, -1)
    labels = np.arange(12, dtype=np.int32) % 10
    split = Split(images, labels, tuple("abcdefghij"), crop_pct=crop_pct)
    start = (resized - 8) // 2
    box = (start, start, start + 8, start + 8)
    seen = [
        np.asarray(
            Image.fromarray(image).resize((resized, resized), Image.Resampling.BILINEAR).crop(box)
        )
        for image in images
    ]
    logits = np.stack(seen)[:, ::3, ::2, 1].reshape(12, -1)[:, :10] / 255
    likelihood = logits[np.arange(12), labels] - np.log(np.exp(logits).sum(axis=1))
    step = create_eval_step(Model(Pixels(), 8, (0.0,) * 3, (1.0,) * 3), split.crop_pct)
    scores = evaluate(step, {}, split, sharding.create_mesh())
    assert scores["loss"] == pytest.approx(-likelihood.mean(), abs=1e-3)


def test_images_that_are_not_square_are_squashed_unless_cropped(network):
    images = np.zeros((1, 10, 30, 3), np.uint8)
    images[:, :, 10:20] = 255  # the centre is white; of the whole image, a third
    split = Split(images, np.zeros(1, np.int32), tuple("abcdefghij"))
    mesh = sharding.create_mesh()
    whole = evaluate(create_eval_step(network), {}, split, mesh)["loss"]
    centre = evaluate(create_eval_step(network, 1.0), {}, split, mesh)["loss"]
    assert centre == pytest.approx(np.log(10), abs=1e-5)
    assert whole > centre + 0.1


def test_fewer_than_five_classes(split):
    class ThreeLogits(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            return jnp.zeros((len(images), 3)), {}

    network = Model(ThreeLogits(), 10, (0.0,) * 3, (1.0,) * 3)
    three = Split(split.images[:5], split.labels[:5] % 3, tuple("abc"))
    scores = evaluate(create_eval_step(network), {}, three, sharding.create_mesh())
    assert scores["top5"] == 1.0


def test_two_classes_have_an_equal_error_rate(split):
    class FirstPixel(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            return jnp.stack([jnp.zeros(len(images)), images[:, 0, 0, 0]], 1), {}

    images, labels = np.zeros((6, 10, 10, 3), np.uint8), np.array([0, 0, 0, 1, 1, 1], np.int32)
    images[:, 0, 0, 0] = [10, 20, 90, 80, 100, 110]  # one of three is wrong in each class
    network = Model(FirstPixel(), 10, (0.0,) * 3, (1.0,) * 3)
    two = Split(images, labels, ("live", "spoof"))
    mesh = sharding.create_mesh()
    assert evaluate(create_eval_step(network), {}, two, mesh)["eer"] == pytest.approx(1 / 3)
    one = Split(images[:3], labels[:3], ("live", "spoof"))
    assert "eer" not in evaluate(create_eval_step(network), {}, one, mesh)
