"""Decoding and RandomResizedCrop against a torch DataLoader with Pillow, images/s per core.

python benchmarks/decode.py FOLDER [--size 224] [--images 200] [--rounds 5]

FOLDER contains JPEGs, at any depth. Both sides read the same files, draw the same crops and stack
batches of 50, alternating in one process with one thread. Times are the process's CPU times, which
depend little on other load. The DataLoader (torch, needs the extra `parity`) does the same as
torchvision's RandomResizedCrop on a Pillow image, and yields either uint8, as timm's prefetching
loader does, or the result of torchvision's ToTensor and Normalize. Ours yields uint8.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch.utils.data import DataLoader  # pyright: ignore[reportMissingImports]

from xkd_jax.augment.normalization import IMAGENET_MEAN, IMAGENET_STD
from xkd_jax.data.decode import decode_crop, eval_crop, random_box

BATCH = 50
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # the defaults of RandomResizedCrop
MEAN = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
STD = torch.tensor(IMAGENET_STD).view(3, 1, 1)


class Peer(torch.utils.data.Dataset):
    """Pillow, as torchvision's ImageFolder and RandomResizedCrop use it."""

    def __init__(self, paths: list[Path], size: int, normalise: bool):
        self.paths, self.size, self.normalise = paths, size, normalise

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        with open(self.paths[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        box = random_box(np.random.default_rng(index), *image.size, SCALE, RATIO)
        image = image.crop(box).resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div(255).sub_(MEAN).div_(STD) if self.normalise else pixels


def torch_loader(paths: list[Path], size: int, normalise: bool) -> None:
    """One pass."""
    for _ in DataLoader(Peer(paths, size, normalise), batch_size=BATCH):
        pass


def ours(paths: list[Path], size: int, crop: Callable) -> None:
    """One pass."""
    for start in range(0, len(paths), BATCH):
        indices = range(start, min(start + BATCH, len(paths)))
        np.stack([crop(paths[i].read_bytes(), np.random.default_rng(i), size) for i in indices])


def main() -> None:
    """Prints one line per side."""
    parser = argparse.ArgumentParser(description="Decoding against a torch DataLoader.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=224, help="side of the crops in pixels")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() == ".jpg")
    paths = paths[: options.images]
    if not paths:
        parser.error(f"there is no .jpg in {options.folder}")
    sizes = [Image.open(io.BytesIO(path.read_bytes())).size for path in paths]  # also a warm-up
    print(
        f"{len(paths)} JPEGs, median {statistics.median(w * h for w, h in sizes) / 1e6:.2f} "
        f"megapixels, crops of {options.size} pixels; median of {options.rounds} rounds"
    )
    sides: dict[str, Callable[[], None]] = {
        "torch DataLoader, Pillow, uint8": lambda: torch_loader(paths, options.size, False),
        "torch DataLoader, Pillow, ToTensor, Normalize": lambda: torch_loader(
            paths, options.size, True
        ),
        "ours, decode_crop": lambda: ours(paths, options.size, decode_crop),
        "ours, eval_crop": lambda: ours(
            paths, options.size, lambda image, rng, size: eval_crop(image, size)
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, run in sides.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    reference = seconds["torch DataLoader, Pillow, uint8"]
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(reference, found, strict=True)]
        rate = len(paths) / statistics.median(found)
        print(f"{name:48} {rate:5.0f} images/s/core, {statistics.median(ratios):.2f} x")


if __name__ == "__main__":
    main()
