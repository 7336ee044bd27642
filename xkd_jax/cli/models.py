"""Lists the networks: parameters, GFLOPs, intermediate outputs, and the paper's GFLOPs.

xkd-jax models
xkd-jax models 'resnet*' vit_base_patch16_384

One multiply-add is one FLOP, as in the paper's tables; each network is counted at its default
image size.
"""

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

from xkd_jax.cli.command import Parser, guard
from xkd_jax.errors import unknown

_EXAMPLES = """\
examples:
  xkd-jax models
  xkd-jax models 'resnet*' vit_base_patch16_384
"""
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


def describe(name: str) -> dict[str, Any]:
    """One network's entry in the list, with its default number of classes.

    Returns:
      `image_size`, `parameters`, `gflops` (multiply-adds), and `taps`: the shape of every entry of
      `out`, without the batch axis.
    """
    import jax  # `--help` needs no JAX
    import jax.numpy as jnp

    from xkd_jax.analysis.flops import count_flops, count_parameters
    from xkd_jax.models import MODELS

    size = MODELS[name].image_size
    model: Any = MODELS[name].network(**MODELS[name].args)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    taps: dict[str, tuple[int, ...]] = {}

    def forward(variables, images):
        logits, out = model.apply(variables, images)
        taps.update({k: tuple(v) if k == "grid" else v.shape[1:] for k, v in out.items()})
        return logits

    return {
        "image_size": size,
        "gflops": count_flops(forward, variables, images) / 1e9,
        "parameters": count_parameters(variables["params"]),
        "taps": taps,
    }


def format_row(name: str, row: dict[str, Any]) -> str:
    """A line for the network and one for its taps; `row` is what `describe` returns."""
    paper, note = _PAPER.get(name, ("", ""))
    line = (
        f"{name:<34} {row['image_size']:>4} {row['parameters'] / 1e6:>8.2f} "
        f"{row['gflops']:>8.2f} {paper:>7} {note}"
    )
    return f"{line.rstrip()}\n    {_format_taps(row['taps'])}"


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
            raise unknown("network", pattern, MODELS)
        found |= dict.fromkeys(names)
    return list(found)


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    description = "Lists networks: input size, parameters, multiply-adds, outputs."
    parser = Parser("models", description, _EXAMPLES)
    parser.add_argument("names", nargs="*", default=["*"], help="names or patterns; default: all")
    names = find(parser.parse_args(argv).names)
    print(f"{'name':<34} size params/M   GFLOPs   paper")
    for name in names:
        print(format_row(name, describe(name)), flush=True)
    return 0
