"""Lists the networks: parameters, GFLOPs, the paper's GFLOPs, and intermediate outputs.

xkd-jax models
xkd-jax models 'resnet*' --max_gflops 5

One multiply-add is one FLOP, as in the paper's tables; each network is counted at its default
image size.
"""

import argparse
import fnmatch
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from xkd_jax.cli.command import Parser, guard
from xkd_jax.errors import UserError, unknown

_EXAMPLES = """\
examples:
  xkd-jax models
  xkd-jax models 'resnet*' vit_base_patch16_384 --taps
  xkd-jax models --kind cnn --max_params 5 --max_gflops 1 --sort gflops
  xkd-jax models 'vit*' 'swin*' --size 384 --min_params 80
"""
_FEW = 5  # networks, whose outputs are listed without --taps
# The options that leave out networks: the column that they compare with their value, and how.
_FILTERS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "kind": ("kind", operator.eq),
    "size": ("size", operator.eq),
    "min_params": ("params", operator.ge),
    "max_params": ("params", operator.le),
    "min_gflops": ("gflops", operator.ge),
    "max_gflops": ("gflops", operator.le),
}
# GFLOPs in the paper's tables, and the reason where they differ from ours by 5% or more.
_AT_384 = "paper: at 384"
_PAPER: dict[str, tuple[float, str]] = {
    "vit_base_patch16_224": (55.4, _AT_384),
    "vit_base_patch16_384": (55.4, ""),
    "vit_base_patch32_224": (13.8, _AT_384),
    "vit_base_patch32_384": (13.8, "reason unknown; its other ViTs agree with ours"),
    "vit_large_patch16_224": (190.7, _AT_384),
    "vit_large_patch16_384": (190.7, ""),
    "swin_large_patch4_window7_224": (103.9, _AT_384),
    "swin_large_patch4_window12_384": (103.9, ""),
    "resnet18": (1.9, ""),
    "resnet50": (4.1, ""),
    "resnet152": (11.0, ""),
    "resnet50x2": (15.9, ""),
    "resnet101x3": (205.0, "paper: at 384, it seems, where ours has 204"),
    "resnet152x2": (212.0, "paper: at 480, it seems, where ours has 210"),
    "mobilenetv2_100": (0.3, ""),
    "efficientnet_b0": (1.6, "paper: at 448, it seems, where ours has 1.6"),
    "legacy_xception_x2": (57.3, "paper: near 384, where ours has 55"),
}


def format_row(name: str, row: dict[str, Any], width: int, taps: bool) -> str:
    """A line for the network and, with `taps`, one for its taps.

    Args:
      name: the network's name.
      row: its counts, from `counts.describe`.
      width: of the column of names.
      taps: whether the taps are listed.
    """
    paper, note = _PAPER.get(name, ("", ""))
    columns = _columns(name, row)
    line = (
        f"{name:<{width}} {columns['size']:>4} {columns['params']:>8.2f} {columns['gflops']:>8.2f} "
        f"{paper:>7} {note}"
    ).rstrip()
    return f"{line}\n    {_format_taps(row['taps'])}" if taps else line


def _columns(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """What is listed, filtered and sorted: numbers as they are listed, rounded."""
    return {
        "name": name,
        "kind": row["kind"],
        "size": row["image_size"],
        "params": round(row["parameters"] / 1e6, 2),
        "gflops": round(row["gflops"], 2),
    }


def _format_taps(taps: dict[str, tuple[int, ...]]) -> str:
    """Groups keys of equal shape: a Transformer has four keys per block."""
    by_shape: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for key, shape in taps.items():
        # block01 ... block12 differ only in their number.
        kind = re.sub(r"\d+", "", key) if key.startswith("block") else key
        by_shape.setdefault((kind, shape), []).append(key)
    parts = []
    for (_, shape), keys in by_shape.items():
        span = keys[0] if len(keys) == 1 else f"{keys[0]}..{keys[-1]}"
        parts.append(f"{span} {'x'.join(map(str, shape))}")
    return ", ".join(parts)


def find(patterns: list[str]) -> list[str]:
    """The names that match any of `patterns`, without duplicates.

    Raises:
      UserError: a pattern matches nothing.
    """
    from xkd_jax.models import MODELS

    found: dict[str, None] = {}
    for pattern in patterns:
        names = fnmatch.filter(MODELS, pattern)
        if not names:
            inside = f"*{pattern.strip('*')}*"
            if fnmatch.filter(MODELS, inside):
                raise UserError(f"unknown network {pattern!r}; did you mean {inside!r}?")
            raise unknown("network", pattern, MODELS)
        found |= dict.fromkeys(names)
    return list(found)


def select(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> list[str]:
    """The names of the networks that pass the filters, in the order of `options.sort`.

    Args:
      rows: what `counts.describe` returns, by name.
      options: values of the options in `_FILTERS`, or None, and `sort`, a column or None.

    Raises:
      UserError: a filter leaves no network.
    """
    left = [_columns(name, row) for name, row in rows.items()]
    for option, (column, passes) in _FILTERS.items():
        value = getattr(options, option)
        if value is None:
            continue
        before = {row[column] for row in left}
        left = [row for row in left if passes(row[column], value)]
        if not left:
            raise UserError(
                f"no network passes --{option} {_text(value)}; {column} before this filter: "
                f"{_span(before)}."
            )
    if options.sort:
        left.sort(key=operator.itemgetter(options.sort))
    return [row["name"] for row in left]


def _span(values: set[Any]) -> str:
    """A few values one by one, many as a range."""
    ordered = [_text(value) for value in sorted(values)]
    return ", ".join(ordered) if len(ordered) <= 8 else f"{ordered[0]} to {ordered[-1]}"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parser() -> Parser:
    description = (
        "Lists networks: input size, parameters, multiply-adds, outputs. Detectors are listed in "
        "docs/detection.md."
    )
    parser = Parser("models", description, _EXAMPLES)
    parser.add_argument("names", nargs="*", default=["*"], help="names or patterns; default: all")
    parser.add_argument("--kind", choices=("cnn", "transformer"), help="only this kind")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="default side of the images")
    for option, unit in (("params", "millions of parameters"), ("gflops", "GFLOPs")):
        parser.add_argument(f"--min_{option}", type=float, metavar="N", help=f"at least N {unit}")
        parser.add_argument(f"--max_{option}", type=float, metavar="N", help=f"at most N {unit}")
    parser.add_argument("--sort", choices=("name", "params", "gflops"), help="default: by family")
    parser.add_argument("--taps", action="store_true",
                        help="list the outputs of each network, as is done for at most "
                        f"{_FEW} networks")  # fmt: skip
    return parser


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    options = _parser().parse_intermixed_args(argv)
    from xkd_jax.analysis.counts import describe  # `--help` needs no JAX

    rows = {name: describe(name) for name in find(options.names)}
    names = select(rows, options)
    width = max(34, *map(len, names))
    print(f"{'name':<{width}} size params/M   GFLOPs   paper")
    for name in names:
        print(format_row(name, rows[name], width, options.taps or len(names) <= _FEW))
    return 0
