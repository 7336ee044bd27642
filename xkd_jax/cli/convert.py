"""Converts weights from timm or PyTorch to xkd_jax's format, and back.

xkd-jax convert --timm vit_base_patch16_224 --out teacher.safetensors
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from xkd_jax.cli.command import Parser, guard
from xkd_jax.errors import UserError

_EXAMPLES = """\
examples:
  timm's weights from the hub, for a teacher (--config.teacher.weights=teacher.safetensors):
    xkd-jax convert --timm vit_base_patch16_224.augreg_in21k_ft_in1k \\
        --out teacher.safetensors
  a local file, resized for 384 x 384 images and with a new head for 100 classes:
    xkd-jax convert --from model.safetensors --model vit_base_patch16_224 \\
        --image_size 384 --num_classes 100 --out start.safetensors
  a trained student as a state dict that timm loads:
    xkd-jax convert --from runs/quickstart/cakd/student.safetensors \\
        --to_timm student_timm.safetensors
"""


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    run(_parser().parse_args(argv))
    return 0


def run(options: argparse.Namespace) -> None:
    """Converts as the parsed `options` say, and prints what was written.

    Raises:
      UserError: any wrong input.
    """
    from xkd_jax.convert.conversion import convert  # `--help` needs no JAX
    from xkd_jax.convert.files import read_checkpoint, to_state, write_state
    from xkd_jax.convert.hub import download
    from xkd_jax.weights import save_weights

    if not options.out and not options.to_timm:
        raise UserError("no output file is given; add --out FILE or --to_timm FILE.")
    if options.out and not options.out.endswith(".safetensors"):
        raise UserError(f"--out {options.out} must end in .safetensors.")
    if options.timm and options.key:
        raise UserError("--key chooses among the state dicts of --from FILE; leave it out.")
    if options.timm:
        checkpoint = download(options.timm)
    else:
        checkpoint = read_checkpoint(options.source, key=options.key)
    result = convert(
        checkpoint,
        options.model,
        num_classes=options.num_classes,
        image_size=options.image_size,
        args=_arguments(options, checkpoint.metadata),
        mean=options.mean or (),
        std=options.std or (),
        antialias=options.antialias == "true",
        allow_not_finite=options.allow_not_finite,
    )
    for change in (*checkpoint.notes, *result.changes):
        print(f"{checkpoint.name}: {change}")
    metadata = result.metadata | ({"license": options.license} if options.license else {})
    count = metadata["num_classes"]
    classes = f"{count} classes" if count else "no classifier"
    what = f"{metadata['model']}, {classes}, {metadata['image_size']} pixels"
    if options.out:
        save_weights(options.out, result.variables, metadata)
        print(f"wrote {options.out}: {what}")
    if options.to_timm:
        state = to_state(result.variables, metadata["model"])
        write_state(options.to_timm, state, metadata)
        print(f"wrote {options.to_timm}: {what}, as timm's state dict")
    if result.assumed:
        print(result.assumed)


def _arguments(options: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint's own arguments, updated with --arg; None without --arg."""

    if not options.arg:
        return None
    own = options.model in ("", known.get("model", options.model)) and "architecture" not in known
    args = dict(known.get("args", {})) if own else {}
    for text in options.arg:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--arg {text} must be NAME=VALUE, such as --arg patch_size=8.")
        try:
            args[name] = json.loads(value)
        except ValueError:
            args[name] = value  # a plain string
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return int(text)


def _parser() -> Parser:
    description = "Converts weights from timm or PyTorch to xkd_jax's format, and back."
    parser = Parser("convert", description, _EXAMPLES)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--timm", metavar="NAME", help="timm's name, with or without a tag; needs xkd_jax[hub]"
    )
    source.add_argument(
        "--from",
        dest="source",
        metavar="FILE",
        help="a .safetensors, .pth or .bin file, from timm or xkd_jax; the last two need PyTorch",
    )
    parser.add_argument(
        "--key",
        default="",
        metavar="NAME",
        help="the state dict to read, where the file has several, such as teacher",
    )
    parser.add_argument("--out", metavar="FILE", help="the .safetensors file to write")
    parser.add_argument(
        "--to_timm",
        metavar="FILE",
        help="the timm state dict to write: .safetensors, .pth or .bin",
    )
    parser.add_argument(
        "--license",
        default="",
        metavar="NAME",
        help="the weights' licence, for model cards, where the file states none: apache-2.0, ...",
    )
    parser.add_argument(
        "--allow_not_finite",
        action="store_true",
        help="convert tensors with NaN or infinite values, which are refused otherwise",
    )
    _add_network(parser)
    return parser


def _add_network(parser: Parser) -> None:
    """The arguments that say what the network is."""
    parser.add_argument(
        "--model",
        default="",
        metavar="NAME",
        help="the network, even if the file states another; default: from the file",
    )
    parser.add_argument(
        "--num_classes",
        type=_positive,
        metavar="N",
        help="number of classes; if it differs from the file's, the head is reset to zero",
    )
    parser.add_argument(
        "--image_size",
        type=_positive,
        default=0,
        metavar="PIXELS",
        help="side of the images; position embeddings are resized to it",
    )
    parser.add_argument(
        "--antialias",
        choices=("true", "false"),
        default="true",
        help="antialiasing when resizing them: true (default) as timm, false as DINOv2's own code",
    )
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of the network, such as patch_size=8; may be repeated",
    )
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        parser.add_argument(
            f"--{name}",
            type=float,
            nargs=3,
            metavar=("R", "G", "B"),
            help=f"{what} of the training images, in [0, 1]; default: the network's",
        )
