"""How long the library takes to start.

python benchmarks/startup.py [--deep]

Seconds until `import xkd_jax` and `--help` are done, and from the start of the quickstart's command
to the end of its first training step: with an empty compilation cache, then with a warm one. With
`--deep` also how long it takes to trace and to compile a plain training step of ViT-L/16.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from xkd_jax.reporting.files import METRICS, read_metrics

QUICKSTART = ("-m", "xkd_jax.main", "--config", "quickstart", "--config.log_every=1")


def wait(*arguments: str) -> float:
    """The seconds that a command of Python's takes."""
    begun = time.monotonic()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def first_step(cache: str, method: str) -> float:
    """The seconds until the first step of the quickstart's networks is reported."""
    with tempfile.TemporaryDirectory() as folder:
        run = "--config.compare=()", f"--config.method.name={method}", f"--workdir={folder}/run"
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *QUICKSTART, *run],
            env=os.environ | {"XDG_CACHE_HOME": cache},
            stderr=subprocess.DEVNULL,
        )
        path = Path(folder) / "run"
        while process.poll() is None:
            if (path / METRICS).exists() and read_metrics(path):
                break
            time.sleep(0.02)
        seconds = time.monotonic() - begun
        process.kill()
        process.wait()
    return seconds


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--deep", action="store_true", help="also compile a step of ViT-L/16")
    options = parser.parse_args()
    print("| | s |\n| --- | ---: |")
    print(f"| `import xkd_jax` | {wait('-c', 'import xkd_jax'):.2f} |")
    print(f"| `xkd-jax train --help` | {wait('-m', 'xkd_jax.main', '--help'):.2f} |", flush=True)
    for method in ("none", "cakd"):
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("cold", "warm"):
                print(f"| first step of `{method}`, {kind} | {first_step(cache, method):.1f} |")
                sys.stdout.flush()
    if options.deep:
        print(f"| compiling a plain step of ViT-L/16 | {compile_deep():.1f} |")


def compile_deep() -> float:
    """The seconds for tracing and compiling a plain training step of ViT-L/16, batch 8."""
    from xkd_jax.configs import speed
    from xkd_jax.experiment import create_experiment
    from xkd_jax.train import compile_step

    config = speed.get_config("vit_s16-resnet18")
    config.compare, config.method.name = (), "none"
    config.student.model = "vit_large_patch16_224"
    experiment = create_experiment(config)
    resident = experiment.create_loader().arrays
    begun = time.monotonic()
    compile_step(experiment, experiment.distiller.state_shapes, {}, resident)
    return time.monotonic() - begun


if __name__ == "__main__":
    main()
