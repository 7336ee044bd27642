"""Networks against timm's in PyTorch: the forward pass, and forward and backward in training.

python benchmarks/networks.py [--batch 8] [--rounds 9] [--plain] [NAME ...]

Needs the extra `parity`. Both sides alternate in this process on the CPU, in float32, on the same
images, with the same number of threads; times are medians over the rounds. PyTorch is eager and is
timed with both memory layouts (except `CONTIGUOUS`); the ratio is against the faster one.
"Training" is cross-entropy, its gradient, and the running statistics.

`taskset -c 0 python benchmarks/networks.py` compares on one core, in CPU time, which depends little
on other load. `--plain` uses XLA's own convolutions throughout.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]
from torch_networks import import_timm

from xkd_jax import backend
from xkd_jax.models import MODELS, create_model

NAMES = (
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "resnet18",
    "resnet50",
    "mobilenetv2_100",
    "efficientnet_b0",
)
CORES = len(os.sched_getaffinity(0))
CLOCK = time.process_time if CORES == 1 else time.perf_counter
# PyTorch 2.13 crashes in channels_last, in the gradient of a 1x1 convolution of stride 2 of images.
CONTIGUOUS = ("repvgg_a0",)
PAUSE = 0.02  # seconds before each call, in which the other side's waiting threads go to sleep


def create_ours(name: str, images: np.ndarray) -> tuple[dict[str, Callable], float]:
    """Our compiled forward pass and gradient, and the seconds to compile them."""
    model: Any = create_model(name, num_classes=1000)
    labels = jnp.zeros(len(images), jnp.int32)
    options = {"xla_backend_optimization_level": 0}  # it runs once
    init = jax.jit(model.init, compiler_options=options)
    variables = init(jax.random.key(0), images)

    def loss(params: Any, rest: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        (logits, _), updates = model.apply(
            {"params": params, **rest}, images, train=True, mutable=["batch_stats"]
        )
        return -jnp.mean(
            jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        ), updates

    params = variables.pop("params")
    forward = jax.jit(lambda variables, images: model.apply(variables, images)[0])
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    images = jax.device_put(images)
    begun = time.monotonic()
    forward = forward.lower({"params": params, **variables}, images).compile()
    gradient = gradient.lower(params, variables, images).compile()
    seconds = time.monotonic() - begun
    return {
        "forward": lambda: jax.block_until_ready(forward({"params": params, **variables}, images)),
        "training": lambda: jax.block_until_ready(gradient(params, variables, images)),
    }, seconds


def create_theirs(name: str, images: np.ndarray, layout: Any) -> dict[str, Callable]:
    """timm's forward pass and gradient, with images and weights in the given memory layout."""
    model = import_timm().create_model(name).to(memory_format=layout)
    batch = torch.from_numpy(images.transpose(0, 3, 1, 2)).contiguous(memory_format=layout)
    labels = torch.zeros(len(images), dtype=torch.long)

    def forward() -> None:
        model.eval()
        with torch.inference_mode():
            model(batch)

    def training() -> None:
        model.train()
        model.zero_grad()
        F.cross_entropy(model(batch), labels).backward()

    return {"forward": forward, "training": training}


def measure(sides: dict[str, dict[str, Callable]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds by kind of call, then by side."""
    times: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds + 1):
        for side, calls in sides.items():
            for what, call in calls.items():
                time.sleep(PAUSE)
                begun = CLOCK()
                call()
                spent = 1e3 * (CLOCK() - begun)
                times.setdefault(what, {}).setdefault(side, []).append(spent)
    return {
        what: {side: statistics.median(spent[1:]) for side, spent in by_side.items()}
        for what, by_side in times.items()
    }


def row(name: str, batch: int, rounds: int) -> str:
    """One row of the table."""
    size = MODELS[name].image_size
    images = np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)
    ours, seconds = create_ours(name, images)
    sides = {"ours": ours}
    layouts = [torch.contiguous_format, torch.channels_last]
    for layout in layouts[:1] if name in CONTIGUOUS else layouts:
        sides[str(layout)] = create_theirs(name, images, layout)
    cells = [name]
    for times in measure(sides, rounds).values():
        mine = times.pop("ours")
        best = min(times.values())
        cells += [f"{mine:.0f}", f"{best:.0f}", f"{mine / best:.2f}"]
    return f"| {' | '.join(cells)} | {seconds:.0f} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(CORES)
    print(
        f"jax {jax.__version__}, torch {torch.__version__}, {CORES} core(s), "
        f"batch {options.batch}; milliseconds{' of CPU time' if CORES == 1 else ''}\n\n"
        "| network | forward | PyTorch | ratio | training | PyTorch | ratio | compiling, s |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    with backend.assume("tpu") if options.plain else contextlib.nullcontext():
        for name in options.names:
            print(row(name, options.batch, options.rounds), flush=True)


if __name__ == "__main__":
    main()
