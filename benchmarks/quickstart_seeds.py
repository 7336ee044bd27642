"""The quickstart over several seeds: means and standard deviations of its scores.

python benchmarks/quickstart_seeds.py --seeds 5 --out runs/seeds
python benchmarks/quickstart_seeds.py --recipe configs/quickstart.py:control --out runs/control

Unknown arguments are passed on to `xkd_jax.main`. Finished seeds are not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

SCORES = {"top1": "top-1 %", "noisy_top1": "noisy top-1 %"}


def run_seed(
    recipe: str, seed: int, out: Path, overrides: list[str]
) -> dict[str, dict[str, float]]:
    """Runs one seed; returns the scores by method."""
    folder = out / f"seed{seed}"
    command = [sys.executable, "-m", "xkd_jax.main", "--config", recipe]
    command += ["--workdir", str(folder), f"--config.seed={seed}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    scores = {}
    for path in folder.glob("*/summary.json"):
        summary = json.loads(path.read_text())
        validation = [
            line["eval_top1"]
            for line in map(json.loads, (path.parent / "metrics.jsonl").open())
            if "eval_top1" in line
        ]
        scores[summary["method"]] = summary["student"] | {"validation": validation[-1]}
    return scores


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The quickstart over several seeds.")
    parser.add_argument("--recipe", default="configs/quickstart.py", help="the recipe to run")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"), help="folder for the runs")
    arguments, overrides = parser.parse_known_args()
    seeds = [
        run_seed(arguments.recipe, seed, arguments.out, overrides)
        for seed in range(arguments.seeds)
    ]
    columns = {"validation": "validation top-1 %"} | SCORES
    print(f"\n| method | {' | '.join(columns.values())} | test gain over `none` |")
    print(f"|---|{'---|' * (len(columns) + 1)}")
    for method in seeds[0]:
        cells = [_spread([seed[method][key] for seed in seeds]) for key in columns]
        # Gains are paired by seed: both runs share data order, crops and initial student.
        gains = [seed[method]["top1"] - seed["none"]["top1"] for seed in seeds if "none" in seed]
        cells.append(_spread(gains, sign="+") if gains and method != "none" else "")
        print(f"| `{method}` | {' | '.join(cells)} |")


def _spread(values: list[float], sign: str = "") -> str:
    mean = f"{100 * statistics.mean(values):{sign}.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
