"""Measures a student on labelled images: `xkd-jax evaluate STUDENT --data DATA`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from xkd_jax.cli.command import Parser, guard
from xkd_jax.errors import UserError

_EXAMPLES = """\
examples:
  xkd-jax evaluate runs/quickstart/cakd --data fashion_mnist_mini
  xkd-jax evaluate student.safetensors --data folder:photos --split val --out scores
  xkd-jax evaluate exported/model_int8.onnx --data folder:photos --split val
  xkd-jax evaluate runs/coco_mrcnn_r50 --data coco:DIR --split val2017
  xkd-jax evaluate timm:resnet18.a1_in1k --data tfds:imagenet2012 --split validation
"""


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    options = _parse(argv)
    inside = Path(options.student) if Path(options.student).is_dir() else Path()
    folder = options.out or inside / "evaluation"
    if options.data.startswith("coco:"):
        _evaluate_detector(options, folder)
    else:
        _evaluate_classifier(options, folder)
    print(f"written: {folder}/")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("evaluate", "Measures a student on labelled images.", _EXAMPLES)
    parser.add_argument("student", metavar="STUDENT",
                        help="a run's folder, a .safetensors file, an exported .onnx or .tflite "
                        "file, or timm:NAME")  # fmt: skip
    parser.add_argument("--data", required=True,
                        help="as data.name: folder:DIR, tfds:NAME, ...; for a detector "
                        "coco:DIR")  # fmt: skip
    parser.add_argument("--split", default="test", help="such as test, val or 'train[:1000]'")
    parser.add_argument("--data_dir", default="", help="as data.dir")
    parser.add_argument("--crop_pct", type=float, default=0.0,
                        help="share of the shorter side that is cropped from the centre (default: "
                        "what the student was evaluated with)")  # fmt: skip
    parser.add_argument("--noisy", action="store_true", help="also measure on corrupted images")
    parser.add_argument("--out", type=Path, default=None,
                        help="folder for the scores and a classifier's confusion matrix and its "
                        "picture (default: evaluation/ in the run's folder or here)")  # fmt: skip
    options = parser.parse_args(argv)
    if not 0 <= options.crop_pct <= 1:
        raise UserError(f"--crop_pct is {options.crop_pct:g}, but must be in (0, 1].")
    return options


def _evaluate_classifier(options: argparse.Namespace, folder: Path) -> None:
    from xkd_jax.reporting import evaluation  # `--help` needs no JAX

    result = evaluation.measure(
        options.student, (options.data, options.split, options.data_dir), options.crop_pct,
        options.noisy,
    )  # fmt: skip
    evaluation.write(result, folder)
    print(evaluation.format_scores(result))


def _evaluate_detector(options: argparse.Namespace, folder: Path) -> None:
    if options.noisy or options.crop_pct or options.data_dir:
        raise UserError("--noisy, --crop_pct and --data_dir are for classifiers; leave them out.")
    from xkd_jax.reporting import detector_evaluation
    from xkd_jax.reporting.files import write_file

    result = detector_evaluation.measure(options.student, options.data, options.split)
    write_file(folder / "evaluation.json", f"{json.dumps(result, indent=2)}\n".encode())
    print(detector_evaluation.format_scores(result))
