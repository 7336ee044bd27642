"""The cost of a training step with the teacher's cache, relative to plain training.

python benchmarks/cached_step.py [--config configs/quickstart.py] [--config.FIELD=VALUE ...]
  [--methods logits cakd] [--steps 20] [--views 1] [--cache FOLDER]

Each method runs with the same fixed views, with and without the cache. Everything is compiled and
cached first; then all variants take one step in turn, so that other load affects them alike.
The time of a step includes waiting for its batch.
"""

import argparse
import ast
import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from xkd_jax.config import Config
from xkd_jax.experiment import create_experiment
from xkd_jax.train import Stepper, init_state


def create_step(config: Config, method: str, cache: str) -> Callable[[], Any]:
    """A function that takes one training step on the next batch and returns its metrics."""
    config.method.name, config.teacher.cache = method, cache
    experiment = create_experiment(config)
    holder = [init_state(experiment)]
    step_fn = Stepper(experiment, holder[0])
    batches = step_fn.loader.batches(0)

    def step():
        holder[0], metrics = step_fn(holder[0], next(batches))
        return metrics

    return step


def load_config(path: str, overrides: Sequence[str]) -> Config:
    """The recipe at `path` with overrides such as --config.batch_size=32."""
    config = runpy.run_path(path)["get_config"]()
    config.compare = ()
    for override in overrides:
        name, _, text = override.removeprefix("--config.").partition("=")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text  # a word
        config.update_from_flattened_dict({name: value})
    return config


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The cost of a step with a teacher's cache.")
    parser.add_argument("--config", default="configs/quickstart.py", help="a recipe")
    parser.add_argument("--methods", nargs="+", default=["logits", "cakd"])
    parser.add_argument("--steps", type=int, default=20, help="timed steps per variant")
    parser.add_argument("--views", type=int, default=1, help="fixed views of each image")
    parser.add_argument("--cache", default="", help="the cache's folder; default: a temporary one")
    arguments, overrides = parser.parse_known_args()
    config = load_config(arguments.config, overrides)
    config.teacher.cache_views = arguments.views
    with tempfile.TemporaryDirectory() as temporary:
        cache = arguments.cache or temporary
        steps = {"none": create_step(config, "none", "")}
        for method in arguments.methods:
            steps[method] = create_step(config, method, "")
            steps[f"{method}, cached"] = create_step(config, method, cache)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(arguments.steps + 2):  # the first two warm up
            for name, step in steps.items():
                begun = time.perf_counter()
                jax.block_until_ready(step())
                if number >= 2:
                    seconds[name].append(time.perf_counter() - begun)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {config.batch_size}")
    print("| | ms (median) | relative to none |\n|---|---|---|")
    plain = statistics.median(seconds["none"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"| {name} | {1e3 * median:.1f} | {median / plain:.2f} |")


if __name__ == "__main__":
    main()
