"""Regenerates the golden files: `python -m tests.parity.make_goldens [NAME ...]`.

Needs the extra `parity`. Without names it writes all networks' goldens; with names, only theirs.
"""

import argparse
import gc

import torch

from tests.parity import goldens, reference
from tests.parity.specimen import small
from xkd_jax.models import MODELS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks; all by default")
    names = parser.parse_args().names
    if unknown := set(names) - set(MODELS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # sums in the same order, the same files
    for family in sorted({goldens.family_of(name) for name in names or MODELS}):
        members = [name for name in MODELS if goldens.family_of(name) == family]
        exists = (goldens.FOLDER / f"{family}.npz").exists()
        old = goldens.read(family) if names and exists else {}
        kept = {name: old[name] for name in members if name in old and name not in names}
        made = {name: make(name) for name in members if not names or name in names}
        goldens.write(family, {**kept, **made})


def make(name: str) -> dict:
    """The golden of a network, as `goldens.read` returns it."""
    specimen = small(name)
    records = reference.theirs(specimen, reference.build(specimen))
    gc.collect()  # the largest hold gigabytes, in cycles
    print(f"{name}: {len(records)} taps", flush=True)
    return {
        "size": specimen.size,
        "batch": specimen.batch,
        "train_size": specimen.train_size,
        "train_batch": specimen.train_batch,
        "versions": {"timm": reference.timm.__version__, "torch": torch.__version__},
        "shapes": {key: list(array.shape) for key, array in records.items()},
        "sketches": {key: goldens.sketch(key, array) for key, array in records.items()},
    }


if __name__ == "__main__":
    main()
