"""How much compile time scanning over equal blocks saves, and what it costs.

python benchmarks/compile_time.py [--batch 2] [NAME ...]

For the gradient of each network in training mode, unrolled and scanned: seconds to trace and to
compile, seconds per call, and the gigabytes that XLA plans for temporaries.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp

from xkd_jax.models import MODELS, create_model, scan

NAMES = ("vit_large_patch32_224", "vit_large_patch16_224", "swin_large_patch4_window7_224")
CALLS = 3


def measure(name: str, batch: int, scanned: bool) -> list[str]:
    """Cells of the table: tracing, compiling, time per call, memory."""
    scan.pays = lambda depth, train: scanned and depth > 12
    model: Any = create_model(name, num_classes=1000)
    size = MODELS[name].image_size
    images = jnp.ones((batch, size, size, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01), shapes)

    def loss(params: Any) -> jax.Array:
        return jnp.mean(model.apply({"params": params}, images, train=True)[0])

    begun = time.monotonic()
    lowered = jax.jit(jax.grad(loss)).lower(params)
    traced = time.monotonic()
    compiled = lowered.compile()
    ready = time.monotonic()
    times = []
    for _ in range(CALLS):
        start = time.monotonic()
        jax.block_until_ready(compiled(params))
        times.append(time.monotonic() - start)
    memory: Any = compiled.memory_analysis()
    gigabytes = memory.temp_size_in_bytes / 1e9
    return [
        f"{traced - begun:.1f}",
        f"{ready - traced:.1f}",
        f"{min(times):.2f}",
        f"{gigabytes:.2f}",
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    print("| network | blocks | tracing, s | compiling, s | per call, s | temporaries, GB |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name in options.names:
        for scanned in (False, True):
            cells = [name, "scanned" if scanned else "unrolled"]
            cells += measure(name, options.batch, scanned)
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
