"""The cost of a training step, relative to one teacher forward plus one plain student step.

python benchmarks/step_time.py [--config configs/quickstart.py] [--steps 30]

Everything is compiled first; then the steps alternate, so that other load affects all alike.
"""

import argparse
import runpy
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from xkd_jax.experiment import Experiment, create_experiment
from xkd_jax.methods.base import apply
from xkd_jax.train import Stepper, init_state

METHODS = ("none", "logits", "cakd", "cakd+logits")


def create_step(experiment: Experiment) -> Callable[[], Any]:
    """A function that makes one training step and returns its metrics."""
    holder = [init_state(experiment)]
    step_fn = Stepper(experiment, holder[0])
    batch = next(iter(step_fn.loader.batches(0)))

    def step():
        holder[0], metrics = step_fn(holder[0], batch)
        return metrics

    return step


def create_teacher_forward(experiment: Experiment) -> Callable[[], Any]:
    """A function that runs the teacher on one batch and returns its logits."""
    model, variables = experiment.distiller.teacher, experiment.distiller.teacher_variables
    assert model
    shape = (experiment.config.batch_size, model.image_size, model.image_size, 3)
    images = jax.random.normal(jax.random.key(0), shape)
    forward = jax.jit(lambda v, x: apply(model.module, v, x, train=False)[0])
    return lambda: forward(variables, images)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The cost of a training step.")
    parser.add_argument("--config", default="configs/quickstart.py", help="a recipe")
    parser.add_argument("--steps", type=int, default=30, help="timed steps per method")
    arguments = parser.parse_args()
    config = runpy.run_path(arguments.config)["get_config"]()
    config.compare = ()
    functions = {}
    for method in METHODS:
        config.method.name = method
        experiment = create_experiment(config)
        functions[method] = create_step(experiment)
    functions["teacher forward"] = create_teacher_forward(experiment)
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in range(arguments.steps):
        for name, function in functions.items():
            begun = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - begun)
    milliseconds = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    baseline = milliseconds["teacher forward"] + milliseconds["none"]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {config.batch_size}")
    print("| | ms (median) | relative to the baseline |\n|---|---|---|")
    print(f"| baseline: teacher forward + plain student step | {baseline:.1f} | 1.00 |")
    for name, value in milliseconds.items():
        print(f"| {name} | {value:.1f} | {value / baseline:.2f} |")


if __name__ == "__main__":
    main()
