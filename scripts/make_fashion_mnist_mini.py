"""Extracts the packaged subset `fashion_mnist_mini` from the Fashion-MNIST idx files.

The images of a split are stored class by class, each image transposed, as raw bytes in one .xz
file. This is the smallest lossless format that Python or Pillow can read (bytes per image, on the
test images: xz 357, xz without the transpose 374, WebP 377, bzip2 380, PNG 393, AVIF 525).
"""

import argparse
import json
import lzma
from pathlib import Path

import numpy as np

from xkd_jax.data import idx

PREFIX = "fashion_mnist_mini"
MAX_BYTES = 4_900_000
XZ_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}
]
LICENSE = """\
The images and labels of fashion_mnist_mini are a subset of Fashion-MNIST,
https://github.com/zalandoresearch/fashion-mnist

The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in
all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


def balanced_indices(
    labels: np.ndarray, sizes: list[int], rng: np.random.Generator
) -> list[np.ndarray]:
    """Draws disjoint class-balanced index sets, one per entry of `sizes`.

    Args:
      labels: [n] integers 0..C-1.
      sizes: the total number of images of each set; multiples of C.
      rng: draws the images.

    Returns:
      One array [C, size / C] per set: row c contains the indices of class c, ascending.
    """
    num_classes = int(labels.max()) + 1
    rows: list[list[np.ndarray]] = [[] for _ in sizes]
    for c in range(num_classes):
        drawn = rng.permutation(np.flatnonzero(labels == c))
        start = 0
        for row, size in zip(rows, sizes, strict=True):
            stop = start + size // num_classes
            if stop > len(drawn):
                raise ValueError(f"class {c} has only {len(drawn)} images, but {stop} are needed")
            row.append(np.sort(drawn[start:stop]))
            start = stop
    return [np.stack(row) for row in rows]


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: apt-get install dataset-fashion-mnist && python scripts/"
        "make_fashion_mnist_mini.py --source /usr/share/datasets/fashion-mnist",
    )
    parser.add_argument("--source", required=True, help="folder with the four Fashion-MNIST files")
    parser.add_argument("--out", default="xkd_jax/assets", help="folder to write to")
    parser.add_argument("--train", type=int, default=2000, help="training images")
    parser.add_argument("--validation", type=int, default=2000, help="validation images")
    parser.add_argument("--test", type=int, default=9600, help="test images (at most 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed for drawing the images")
    return parser.parse_args()


def main() -> None:
    """Writes the assets and prints their sizes."""
    args = parse_args()
    source, out = Path(args.source), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    train_images, train_labels = idx.read_pair(source, "train")
    test_images, test_labels = idx.read_pair(source, "test")
    rng = np.random.default_rng(args.seed)
    train, validation = balanced_indices(train_labels, [args.train, args.validation], rng)
    (test,) = balanced_indices(test_labels, [args.test], rng)

    splits = {
        "train": (train_images, train),
        "validation": (train_images, validation),
        "test": (test_images, test),
    }
    for name, (images, indices) in splits.items():
        raw = images[indices.ravel()].transpose(0, 2, 1).tobytes()
        packed = lzma.compress(raw, format=lzma.FORMAT_XZ, filters=XZ_FILTERS)
        (out / f"{PREFIX}_{name}.xz").write_bytes(packed)
    np.savez_compressed(
        out / f"{PREFIX}_indices.npz",
        allow_pickle=False,
        **{name: indices.astype(np.uint16) for name, (_, indices) in splits.items()},
    )
    metadata = {
        "source": "Fashion-MNIST, https://github.com/zalandoresearch/fashion-mnist",
        "license": "MIT, Copyright (c) 2017 Zalando SE",
        "command": "python scripts/make_fashion_mnist_mini.py",
        "seed": args.seed,
        "class_names": idx.FASHION_CLASSES,
        "height": 28,
        "width": 28,
        "splits": {
            "train": {"images": args.train, "from": "train-images-idx3-ubyte"},
            "validation": {"images": args.validation, "from": "train-images-idx3-ubyte"},
            "test": {"images": args.test, "from": "t10k-images-idx3-ubyte"},
        },
        "layout": "images: [class, image, x, y] uint8; indices: [class, image] into the files",
    }
    (out / f"{PREFIX}.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (out / f"{PREFIX}.LICENSE").write_text(LICENSE)

    files = sorted(out.glob(f"{PREFIX}*"))
    for path in files:
        print(f"{path.stat().st_size:>9,}  {path}")
    total = sum(path.stat().st_size for path in files)
    print(f"{total:>9,}  in total, of {MAX_BYTES:,} allowed")
    if total > MAX_BYTES:
        raise SystemExit("the subset is too big; draw fewer images with --test")


if __name__ == "__main__":
    main()
