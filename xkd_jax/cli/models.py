"""Lists the networks: parameters, GFLOPs, taps, and the GFLOPs that the paper prints.

python -m xkd_jax.models
python -m xkd_jax.models 'resnet*' vit_base_patch16_384

One multiply-add is one FLOP, as in the paper's tables; sizes are the networks' own.
"""

import argparse
import fnmatch
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp

from xkd_jax import errors
from xkd_jax.analysis.flops import count_flops, count_parameters
from xkd_jax.models import MODELS

# The GFLOPs that the paper's tables print, and why ours differ where they do by 5% or more.
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
    """What the list says of one network, with its default number of classes.

    Returns:
      `image_size`, `parameters`, `gflops` (multiply-adds), and `taps`, shapes by the keys of
      `out`, without the batch axis.
    """
    size = MODELS[name].image_size
    model: Any = MODELS[name].network(**MODELS[name].args)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    taps: dict[str, tuple[int, ...]] = {}

    def forward(variables: Any, images: jax.Array) -> jax.Array:
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
    """One line of the list, and one of taps; `row` is what `describe` returns."""
    paper, note = _PAPER.get(name, ("", ""))
    line = (
        f"{name:<34} {row['image_size']:>4} {row['parameters'] / 1e6:>8.2f} "
        f"{row['gflops']:>8.2f} {paper:>7} {note}"
    )
    return f"{line.rstrip()}\n    {_format_taps(row['taps'])}"


def _format_taps(taps: dict[str, tuple[int, ...]]) -> str:
    """Equal shapes side by side: a Transformer shows four keys a block."""
    by_shape: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for key, shape in taps.items():
        # block01 ... block12 are told apart by their number alone.
        kind = re.sub(r"\d+", "", key) if key.startswith("block") else key
        by_shape.setdefault((kind, shape), []).append(key)
    parts = []
    for (_, shape), keys in by_shape.items():
        span = keys[0] if len(keys) == 1 else f"{keys[0]}..{keys[-1]}"
        parts.append(f"{span} {'x'.join(map(str, shape))}")
    return ", ".join(parts)


def find(patterns: list[str]) -> list[str]:
    """The names that match, each once.

    Raises:
      UserError: a pattern matches none.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        names = fnmatch.filter(MODELS, pattern)
        if not names:
            raise errors.unknown("network", pattern, MODELS)
        found |= dict.fromkeys(names)
    return list(found)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m xkd_jax.models",
        description="Lists networks: size, parameters, multiply-adds, the paper's count, taps.",
        epilog="example: python -m xkd_jax.models 'resnet*' vit_base_patch16_384",
    )
    parser.add_argument("names", nargs="*", default=["*"], help="names or patterns; default: all")
    try:
        names = find(parser.parse_args().names)
    except errors.UserError as error:
        print(f"xkd_jax: {error}", file=sys.stderr)
        return 2
    print(f"{'name':<34} size params/M   GFLOPs   paper")
    for name in names:
        print(format_row(name, describe(name)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
