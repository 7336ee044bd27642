"""Counts the networks for `xkd-jax models`, and writes xkd_jax/assets/networks.json.xz.

Without names it counts all networks; with names it counts those, and keeps the other entries.
"""

import argparse
from pathlib import Path

from xkd_jax.analysis import counts
from xkd_jax.models import MODELS


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks; all by default")
    parser.add_argument("--out", type=Path, default=counts.PATH, help="the file to write")
    options = parser.parse_args()
    if unknown := set(options.names) - set(MODELS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    old = counts.read() if options.names else {}
    entries = {}
    for name, variant in MODELS.items():
        if name in options.names or not options.names:
            entries[name] = {"fingerprint": counts.fingerprint(variant), **counts.count(variant)}
            print(name, flush=True)
        elif name in old:
            entries[name] = old[name]
    counts.write(entries, options.out)


if __name__ == "__main__":
    main()
