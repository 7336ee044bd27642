"""Classifies images with a trained student: `xkd-jax predict STUDENT IMAGE_OR_FOLDER ...`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from xkd_jax.cli.command import Parser, guard
from xkd_jax.errors import UserError

_EXAMPLES = """\
examples:
  xkd-jax predict runs/quickstart/cakd photo.jpg
  xkd-jax predict student.safetensors photos/ --top 3 --json > predictions.jsonl
"""


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says.

    The exit code is 1 if an image could not be read.
    """
    parser = Parser("predict", "Prints the most probable classes of images.", _EXAMPLES)
    parser.add_argument("student", metavar="STUDENT",
                        help="a run's folder, a .safetensors file, or an exported .onnx or "
                        ".tflite file")  # fmt: skip
    parser.add_argument("images", metavar="IMAGES", nargs="+", type=Path,
                        help="images, and folders with images at any depth")  # fmt: skip
    parser.add_argument("--top", type=int, default=1, help="classes for each image (default: 1)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each image")
    parser.add_argument("--crop_pct", type=float, default=0.0,
                        help="share of the shorter side that is cropped from the centre (default: "
                        "what the student was evaluated with, else 0.875)")  # fmt: skip
    options = parser.parse_args(argv)
    if options.top < 1:
        raise UserError(f"--top is {options.top}, but must be at least 1.")
    if not 0 <= options.crop_pct <= 1:
        raise UserError(f"--crop_pct is {options.crop_pct:g}, but must be in (0, 1].")
    from xkd_jax.prediction import find_images, predict  # `--help` needs no JAX

    files = find_images(options.images)
    failed = 0
    for result in predict(options.student, files, options.top, options.crop_pct):
        failed += "error" in result
        if options.json:
            print(json.dumps(result, ensure_ascii=False))
        elif "error" in result:
            print(f"xkd_jax: {result['error']}", file=sys.stderr)
        else:
            classes = (f"{100 * p:6.2f}%  {name}" for name, p in result["classes"])
            print("\t".join([result["path"], *classes]))
    return 1 if failed else 0
