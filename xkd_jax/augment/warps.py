"""Filters and warps in NumPy for `common_corruptions`: images are float32 [N, H, W, C]."""

import numpy as np


def gaussian(
    images: np.ndarray, sigma: float, mode: str = "edge", truncate: float = 4.0
) -> np.ndarray:
    """A Gaussian blur, truncated where SciPy truncates it.

    Args:
      images: float32 [N, H, W, C].
      sigma: in pixels.
      mode: of `numpy.pad`.
      truncate: radius of the kernel, in sigmas.
    """
    radius = int(truncate * sigma + 0.5)
    if not radius:
        return images
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        size, width = images.shape[axis], [(0, 0)] * 4
        width[axis] = (radius, radius)
        padded = np.moveaxis(np.pad(images, width, mode), axis, 0)  # type: ignore[call-overload]
        blurred = sum(weight * padded[i : i + size] for i, weight in enumerate(weights))
        images = np.moveaxis(np.asarray(blurred), 0, axis)
    return images


def disk(radius: float, sigma: float) -> np.ndarray:
    """A disk that sums to 1, blurred over 3x3 pixels: [k, k], both lengths in pixels."""
    reach = int(radius) + 1
    offsets = np.arange(-reach, reach + 1)
    kernel = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float64)
    side = np.exp(-0.5 / sigma**2)
    for axis in (0, 1):  # nothing is rolled around: the disk has a margin of one pixel
        kernel = kernel + side * (np.roll(kernel, 1, axis) + np.roll(kernel, -1, axis))
    return (kernel / kernel.sum()).astype(np.float32)


def convolve(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolution with a symmetric kernel [k, k], k odd; reflected borders."""
    (h, w), reach = images.shape[1:3], len(kernel) // 2
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), "reflect")
    terms = (
        kernel[i, j] * padded[:, i : i + h, j : j + w]
        for i, j in np.argwhere(kernel > 1e-7)
    )  # fmt: skip
    return np.asarray(sum(terms))


def motion(images: np.ndarray, radius: int, sigma: float, angles: np.ndarray) -> np.ndarray:
    """ImageMagick's motion blur: a one-sided Gaussian kernel of 2 * radius + 1 pixels.

    Args:
      images: float32 [N, H, W, C].
      radius: in pixels.
      sigma: in pixels.
      angles: in radians, [N].
    """
    n, h, w = images.shape[:3]
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    down, right = (
        np.ceil(np.outer(steps, direction) - 0.5).astype(int)
        for direction in (np.sin(angles), np.cos(angles))
    )  # [steps, N]
    each = np.arange(n)[:, None, None]
    blurred = np.zeros_like(images)
    for step, weight in enumerate(weights):
        if weight > 1e-6:
            rows = np.clip(np.arange(h) + down[step][:, None], 0, h - 1)
            columns = np.clip(np.arange(w) + right[step][:, None], 0, w - 1)
            blurred += weight * images[each, rows[:, :, None], columns[:, None, :]]
    return blurred


def magnify(images: np.ndarray, factor: float) -> np.ndarray:
    """Enlarges the centre of the images to their full size, bilinearly."""
    for axis in (1, 2):
        matrix = _magnifier(images.shape[axis], factor)
        images = np.moveaxis(np.tensordot(matrix, images, (1, axis)), 0, axis)
    return images


def _magnifier(side: int, factor: float) -> np.ndarray:
    """[side, side]: interpolates as SciPy's zoom does, in the centre crop of side / factor."""
    crop = int(np.ceil(side / factor))
    size = round(crop * factor)
    start, trim = (side - crop) // 2, (size - side) // 2
    place = start + (np.arange(side) + trim) * (crop - 1) / max(size - 1, 1)
    below = np.clip(np.floor(place).astype(int), 0, side - 2)
    matrix = np.zeros((side, side), np.float32)
    matrix[np.arange(side), below] = 1 - (place - below)
    matrix[np.arange(side), below + 1] = place - below
    return matrix


def sample(images: np.ndarray, rows: np.ndarray, columns: np.ndarray, mode: str) -> np.ndarray:
    """Bilinear samples of the images at coordinates [N, h, w], in pixels.

    Args:
      images: float32 [N, H, W, C].
      rows: vertical coordinates.
      columns: horizontal coordinates.
      mode: "reflect" (about the outermost pixels' centres) or "symmetric" (about the edges).
    """
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    each, (h, w) = np.arange(len(images))[:, None, None], images.shape[1:3]

    def corner(i: int, j: int) -> np.ndarray:
        return images[each, _mirror(top + i, h, mode), _mirror(left + j, w, mode)]

    above = (1 - right) * corner(0, 0) + right * corner(0, 1)
    below = (1 - right) * corner(1, 0) + right * corner(1, 1)
    return ((1 - down) * above + down * below).astype(np.float32)


def _mirror(index: np.ndarray, size: int, mode: str) -> np.ndarray:
    """Reflects indices into [0, size)."""
    if mode == "symmetric":
        index = index % (2 * size)
        return np.minimum(index, 2 * size - 1 - index)
    index = index % (2 * size - 2)
    return np.minimum(index, 2 * size - 2 - index)


def plasma(rng: np.random.Generator, count: int, size: int, decay: float) -> np.ndarray:
    """Clouds by the diamond-square algorithm on a torus, each scaled to [0, 1].

    Args:
      rng: the random numbers.
      count: N.
      size: side, a power of two.
      decay: what the noise is divided by from each scale to the next finer one.

    Returns:
      float32 [N, size, size].
    """
    maps, wibble, step = np.zeros((count, size, size)), 100.0, size

    def middle(total: np.ndarray) -> np.ndarray:
        return total / 4 + wibble * rng.uniform(-wibble, wibble, total.shape)

    while step >= 2:
        half = step // 2
        corners = maps[:, ::step, ::step]
        total = corners + np.roll(corners, -1, 1)
        maps[:, half::step, half::step] = middle(total + np.roll(total, -1, 2))
        centres, corners = maps[:, half::step, half::step], maps[:, ::step, ::step]
        sideways = centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 2)
        upright = centres + np.roll(centres, 1, 2) + corners + np.roll(corners, -1, 1)
        maps[:, ::step, half::step] = middle(sideways)
        maps[:, half::step, ::step] = middle(upright)
        step, wibble = half, wibble / decay
    maps -= maps.min((1, 2), keepdims=True)
    return (maps / maps.max((1, 2), keepdims=True)).astype(np.float32)
