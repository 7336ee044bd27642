"""Prints how far the networks are from timm's: `python -m tests.parity.table [NAME ...]`.

Needs the extra `parity`. Exits with 1 where anything differs by more than the tolerance.
"""

import argparse
import gc
import re
import sys
import time
from pathlib import Path

import jax
import torch

from tests.parity import reference
from tests.parity.specimen import TOLERANCE, native, small
from xkd_jax.models import MODELS

_HEAD = """\
Largest differences between xkd_jax (JAX {jax}) and PyTorch {torch} (timm {timm}; for the CIFAR
family, networks of our own), in float32, with converted random weights. Each is relative to the
largest magnitude in the reference's tensor; of all blocks and layers the largest is shown.
"Training" is one pass in training mode: the running statistics after it.

| architecture | images | logits | worst tap | taps | training |
|---|---|---|---|---|---|"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks; all by default")
    parser.add_argument("--native", action="store_true", help="at their own image sizes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the table too")
    options = parser.parse_args()
    if unknown := set(options.names) - set(MODELS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    # Compiling would take most of the time.
    jax.config.update("jax_disable_most_optimizations", True)
    versions = {"timm": reference.timm.__version__, "torch": torch.__version__}
    rows, wrong = [_HEAD.format(**versions, jax=jax.__version__)], []
    print(rows[0])
    for name in options.names or MODELS:
        specimen = native(name) if options.native else small(name)
        start = time.monotonic()
        found = reference.compare(specimen)
        gc.collect()  # the largest hold gigabytes, in cycles
        worst = max(found.values())
        if not all(value < TOLERANCE for value in found.values()):
            wrong.append(name)
        seconds = time.monotonic() - start
        print(f"{name}: {worst:.1e} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        rows.append(_row(name, f"{specimen.size}x{specimen.size}", found))
        print(rows[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(rows) + "\n")
    if wrong:
        print(f"above {TOLERANCE}: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _row(name: str, images: str, found: dict[str, float]) -> str:
    taps = {key: value for key, value in found.items() if not key.startswith("train/")}
    training = {key: value for key, value in found.items() if key not in taps}
    logits = taps.pop("logits")
    worst = max(taps, key=taps.__getitem__)
    cells = [f"`{name}`", images, f"{logits:.1e}", f"`{worst}` {taps[worst]:.1e}"]
    cells += [_condense(taps, r"(?<=^block)\d+"), _condense(training, r"^train/(.*\.)?") or "-"]
    return f"| {' | '.join(cells)} |"


def _condense(found: dict[str, float], number: str) -> str:
    """The differences; the largest of those whose keys only differ in what matches `number`."""
    kinds: dict[str, float] = {}
    for key, value in found.items():
        kind = re.sub(number, "", key)
        kinds[kind] = max(value, kinds.get(kind, 0.0))
    return ", ".join(f"{kind} {value:.1e}" for kind, value in sorted(kinds.items()))


if __name__ == "__main__":
    sys.exit(main())
