"""The cost of checkpoints: how long a save blocks training, and the steps while it is written.

python benchmarks/checkpoint.py [--student resnet50] [--teacher vit_base_patch16_224] [--size 224]
                                [--batch 64] [--steps 20] [--saves 10]

A Transformer with random weights teaches a CNN with cakd on the packaged images, scaled up. The
benchmark waits for every step, and compares the steps after a save with the median of the others.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from xkd_jax.checkpoint import Checkpoints
from xkd_jax.config import default_config
from xkd_jax.experiment import Experiment, create_experiment
from xkd_jax.train import Stepper, init_state

WARMUP = 3


def create(options: argparse.Namespace) -> Experiment:
    """The experiment that is timed."""
    config = default_config()
    config.method.name, config.batch_size, config.image_size = "cakd", options.batch, options.size
    config.student.model, config.teacher.model = options.student, options.teacher
    config.teacher.weights, config.data.name = "random", "fashion_mnist_mini"
    config.teacher.args = {"img_size": options.size}
    config.data.eval = config.data.test = "validation"
    config.optimizer.clip_norm = 2.0
    return create_experiment(config)


def measure(
    experiment: Experiment, options: argparse.Namespace, folder: Path
) -> dict[str, list[float]]:
    """Seconds of steps, of the steps that follow a save, and of what `save` takes to return."""
    state = init_state(experiment)
    step_fn = Stepper(experiment, state)
    assert experiment.distiller.teacher
    checkpoints = Checkpoints(folder, 2, experiment.distiller.teacher.fingerprint)
    seconds: dict[str, list[float]] = {"step": [], "step after a save": [], "save": []}
    kind, last = "step", WARMUP + options.steps * (options.saves + 1)
    for step, batch in zip(range(1, last), step_fn.loader.batches(0), strict=False):
        begun = time.perf_counter()
        state, metrics = step_fn(state, batch)
        jax.block_until_ready((state, metrics))
        if step > WARMUP:
            seconds[kind].append(time.perf_counter() - begun)
        kind = "step"
        if step % options.steps == 0:
            begun = time.perf_counter()
            checkpoints.save(step, state)
            seconds["save"].append(time.perf_counter() - begun)
            kind = "step after a save"
    checkpoints.close()
    seconds["save"].pop(0)  # it compiles
    print(f"state: {_bytes(state) / 1e6:.0f} MB")
    return seconds


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="resnet50")
    parser.add_argument("--teacher", default="vit_base_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="steps between saves")
    parser.add_argument("--saves", type=int, default=10)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {options.batch}")
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(create(options), options, Path(folder))
    plain = statistics.median(seconds["step"])
    print("| | median, ms | worst, ms | median, steps |\n| --- | ---: | ---: | ---: |")
    for name, values in seconds.items():
        median, worst = statistics.median(values), max(values)
        print(f"| {name} | {1e3 * median:.1f} | {1e3 * worst:.1f} | {median / plain:.2f} |")


if __name__ == "__main__":
    main()
