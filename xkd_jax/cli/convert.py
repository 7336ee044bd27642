"""The command line: timm's weights in, and a student's weights out.

python -m xkd_jax.convert --timm vit_base_patch16_224 --out teacher.safetensors
"""

import argparse
import json
import sys
from typing import Any

_EXAMPLES = """\
examples:
  timm's weights from the hub, as a teacher (config.teacher.weights=teacher.safetensors):
    python -m xkd_jax.convert --timm vit_base_patch16_224.augreg_in21k_ft_in1k \\
        --out teacher.safetensors
  a file that is already here, for images of 384 pixels and 100 classes:
    python -m xkd_jax.convert --from model.safetensors --model vit_base_patch16_224 \\
        --image_size 384 --num_classes 100 --out start.safetensors
  a student of a run here as a state dict that timm loads:
    python -m xkd_jax.convert --from runs/quickstart/cakd/student.safetensors \\
        --to_timm student_timm.safetensors
"""


def main() -> int:
    """Converts, and turns a user's mistake into one sentence and exit code 2."""
    options = _parser().parse_args()
    # Only now: `--help` needs none of it.
    from xkd_jax.errors import UserError

    try:
        run(options)
    except UserError as error:
        print(f"xkd_jax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"xkd_jax: {error.filename}: {error.strerror}; give another path.", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """Does what the command line says.

    Raises:
      UserError: any wrong input.
    """
    from xkd_jax.convert.conversion import convert
    from xkd_jax.convert.files import read_checkpoint, to_state, write_state
    from xkd_jax.convert.hub import download
    from xkd_jax.errors import UserError
    from xkd_jax.weights import save_weights

    if not options.out and not options.to_timm:
        raise UserError("there is nowhere to write to; add --out FILE, or --to_timm FILE.")
    if options.out and not options.out.endswith(".safetensors"):
        raise UserError(f"--out {options.out} must end in .safetensors.")
    checkpoint = download(options.timm) if options.timm else read_checkpoint(options.source)
    result = convert(
        checkpoint,
        options.model,
        num_classes=options.num_classes,
        image_size=options.image_size,
        args=_arguments(options, checkpoint.metadata),
        mean=options.mean or (),
        std=options.std or (),
    )
    for change in result.changes:
        print(f"{checkpoint.name}: {change}")
    metadata = result.metadata
    what = (
        f"{metadata['model']}, {metadata['num_classes']} classes, {metadata['image_size']} pixels"
    )
    if options.out:
        save_weights(options.out, result.variables, metadata)
        print(f"wrote {options.out}: {what}")
    if options.to_timm:
        state = to_state(result.variables, metadata["model"])
        write_state(options.to_timm, state, metadata)
        print(f"wrote {options.to_timm}: {what}, as timm's state dict")


def _arguments(options: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any] | None:
    """--arg beside what the checkpoint says of itself; None without --arg."""
    from xkd_jax.errors import UserError

    if not options.arg:
        return None
    args = dict(known.get("args", {})) if options.model in ("", known.get("model")) else {}
    for text in options.arg:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--arg {text} must be NAME=VALUE, such as --arg patch_size=8.")
        try:
            args[name] = json.loads(value)
        except ValueError:
            args[name] = value  # a word
    return args


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xkd_jax.convert",
        description="Converts weights of timm and PyTorch to xkd_jax's, and back.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--timm", metavar="NAME", help="timm's name, with or without tag; needs xkd_jax[hub]"
    )
    source.add_argument(
        "--from",
        dest="source",
        metavar="FILE",
        help="a .safetensors, or a .pth or .bin (which need PyTorch); of timm's or ours",
    )
    parser.add_argument("--out", metavar="FILE", help="the .safetensors to write")
    parser.add_argument(
        "--to_timm", metavar="FILE", help="the state dict to write: .safetensors, .pth or .bin"
    )
    parser.add_argument(
        "--model", default="", metavar="NAME", help="the network; recognised if not given"
    )
    parser.add_argument(
        "--num_classes",
        type=_positive,
        default=0,
        metavar="N",
        help="another number: a new head, zero",
    )
    parser.add_argument(
        "--image_size", type=_positive, default=0, metavar="PIXELS", help="the side of its images"
    )
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of the network, such as patch_size=8; may be repeated",
    )
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}",
            type=float,
            nargs=3,
            metavar=("R", "G", "B"),
            help="of the images it was trained on, in [0, 1]; its network's if not given",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
