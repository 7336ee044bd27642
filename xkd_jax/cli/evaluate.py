"""Evaluates a classifier on labelled images: `xkd-jax evaluate STUDENT --data DATA`."""

from collections.abc import Sequence
from pathlib import Path

from xkd_jax.cli.command import Parser, guard
from xkd_jax.errors import UserError

_EXAMPLES = """\
examples:
  xkd-jax evaluate runs/quickstart/cakd --data fashion_mnist_mini
  xkd-jax evaluate student.safetensors --data folder:photos --split val --out scores
  xkd-jax evaluate exported/model_int8.onnx --data folder:photos --split val
  xkd-jax evaluate timm:resnet18.a1_in1k --data tfds:imagenet2012 --split validation
"""


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    parser = Parser("evaluate", "Measures a classifier on labelled images.", _EXAMPLES)
    parser.add_argument("student", metavar="STUDENT",
                        help="a run's folder, a .safetensors file, an exported .onnx or .tflite "
                        "file, or timm:NAME")  # fmt: skip
    parser.add_argument("--data", required=True, help="as data.name: folder:DIR, tfds:NAME, ...")
    parser.add_argument("--split", default="test", help="such as test, val or 'train[:1000]'")
    parser.add_argument("--data_dir", default="", help="as data.dir")
    parser.add_argument("--crop_pct", type=float, default=0.0,
                        help="share of the shorter side that is cropped from the centre (default: "
                        "what the student was evaluated with)")  # fmt: skip
    parser.add_argument("--noisy", action="store_true", help="also measure on corrupted images")
    parser.add_argument("--out", type=Path, default=None,
                        help="folder for the scores, the confusion matrix and its "
                        "picture (default: evaluation/ in the run's folder or here)")  # fmt: skip
    options = parser.parse_args(argv)
    if not 0 <= options.crop_pct <= 1:
        raise UserError(f"--crop_pct is {options.crop_pct:g}, but must be in (0, 1].")
    from xkd_jax.reporting import evaluation  # `--help` needs no JAX

    result = evaluation.measure(
        options.student, (options.data, options.split, options.data_dir), options.crop_pct,
        options.noisy,
    )  # fmt: skip
    inside = Path(options.student) if Path(options.student).is_dir() else Path()
    folder = options.out or inside / "evaluation"
    evaluation.write(result, folder)
    print(evaluation.format_scores(result))
    print(f"written: {folder}/")
    return 0
