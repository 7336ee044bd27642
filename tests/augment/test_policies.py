"""RandAugment, TrivialAugment, blur and erasing, compared with Pillow and torchvision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from tests.augment.images import key
from xkd_jax.augment import policies as aug
from xkd_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Compiled as in the training loop.
apply_ops = jax.jit(aug.apply_ops)
draw_ops = jax.jit(aug._draw_ops, static_argnums=(1, 2, 3))
rand_augment = jax.jit(aug.rand_augment, static_argnums=(2, 3))
trivial_augment = jax.jit(aug.trivial_augment)
random_blur = jax.jit(aug.random_blur, static_argnums=(2, 3))
random_erasing = jax.jit(aug.random_erasing, static_argnums=2)
augment = jax.jit(aug.augment, static_argnums=2)

H, W = 40, 33


def photo() -> np.ndarray:
    """Smooth colours of low contrast, with noise: uint8 [H, W, 3]."""
    y, x = np.mgrid[:H, :W][..., None] / 40
    waves = np.sin(np.array([3.0, 5.0, 9.0]) * (x + 0.7 * y)) * [40, 30, 50] + [100, 120, 140]
    return np.uint8(waves + np.random.default_rng(0).normal(0, 6, (H, W, 3)))


def floats(pixels: np.ndarray) -> np.ndarray:
    return np.float32(pixels) / 255


def pillow(name: str, x: np.ndarray, magnitude: float) -> np.ndarray:
    """Each operation as torchvision calls Pillow for it."""
    image, m = Image.fromarray(x), magnitude
    enhancers = {
        "brightness": ImageEnhance.Brightness,
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "sharpness": ImageEnhance.Sharpness,
    }
    matrices = {
        "shear_x": (1, m, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, m, 1, 0),
        "translate_x": (1, 0, -int(m), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -int(m)),
    }
    if name in enhancers:
        return np.asarray(enhancers[name](image).enhance(1 + m))
    if name in matrices:
        return np.asarray(image.transform(image.size, Image.Transform.AFFINE, matrices[name]))
    others = {
        "identity": lambda: image,
        "rotate": lambda: image.rotate(m),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(m)),
        "solarize": lambda: ImageOps.solarize(image, 255 - m),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }
    return np.asarray(others[name]())


MAGNITUDES = {
    "shear_x": (0.0, 0.297, -0.7),
    "shear_y": (0.297, -0.99),
    "translate_x": (0.0, 4.53, -9.6, 32.0),
    "translate_y": (4.53, -9.6, 50.0),
    "rotate": (0.0, 9.0, -30.0, 135.0),
    "brightness": (0.0, 0.27, -0.27, 0.99, -0.99),
    "color": (0.27, -0.27, 0.99, -0.99),
    "contrast": (0.27, -0.27, 0.99, -0.99),
    "sharpness": (0.27, -0.27, 0.99, -0.99),
    "posterize": (0.0, 1.2, 3.0, 6.0),
    "solarize": (0.0, 76.5, 130.0, 255.0),
}


@pytest.fixture(scope="module")
def applied() -> dict[str, list[tuple[float, np.ndarray]]]:
    """Every operation at each of its magnitudes, in one batch."""
    cases = [(name, m) for name in aug.OPS for m in MAGNITUDES.get(name, (0.0,))]
    ops = jnp.asarray([aug.OPS.index(name) for name, _ in cases])
    magnitudes = jnp.asarray([m for _, m in cases], jnp.float32)
    batch = np.broadcast_to(floats(photo()), (len(cases), H, W, 3))
    results = np.asarray(apply_ops(jnp.asarray(batch), ops, magnitudes)) * 255
    found: dict[str, list[tuple[float, np.ndarray]]] = {name: [] for name in aug.OPS}
    for (name, magnitude), result in zip(cases, results, strict=True):
        found[name].append((magnitude, result))
    return found


@pytest.mark.parametrize("name", aug.OPS)
def test_every_operation_equals_pillow(applied, name):
    for magnitude, ours in applied[name]:
        expected = pillow(name, photo(), magnitude).astype(np.float32)
        differs = (np.abs(ours - expected) > 1.01).any(-1)
        # Ties between nearest neighbours may be broken either way.
        allowed = 0.01 if name in ("rotate", "shear_x", "shear_y") else 0
        assert differs.mean() <= allowed, (name, magnitude, differs.mean())
        exact = (np.abs(ours - expected) < 0.01).mean()
        assert exact > 0.98, (name, magnitude, exact)


def test_solarize_inverts_at_full_strength(applied):
    np.testing.assert_allclose(applied["solarize"][-1][1], 255 - np.float32(photo()), atol=1e-3)


def test_equalize_and_autocontrast_of_hard_images():
    """One value, two values, one differing pixel, almost everything at the top."""
    x = np.zeros((4, H, W, 3), np.uint8)
    x[0] = 77
    x[1, :5] = 9
    x[2, 0, 0] = 255
    x[3] = np.random.default_rng(1).choice([0, 254, 255], (H, W, 3))
    for name in ("equalize", "autocontrast"):
        ours = apply_ops(floats(x), jnp.full(4, aug.OPS.index(name)), jnp.zeros(4)) * 255
        expected = np.stack([pillow(name, image, 0) for image in x])
        np.testing.assert_allclose(ours, expected, atol=1e-3)


# ---- what is drawn

TRIVIAL = (0, 0.99, 0.99, 32, 32, 135, 0.99, 0.99, 0.99, 0.99, 6, 255, 0, 0)


def test_draws_are_uniform_and_in_range():
    n = 28_000
    op, magnitude = (np.asarray(v) for v in draw_ops(key(), n, TRIVIAL, None))
    counts = np.bincount(op, minlength=len(aug.OPS))
    assert np.abs(counts - n / 14).max() < 5 * np.sqrt(n / 14)
    for i, (name, top) in enumerate(zip(aug.OPS, TRIVIAL, strict=True)):
        drawn = magnitude[op == i]
        levels = np.unique(np.abs(drawn)) * 30 / max(top, 1e-9)
        np.testing.assert_allclose(levels, np.arange(31) if top else [0], atol=1e-4)
        signed = 1 <= i <= 9
        share = (drawn < 0).mean()
        assert abs(share - 15 / 31) < 0.07 if signed else share == 0, name


def test_rand_augments_magnitude_is_fixed():
    op, magnitude = (np.asarray(v) for v in draw_ops(key(), 1000, TRIVIAL, 9))
    np.testing.assert_allclose(np.abs(magnitude), np.asarray(TRIVIAL)[op] * 0.3, rtol=1e-6)


def test_ranges_are_torchvisions():
    """RandAugment's ranges depend on the size of the image."""
    n = 300
    x = np.broadcast_to(floats(photo()), (n, H, W, 3))
    wide, high = 150 / 331 * W, 150 / 331 * H
    ranges = (0, 0.3, 0.3, wide, high, 30, 0.9, 0.9, 0.9, 0.9, 4, 255, 0, 0)
    layer_key = jax.random.split(key(5), 1)[0]
    expected = apply_ops(x, *draw_ops(layer_key, n, ranges, 9))
    np.testing.assert_allclose(rand_augment(key(5), x, 1, 9), expected, atol=1e-6)
    expected = apply_ops(x, *draw_ops(key(5), n, TRIVIAL, None))
    np.testing.assert_allclose(trivial_augment(key(5), x), expected, atol=1e-6)


def test_layers_follow_each_other():
    """Two operations leave fewer images unchanged than one; images are independent."""
    n = 300
    x = np.broadcast_to(floats(photo()), (n, H, W, 3))
    once, twice = (np.asarray(rand_augment(key(1), x, layers, 9)) for layers in (1, 2))
    same = [(np.abs(y - x) < 1e-4).all((1, 2, 3)).mean() for y in (once, twice)]
    assert same[1] < same[0] < 0.2  # about 1/196 and 1/14
    assert same[0] > 0
    assert len({y.tobytes() for y in twice}) > 100
    assert 0 <= twice.min() <= twice.max() <= 1


# ---- blur, erasing


def test_blur_applies_with_its_probability():
    x = np.random.default_rng(0).random((400, 8, 6, 3), np.float32)  # smaller than the kernel
    y = np.asarray(random_blur(key(), x, 0.25, 2.0))
    blurred = (y != x).any((1, 2, 3))
    assert abs(blurred.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 400)
    np.testing.assert_allclose(y.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=0.1)
    assert y[blurred].std((1, 2)).mean() < 0.8 * x[blurred].std((1, 2)).mean()


def test_erasing_cuts_rectangles_of_timms_sizes():
    n, h, w = 1500, 32, 24
    x = np.full((n, h, w, 3), -1, np.float32)
    y = np.asarray(random_erasing(key(), x, 0.5))
    erased = (y != -1).all(-1)
    np.testing.assert_array_equal(erased, (y != -1).any(-1))
    chosen = erased.any((1, 2))
    assert abs(chosen.mean() - 0.5) < 5 * 0.5 / np.sqrt(n)
    rows, columns = erased.any(2)[chosen], erased.any(1)[chosen]
    heights, widths = rows.sum(1), columns.sum(1)
    np.testing.assert_array_equal(erased[chosen].sum((1, 2)), heights * widths)  # rectangles
    area = heights * widths / (h * w)
    assert area.min() < 0.03
    assert 0.32 < area.max() < 0.36
    assert area.min() > 0.015  # sides are rounded
    aspect = heights / widths
    assert 0.2 < aspect.min() < 0.4
    assert 2.5 < aspect.max() < 4.5
    for lines in (rows, columns):  # every row and column is erased in some image
        assert lines.any(0).all()
        assert lines[:, 0].mean() > 0.03
        assert lines[:, -1].mean() > 0.03
    noise = y[erased]
    assert 0 <= noise.min() <= noise.max() < 1
    np.testing.assert_allclose([noise.mean(), noise.std()], [0.5, 12**-0.5], atol=0.03)


# ---- the whole policy


FULL = aug.Augment(
    auto="randaugment", brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, blur=0.5, erasing=0.5
)


def test_a_key_decides_everything():
    x = np.broadcast_to(floats(photo()), (8, H, W, 3))
    first, again, other = (np.asarray(augment(key(k), x, FULL)) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any((1, 2, 3)).all()
    assert first.shape == x.shape
    assert first.dtype == np.float32
    assert 0 <= first.min() <= first.max() <= 1
    assert len({image.tobytes() for image in first}) == 8


def test_by_default_nothing_happens():
    x = jnp.asarray(floats(photo()))[None]
    assert aug.augment(key(), x, aug.Augment()) is x
    assert aug.augment(key(), x, aug.Augment(mixup=0.8, cutmix=1.0)) is x


@pytest.mark.parametrize("field", ["hue", "blur", "erasing"])
def test_each_part_acts_alone(field):
    x = jnp.asarray(np.broadcast_to(floats(photo()), (8, H, W, 3)))
    options = dataclasses.replace(aug.Augment(), **{field: 0.5})
    assert (np.asarray(augment(key(), x, options)) != np.asarray(x)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto": "randaug"}, "unknown automatic augmentation 'randaug'; did you mean randaugment"),
        ({"randaugment_ops": 0}, "randaugment_ops 0 must be at least 1"),
        ({"randaugment_magnitude": 31}, r"randaugment_magnitude 31 is not within \[0, 30\]"),
        ({"hue": 0.6}, r"hue 0.6 is not within \[0, 0.5\]"),
        ({"blur": 1.5}, r"blur 1.5 is not a probability"),
        ({"blur_sigma": 0.0}, r"blur_sigma 0.0 must be at least 0.1"),
        ({"erasing": -0.1}, r"erasing -0.1 is not a probability"),
        ({"mixup": -1.0}, r"mixup -1.0 is negative"),
    ],
)
def test_wrong_options_are_named(change, message):
    with pytest.raises(UserError, match=message):
        aug.Augment(**change)
