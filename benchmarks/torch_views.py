"""The views of a training step in PyTorch: crop, flip and the multi-view generator, batched."""

import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from xkd_jax.augment.multiview import MultiView


def crop_flip(images: torch.Tensor, padding: int, flip: bool) -> torch.Tensor:
    """Pads [N, H, W, C] with zeros, crops at random offsets, flips half of the images."""
    n, h, w, _ = images.shape
    rows = torch.arange(h) + torch.randint(2 * padding + 1, (n, 1))
    columns = torch.arange(w) + torch.randint(2 * padding + 1, (n, 1))
    if flip:
        columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def color_jitter(images: torch.Tensor, options: MultiView) -> torch.Tensor:
    """Brightness, contrast and saturation of [N, 3, H, W] images in [0, 1], a factor per image."""
    luma = torch.tensor([0.2989, 0.587, 0.114])[:, None, None]
    factors = []
    for strength in (options.brightness, options.contrast, options.saturation):
        low = max(0.0, 1 - strength)
        factors.append(low + (1 + strength - low) * torch.rand(len(images), 1, 1, 1))
    brightness, contrast, saturation = factors
    images = (brightness * images).clamp(0, 1)
    grey = (images.mean((2, 3), keepdim=True) * luma).sum(1, keepdim=True)
    images = torch.lerp(grey, images, contrast).clamp(0, 1)
    grey = (images * luma).sum(1, keepdim=True)
    return torch.lerp(grey, images, saturation).clamp(0, 1)


def random_geometry(images: torch.Tensor, options: MultiView) -> torch.Tensor:
    """A random crop of square [N, C, S, S] images, rotated and enlarged: one bilinear warp."""
    n, size = len(images), images.shape[-1]
    draws = torch.rand(4, n)
    angle = options.rotation * torch.pi / 180 * (2 * draws[0] - 1)
    scale = options.min_scale + (1 - options.min_scale) * draws[1]
    shift_y, shift_x = (1 - scale) * (2 * draws[2:] - 1) * (size - 1) / size
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos, sin, shift_x, -sin, cos, shift_y], dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, [n, 1, size, size], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def multi_view(images: torch.Tensor, options: MultiView) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's and the student's view of images [N, 3, H, W]; only half are transformed."""
    chosen = (torch.rand(len(images)) < 0.5).nonzero()[:, 0]
    original = images[chosen]
    both = torch.cat([original, color_jitter(original, options)], dim=1)
    teacher, student = random_geometry(both, options).chunk(2, dim=1)
    student = (student + options.noise * torch.randn_like(student)).clamp(0, 1)
    (n, _, h, w), side = student.shape, options.mask_patch
    masked = torch.rand(n, 1, -(-h // side), -(-w // side)) < options.mask_ratio
    masked = masked.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :h, :w]
    student = torch.where(masked, student.mean((2, 3), keepdim=True), student)
    return images.index_copy(0, chosen, teacher), images.index_copy(0, chosen, student)


def normalize(images: torch.Tensor, mean: tuple, std: tuple) -> torch.Tensor:
    """Subtracts each channel's mean from [N, 3, H, W] and divides by its standard deviation."""
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
