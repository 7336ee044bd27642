"""What is to be measured on a GPU that is at hand for a few minutes at a time.

python benchmarks/gpu_campaign.py --out DIR --data DIR [--minutes 9] [--needs] [--smoke]

Runs the steps of `campaign` in order, each as a process of its own: a smoke test of every method,
training steps against their limit and against PyTorch, then the published column of CIFAR-100 and
Transformers that teach CNNs. At the deadline the running step is told to stop, and saves a
checkpoint if it trains. The same command goes on from there: DIR/campaign.json says what is done,
DIR/STEP.log what each step has printed. A step that failed is tried again by the next call, after
the others. `--needs` only prints what the machine must have; `--smoke` runs tiny forms of the
steps, on a CPU too, in about three minutes.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "jax", "flax", "optax", "orbax.checkpoint", "ml_collections", "absl", "safetensors", "tqdm",
    "tensorboardX", "tensorflow_datasets", "array_record", "grain", "torch", "timm",
)  # fmt: skip
# Pair and batch sizes.
PAIRS = {"vit_b16-resnet50": (128, 256), "swin_b-resnet50": (128,), "vit_s4-resnet18": (512,)}
RECORD = "campaign.json"
GRACE = 60  # seconds for a checkpoint


@dataclasses.dataclass(frozen=True)
class Step:
    """A command, as arguments of Python; `least` is how many seconds must be left to start it."""

    name: str
    arguments: tuple[str, ...]
    least: float = 30.0


def campaign(data: str, smoke: bool) -> list[Step]:
    """All steps, in order."""
    main, sweep, bench = (
        ("-m", f"xkd_jax.{verb}", "--config") for verb in ("main", "sweep", "bench")
    )
    peer = str(ROOT / "benchmarks" / "torch_peer.py"), "--config"
    # Every method, for as many epochs as the longest warm-up takes.
    few = ("--config.epochs=6", *(f"--config.method.{m}.first_epochs=1" for m in ("ab", "ft")))
    first = ("quickstart:smoke",) if smoke else ("quickstart:methods", *few)
    steps = [Step("first_light", (*main, *first, "--workdir", "first_light"))]
    for pair, batches in {"smoke": (8,)}.items() if smoke else PAIRS.items():
        for batch in batches:
            fields = f"speed:{pair}", f"--config.batch_size={batch}"
            steps_of = ("--steps", "2") if smoke else ("--steps", "30", "--compile")
            rounds = ("--rounds", "2") if smoke else ()
            result = f"bench_{pair}_{batch}"
            steps += [
                Step(result, (*bench, *fields, *rounds, "--json", f"{result}.json"), least=90),
                Step(f"peer_{pair}_{batch}", (*peer, *fields, *steps_of), least=120),
            ]
    if smoke:
        return [*steps, Step("table1", (*sweep, "tables/table1:smoke", "--workdir", "table1"))]
    at = f"--config.data.dir={data}"
    for teacher, student in (("resnet56", "resnet20"), ("resnet32x4", "resnet8x4")):
        # In the default run folders, where the tables look for teachers.
        file = f"runs/cifar100_published_{teacher}/student.safetensors"
        fields = f"cifar100_published:{student}", at, f"--config.teacher.weights={file}"
        steps += [
            Step(f"teacher_{teacher}", (*main, f"cifar100_published:{teacher}", at)),
            Step(f"published_{student}", (*main, *fields)),
        ]
    teachers = {"teacher_vit": "teacher_cifar100_32", "teacher_swin": "teacher_cifar100_32:swin"}
    steps += [Step(name, (*main, recipe, at)) for name, recipe in teachers.items()]
    for table in ("table3", "table1"):
        steps.append(Step(table, (*sweep, f"tables/{table}:gpu", at, "--workdir", table)))
    return steps


def run(step: Step, out: Path, seconds: float) -> str:
    """Runs a step for at most `seconds`: "done", "interrupted" or "failed"."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with (out / f"{step.name}.log").open("a") as log:
        log.write(f"$ python {' '.join(step.arguments)}\n")
        log.flush()
        process = subprocess.Popen(
            [sys.executable, *step.arguments],
            cwd=out, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            return "failed" if process.wait(seconds) else "done"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return "interrupted"


def is_missing(package: str) -> bool:
    """Whether this Python lacks a package."""
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:  # the package that it is in
        return True


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="", help="folder of TFDS with cifar100")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--needs", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.needs:
        print("packages:", ", ".join(PACKAGES))
        print("missing here:", ", ".join(filter(is_missing, PACKAGES)) or "none")
        print("data: a folder of TFDS that has cifar100, as array_record or tfrecord")
        return
    deadline = time.monotonic() + 60 * options.minutes
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = str(Path(options.data).resolve()) if options.data else ""
    record = out / RECORD
    states: dict[str, dict[str, Any]] = json.loads(record.read_text()) if record.exists() else {}
    steps = campaign(data, options.smoke)
    # Failures last: one that fails again must not keep the others from running.
    steps.sort(key=lambda step: states.get(step.name, {}).get("state") == "failed")
    for step in steps:
        state = states.setdefault(step.name, {"state": "", "seconds": 0.0})
        left = deadline - time.monotonic()
        if state["state"] == "done" or left < step.least:
            continue
        begun = time.monotonic()
        state["state"] = run(step, out, left)
        state["seconds"] = round(state["seconds"] + time.monotonic() - begun, 1)
        record.write_text(json.dumps(states, indent=2) + "\n")
        print(f"{step.name}: {state['state']}, {state['seconds']:.0f} s in all", flush=True)
    waiting = [step.name for step in steps if states[step.name]["state"] != "done"]
    print("not done:", ", ".join(waiting) or "nothing")


if __name__ == "__main__":
    main()
