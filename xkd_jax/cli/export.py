"""Exports a student to another runtime: `xkd-jax export STUDENT --to onnx --out DIR`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from xkd_jax.cli.command import Parser, guard
from xkd_jax.errors import UserError

TARGETS = ("timm", "onnx", "litert", "stablehlo")
_EXAMPLES = """\
examples:
  xkd-jax export runs/quickstart/cakd --to onnx --out exported --fold --uint8
  xkd-jax export runs/quickstart/cakd --to onnx --out exported --int8 --data fashion_mnist_mini
  xkd-jax export student.safetensors --to litert --out exported
  xkd-jax export detector.safetensors --to onnx --out exported --fold --uint8
  xkd-jax export student.safetensors --to timm --out exported
    in Python: timm.create_model("local-dir:exported", pretrained=True)
  xkd-jax export student.safetensors --to stablehlo --out exported
    in Python: jax.export.deserialize(bytearray(open("exported/model.stablehlo", "rb").read()))
"""


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    options = _parse(argv)
    from xkd_jax.detection import frame_of  # `--help` needs no JAX
    from xkd_jax.export import int8, student
    from xkd_jax.export.runtime import EXPORT, require
    from xkd_jax.prediction import load_student
    from xkd_jax.reporting import model_card
    from xkd_jax.reporting.files import write_file

    card = model_card.find(options.student, options.out)
    model, recorded = load_student(options.student)
    if model.is_detector and options.int8:
        raise UserError(f"--int8 is for classifiers, but {model.name} is a detector; leave it out.")
    how = student.Options(
        recorded.get("crop_pct") or 1.0,
        options.fold or options.int8,
        options.uint8,
        frame_of(model, recorded) if model.is_detector else None,
    )
    images = None
    if options.int8:
        require("onnxruntime", EXPORT, "--int8")
        data = options.data, options.split or "train", options.data_dir
        images = int8.calibration_images(data, model.image_size, how.crop_pct)
    files = student.export(model, options.to, options.out, how)
    if images is not None:
        files.append(int8.quantize(files[0], images))
    if card is not None:
        files.append(options.out / model_card.README)
        write_file(files[-1], card)
    for path in files:
        print(f"wrote {path}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("export", "Writes a student for another runtime.", _EXAMPLES)
    parser.add_argument("student", metavar="STUDENT", help="a run's folder or a .safetensors file")
    parser.add_argument("--to", choices=TARGETS, required=True, help="the format")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--fold", action="store_true",
                        help="onnx: make BatchNorm part of the convolutions, as litert always "
                        "does")  # fmt: skip
    parser.add_argument("--uint8", action="store_true",
                        help="not timm: normalise uint8 images in the graph")  # fmt: skip
    parser.add_argument("--int8", action="store_true",
                        help="onnx: also write model_int8.onnx, quantised to 8 bits; needs --data; "
                        "implies --fold")  # fmt: skip
    parser.add_argument("--data", default="",
                        help="int8: images to calibrate with, as data.name: images:DIR, "
                        "folder:DIR, tfds:NAME, ...; labels are not read")  # fmt: skip
    parser.add_argument("--split", default="", help="int8: their split (default: train)")
    parser.add_argument("--data_dir", default="", help="int8: as data.dir")
    options = parser.parse_args(argv)
    if options.fold and options.to not in ("onnx", "litert"):
        parser.error("--fold is for --to onnx and --to litert; leave it out")
    if options.uint8 and options.to == "timm":
        parser.error("--uint8 is for --to onnx, litert and stablehlo; leave it out")
    if options.int8 and options.to != "onnx":
        parser.error("--int8 is for --to onnx; leave it out")
    if options.int8 and not options.data:
        parser.error("--int8 needs --data, images to calibrate with, such as images:photos")
    unused = [name for name in ("data", "split", "data_dir") if getattr(options, name)]
    if unused and not options.int8:
        parser.error(f"--{unused[0]} is for --int8; leave it out")
    return options
