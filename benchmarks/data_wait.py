"""The share of a training step spent waiting for its batch, resident and from the host.

python benchmarks/data_wait.py NAME [--split train] [--size 64] [--batch 32] [--steps 30]

NAME is a data set, such as folder:PATH, or tfds:cifar100 with --dir. A ResNet-18 trains on it with
both values of data.feed. The wait is the time from requesting a batch to receiving it, while the
previous step is still running, as in the training loop.
"""

import argparse
import time

import jax

from xkd_jax.config import default_config
from xkd_jax.experiment import create_experiment
from xkd_jax.train import Stepper, init_state

WARMUP = 3


def measure(feed_name: str, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds per step, and the share of them spent waiting."""
    config = default_config()
    config.data.update(name=options.name, dir=options.dir, feed=feed_name)
    config.data.train = config.data.eval = config.data.test = options.split
    config.image_size, config.batch_size, config.epochs = options.size, options.batch, 1000
    config.student.args = {"stem": "cifar"} if options.size <= 32 else {}
    config.data.workers = options.workers
    experiment = create_experiment(config)
    state = init_state(experiment)
    step_fn = Stepper(experiment, state)
    batches = step_fn.loader.batches(0)
    waited, begun, metrics = 0.0, 0.0, {}
    for step in range(options.steps + WARMUP):
        if step == WARMUP:
            jax.block_until_ready(metrics)
            waited, begun = 0.0, time.monotonic()
        asked = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - asked
        previous = metrics
        state, metrics = step_fn(state, batch)
        jax.block_until_ready(previous)  # the loop reads metrics one step late
    jax.block_until_ready(metrics)
    total = time.monotonic() - begun
    return total / options.steps, waited / total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--dir", default="")
    parser.add_argument("--split", default="train")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    print("| feed | ms per step | waiting |\n| --- | ---: | ---: |")
    for name in ("resident", "host"):
        seconds, share = measure(name, options)
        print(f"| {name} | {1e3 * seconds:.0f} | {100 * share:.1f}% |", flush=True)


if __name__ == "__main__":
    main()
