"""Exports a student to another runtime: `xkd-jax export STUDENT --to onnx --out DIR`."""

from collections.abc import Sequence
from pathlib import Path

from xkd_jax.cli.command import Parser, guard

TARGETS = ("timm", "onnx", "stablehlo")
_EXAMPLES = """\
examples:
  xkd-jax export runs/quickstart/cakd --to onnx --out exported --fold --uint8
  xkd-jax export student.safetensors --to timm --out exported
    in Python: timm.create_model("local-dir:exported", pretrained=True)
  xkd-jax export student.safetensors --to stablehlo --out exported
    in Python: jax.export.deserialize(bytearray(open("exported/model.stablehlo", "rb").read()))
"""


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    parser = Parser("export", "Writes a student for another runtime.", _EXAMPLES)
    parser.add_argument("student", metavar="STUDENT", help="a run's folder or a .safetensors file")
    parser.add_argument("--to", choices=TARGETS, required=True, help="the format")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--fold", action="store_true",
                        help="onnx: make BatchNorm part of the convolutions")  # fmt: skip
    parser.add_argument("--uint8", action="store_true",
                        help="onnx, stablehlo: normalise uint8 images in the graph")  # fmt: skip
    options = parser.parse_args(argv)
    if options.fold and options.to != "onnx":
        parser.error("--fold is for --to onnx; leave it out")
    if options.uint8 and options.to == "timm":
        parser.error("--uint8 is for --to onnx and --to stablehlo; leave it out")
    from xkd_jax.export import student  # `--help` needs no JAX
    from xkd_jax.prediction import load_student

    model, crop_pct = load_student(options.student)
    how = student.Options(crop_pct or 1.0, options.fold, options.uint8)
    for path in student.export(model, options.to, options.out, how):
        print(f"wrote {path}")
    return 0
