"""Several steps in one program, and several seeds in one program: the time of a step of one seed.

python benchmarks/many.py [--config quickstart] [--method cakd] [--steps 8] [--seeds 5]

All programs take turns. Seeds are timed with images of their own and with the same images, which
the teacher then sees once.
"""

import argparse
import copy
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from xkd_jax.distributed import sharding
from xkd_jax.experiment import Experiment, create_experiment
from xkd_jax.seeds import SideBySide
from xkd_jax.train import Stepper, init_state


def load(recipe: str, method: str) -> Any:
    """The recipe's config for one method."""
    name, _, variant = recipe.partition(":")
    config = importlib.import_module(f"xkd_jax.configs.{name}").get_config(variant)
    config.compare, config.method.name, config.steps_per_dispatch = (), method, 1
    return config


def seeds_of(config: Any, count: int, data_seed: int) -> list[Experiment]:
    """Experiments with different seeds, on one device."""
    configs = []
    for seed in range(count):
        one = copy.deepcopy(config)
        one.seed, one.data.seed = seed, data_seed
        configs.append(one)
    first = create_experiment(configs[0], sharding.create_mesh(jax.devices()[:1]))
    return [first, *map(first.with_seed, configs[1:])]


def runner(step_fn: Stepper, state: Any) -> Callable[[], int]:
    """A function that runs the next dispatch to its end and returns its number of steps."""
    dispatches: Iterator[Any] = step_fn.dispatches(state, 0, lambda step: step + 10**6)

    def run() -> int:
        steps, _, metrics = next(dispatches)
        jax.block_until_ready(metrics)
        return len(steps)

    return run


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--config", default="quickstart", help="a recipe")
    parser.add_argument("--method", default="cakd")
    parser.add_argument("--steps", type=int, default=8, help="steps per dispatch; 1: leave it out")
    parser.add_argument("--seeds", type=int, default=5, help="1: leave them out")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    config = load(options.config, options.method)
    experiment = create_experiment(config)
    sizes = {"a step per dispatch": 1}
    if options.steps > 1:
        sizes[f"{options.steps} steps per dispatch"] = options.steps
    runs, seeds, compiled = {}, dict.fromkeys(sizes, 1), {}
    for name, size in sizes.items():
        state = init_state(experiment)
        begun = time.monotonic()
        runs[name] = runner(Stepper(experiment, state, size=size), state)
        compiled[name] = time.monotonic() - begun
    if options.seeds > 1:
        for images, data_seed in (("images of their own", -1), ("the same images", 0)):
            group = SideBySide(seeds_of(config, options.seeds, data_seed))
            name, state = f"{options.seeds} seeds, {images}", group.init()
            begun = time.monotonic()
            runs[name] = runner(group.compile(state), state)
            compiled[name], seeds[name] = time.monotonic() - begun, options.seeds
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            steps = run()
            times[name].append((time.perf_counter() - begun) / steps / seeds[name])
    device = jax.devices()[0].device_kind
    print(f"{options.config}, {options.method}, {device}, {options.rounds} rounds\n")
    print("| | ms per step and seed | of the first | compiling, s |\n| --- | ---: | ---: | ---: |")
    medians = {name: float(np.median(found[1:])) for name, found in times.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"| {name} | {1e3 * median:.1f} | {median / first:.2f} | {compiled[name]:.0f} |")


if __name__ == "__main__":
    main()
