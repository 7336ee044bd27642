"""The cost of each augmentation alone in a compiled function, in milliseconds per batch.

python benchmarks/views.py [--batch 64] [--sizes 32 224]

Times are the best of several calls. Inside a training step XLA fuses neighbouring operations, which
costs less.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from xkd_jax.augment import corruptions, mixup, multiview, ops, policies

VIEWS: dict[str, Callable[[jax.Array, jax.Array], jax.Array | tuple[jax.Array, ...]]] = {
    "crop and flip": lambda k, x: ops.random_crop_flip(k, x, 4, True),
    "rotation and crop, bilinear": lambda k, x: ops.random_geometry(k, x, 15.0, 0.8),
    "colour jitter": lambda k, x: ops.color_jitter(k, x, 0.4, 0.4, 0.4),
    "colour jitter with hue": lambda k, x: ops.color_jitter(k, x, 0.4, 0.4, 0.4, 0.1),
    "Gaussian noise": lambda k, x: ops.gaussian_noise(k, x, 0.1),
    "patch-wise mask": lambda k, x: ops.patch_mask(k, x, x.shape[1] // 8, 0.25),
    "multi-view generator": lambda k, x: multiview.multi_view(k, x, multiview.MultiView()),
    "Gaussian blur": lambda k, x: policies.random_blur(k, x, 0.5, 2.0),
    "RandAugment, 2 operations": lambda k, x: policies.rand_augment(k, x, 2, 9),
    "TrivialAugment": policies.trivial_augment,
    "random erasing": lambda k, x: policies.random_erasing(k, x, 0.25),
    "mixup": lambda k, x: mixup.mix(k, x, jnp.eye(len(x)), 0.8, 0.0),
    "CutMix": lambda k, x: mixup.mix(k, x, jnp.eye(len(x)), 0.0, 1.0),
    "evaluation noise": corruptions.noisy,
    "resize and crop of evaluation": lambda _, x: ops.resize_crop(x, x.shape[1]),
    "normalisation": lambda _, x: ops.normalize(x, (0.5,) * 3, (0.25,) * 3),
}


def milliseconds(view: Callable, size: int, batch: int, calls: int) -> float:
    """The fastest of several calls on random images."""
    images = jax.random.randint(jax.random.key(0), (batch, size, size, 3), 0, 256) / 255
    compiled = jax.jit(view).lower(jax.random.key(1), images).compile()
    times = []
    for _ in range(calls + 1):  # the first one warms up
        begun = time.perf_counter()
        jax.block_until_ready(compiled(jax.random.key(1), images))
        times.append(time.perf_counter() - begun)
    return 1e3 * min(times[1:])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The cost of each augmentation.")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224], help="sides in pixels")
    parser.add_argument("--calls", type=int, default=7)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {options.batch}, ms")
    print(f"| view | {' | '.join(f'{size} px' for size in options.sizes)} |")
    print(f"| --- |{' ---: |' * len(options.sizes)}")
    for name, view in VIEWS.items():
        cells = [
            f"{milliseconds(view, size, options.batch, options.calls):.2f}"
            for size in options.sizes
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
