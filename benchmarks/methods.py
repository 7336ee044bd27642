"""The cost of each method: step time and memory compared with plain training.

python benchmarks/methods.py [--pairs cnn vit deit] [--batch 64] [--calls 10] [--methods NAME ...]

The baseline is a step that runs the teacher but trains the student on the labels alone. Times are
the best of several calls, alternating with the baseline's; memory is XLA's plan for temporaries.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from xkd_jax.analysis.memory import temporaries
from xkd_jax.config import default_config
from xkd_jax.data import Split
from xkd_jax.errors import UserError
from xkd_jax.experiment import Experiment, create_experiment
from xkd_jax.methods import METHODS
from xkd_jax.methods.base import Method
from xkd_jax.train import Stepper, init_state

# Teacher and student of each pair, with their modules' arguments.
PAIRS = {
    "cnn": (("resnet56", {}), ("resnet20", {})),
    "vit": (("vit_tiny_patch4_32", {}), ("resnet18", {"stem": "cifar", "width": 0.5})),
    "deit": (
        ("vit_tiny_patch4_32", {}),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "patch_size": 4, "depth": 6}),
    ),
}

TAUGHT = [name for name, method in METHODS.items() if method.needs_teacher]


class TeacherOnly(Method):
    """The baseline: the teacher runs, but its outputs are unused."""

    needs_teacher = True


def make_experiment(method: Method, name: str, pair: str, batch: int) -> Experiment:
    """An experiment on 1024 random images of CIFAR's size."""
    config = default_config()
    config.batch_size, config.epochs = batch, 1
    config.method.name = name
    (teacher, teacher_args), (student, student_args) = PAIRS[pair]
    config.teacher.update(model=teacher, weights="random")
    config.student.model = student
    config.teacher.args, config.student.args = teacher_args, student_args
    config.data.update(name="fashion_mnist_mini", train="train[:1024]", eval="validation[:64]")
    config.image_size = 32
    experiment = create_experiment(config)
    images = np.random.default_rng(0).integers(0, 256, (1024, 32, 32, 3), np.uint8)
    split: Split = dataclasses.replace(experiment.train, images=images)
    distiller = dataclasses.replace(experiment.distiller, method=method)
    return dataclasses.replace(experiment, train=split, distiller=distiller)


def compile_step(experiment: Experiment) -> tuple[Callable[[], None], float]:
    """A function that runs one step to its end, and the MiB of the step's temporary arrays."""
    state = init_state(experiment)
    step_fn = Stepper(experiment, state, donate=False)
    batch = next(iter(step_fn.loader.batches(0)))
    mib = temporaries(step_fn.compiled) / 2**20
    return lambda: jax.block_until_ready(step_fn(state, batch)), mib


def best_times(steps: Sequence[Callable[[], None]], calls: int) -> list[float]:
    """Milliseconds of each step, alternating, so that other load affects all alike."""
    times = []
    for _ in range(calls):
        for step in steps:
            begun = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - begun))
    return [min(times[i :: len(steps)]) for i in range(len(steps))]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--methods", nargs="+", choices=TAUGHT, default=TAUGHT)
    options = parser.parse_args()
    print(f"{jax.default_backend()}, jax {jax.__version__}, batch {options.batch}", flush=True)
    for pair in options.pairs:
        (teacher, _), (student, _) = PAIRS[pair]
        limit, memory = compile_step(make_experiment(TeacherOnly(), "logits", pair, options.batch))
        print(f"\n| {teacher} -> {student} | ms | of the baseline | MiB | of the baseline |")
        print(f"| --- | ---: | ---: | ---: | ---: |\n| baseline | | 1 | {memory:.0f} | 1 |")
        for name in options.methods:
            try:
                experiment = make_experiment(METHODS[name], name, pair, options.batch)
            except UserError:
                continue  # the method doesn't support this pair
            step, mib = compile_step(experiment)
            ms, of_limit = best_times((step, limit), options.calls)
            row = f"{ms:.0f} | {ms / of_limit:.2f} | {mib:.0f} | {mib / memory:.2f}"
            print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
