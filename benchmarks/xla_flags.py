"""What XLA's options for a CPU do to a training step.

python benchmarks/xla_flags.py [--config quickstart] [--method cakd] [--rounds 3] [FLAGS ...]

Every set of options runs in a process of its own, all in turn. Without FLAGS those of `TRIED` run.
The loss after the same steps shows whether an option changes more than the time.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from xkd_jax.reporting.document import format_markdown

TRIED = (
    "--xla_cpu_use_xnnpack=false",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_prefer_vector_width=512",
    "--xla_cpu_enable_concurrency_optimized_scheduler=true",
    "--xla_cpu_enable_fast_math=true",
    "--xla_cpu_opt_preset=FAST_RUNTIME",
    "--xla_cpu_experimental_xnn_fusion_type=dot",
    "--xla_cpu_experimental_xnn_fusion_type=dot,eltwise,reduce",
    "--xla_cpu_experimental_xnn_graph_fusion_mode=XNN_GRAPH_FUSION_MODE_GREEDY",
    "--xla_cpu_experimental_ynn_fusion_type=dot",
    "--xla_cpu_experimental_ynn_fusion_type=dot,convolution",
    "--xla_cpu_use_onednn=true",
    "--xla_cpu_experimental_onednn_custom_call=true",
    "--xla_cpu_experimental_onednn_fusion_type=dot",
)
WARMUP = 3


def measure(recipe: str, method: str, steps: int) -> dict[str, float]:
    """Seconds of a step, its compilation, and the loss after `steps`, in this process."""
    import jax  # with the flags of this process: the parent needs no JAX

    from xkd_jax.bench.parts import whole_step
    from xkd_jax.config import for_method
    from xkd_jax.experiment import create_experiment

    name, _, variant = recipe.partition(":")
    config = importlib.import_module(f"xkd_jax.configs.{name}").get_config(variant)
    program = whole_step(create_experiment(for_method(config, method)))
    seconds, metrics = [], {}
    for _ in range(WARMUP + steps):
        begun = time.perf_counter()
        metrics = jax.block_until_ready(program.run())
        seconds.append(time.perf_counter() - begun)
    return {
        "seconds": statistics.median(seconds[WARMUP:]),
        "compile_seconds": program.compile_seconds,
        "loss": float(metrics["loss"]),
    }


def measure_in_process(flags: str, options: argparse.Namespace) -> dict[str, float] | str:
    """`measure` in a process with XLA's `flags`; or the last line of its error."""
    command = [sys.executable, __file__, "--child", "--config", options.config]
    command += ["--method", options.method, "--steps", str(options.steps)]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return lines[-1][:80]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("flags", nargs="*", default=TRIED)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--method", default="cakd")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.config, options.method, options.steps)))
        return
    found: dict[str, list[Any]] = {flags: [] for flags in ("", *options.flags)}
    for _ in range(options.rounds):
        for flags, results in found.items():
            if not any(isinstance(result, str) for result in results):
                results.append(measure_in_process(flags, options))
    print(
        format_markdown(
            [("XLA_FLAGS", "ms", "of the default's", "compile s", "loss"), *rows(found)]
        )
    )


def rows(found: dict[str, list[Any]]) -> list[tuple[str, ...]]:
    """The cells of the table, from what `measure_in_process` returned for each set of flags."""

    def median(flags: str, name: str) -> float:
        return statistics.median(result[name] for result in found[flags])

    lines = []
    for flags, results in found.items():
        if isinstance(results[-1], str):
            lines.append((flags, results[-1], "", "", ""))
            continue
        seconds = median(flags, "seconds")
        lines.append(
            (
                flags or "default",
                f"{1e3 * seconds:.1f}",
                f"{seconds / median('', 'seconds'):.2f}",
                f"{median(flags, 'compile_seconds'):.1f}",
                f"{results[-1]['loss']:.5f}",
            )
        )
    return lines


if __name__ == "__main__":
    main()
