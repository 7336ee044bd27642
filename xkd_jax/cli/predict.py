"""Classifies images, or finds objects in them: `xkd-jax predict STUDENT IMAGE_OR_FOLDER ...`."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xkd_jax.cli.command import Parser, guard
from xkd_jax.errors import UserError

_THRESHOLD = 0.5
_SUFFIXES = (".jpg", ".jpeg", ".png")  # of drawn copies; others become PNG files
_EXAMPLES = """\
examples:
  xkd-jax predict runs/quickstart/cakd photo.jpg
  xkd-jax predict student.safetensors photos/ --top 3 --json > predictions.jsonl
  xkd-jax predict detector.safetensors photos/ --threshold 0.7 --out drawn
"""


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says.

    The exit code is 1 if an image could not be read.
    """
    options = _parse(argv)
    from xkd_jax.prediction import find_images, is_detector, load_any  # `--help` needs no JAX

    files = find_images(options.images)
    model, recorded = load_any(options.student)
    for name in ("top", "crop_pct") if is_detector(model) else ("threshold", "out"):
        if getattr(options, name) is not None:
            kind = "a detector" if is_detector(model) else "a classifier"
            raise UserError(f"--{name} has no use for {options.student}, {kind}; leave it out.")
    failed = 0
    predict = _detect if is_detector(model) else _classify
    for result, lines in predict(model, recorded, files, options):
        failed += "error" in result
        if options.json:
            print(json.dumps(result, ensure_ascii=False))
        elif "error" in result:
            print(f"xkd_jax: {result['error']}", file=sys.stderr)
        else:
            print("\n".join(lines))
    return 1 if failed else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "predict", "Prints the most probable classes of images, or the objects in them.", _EXAMPLES
    )
    parser.add_argument("student", metavar="STUDENT",
                        help="a run's folder, a .safetensors file, or an exported .onnx or "
                        ".tflite file")  # fmt: skip
    parser.add_argument("images", metavar="IMAGES", nargs="+", type=Path,
                        help="images, and folders with images at any depth")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a JSON object for each image")
    parser.add_argument("--top", type=int, help="classifier: classes for each image (default: 1)")
    parser.add_argument("--crop_pct", type=float,
                        help="classifier: share of the shorter side that is cropped from the "
                        "centre (default: what the student was evaluated with, else "
                        "0.875)")  # fmt: skip
    parser.add_argument("--threshold", type=float,
                        help="detector: probability that an object must have (default: "
                        f"{_THRESHOLD})")  # fmt: skip
    parser.add_argument("--out", type=Path,
                        help="detector: folder for copies of the images with boxes and masks "
                        "drawn")  # fmt: skip
    options = parser.parse_args(argv)
    if options.top is not None and options.top < 1:
        raise UserError(f"--top is {options.top}, but must be at least 1.")
    if options.crop_pct is not None and not 0 <= options.crop_pct <= 1:
        raise UserError(f"--crop_pct is {options.crop_pct:g}, but must be in (0, 1].")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UserError(f"--threshold is {options.threshold:g}, but must be in [0, 1].")
    return options


def _classify(
    model: Any, recorded: dict[str, Any], files: Sequence[Path], options: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """For each image a result for --json, and what is printed without it."""
    from xkd_jax.data.encoded import CROP_PCT
    from xkd_jax.prediction import predict

    crop_pct = options.crop_pct or recorded.get("crop_pct") or CROP_PCT
    for result in predict(model, files, options.top or 1, crop_pct):
        classes = (f"{100 * p:6.2f}%  {name}" for name, p in result.get("classes", ()))
        yield result, ["\t".join([result["path"], *classes])]


def _detect(
    model: Any, recorded: dict[str, Any], files: Sequence[Path], options: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """As `_classify`; draws the objects of each image, if there is a folder for that."""
    from xkd_jax.data.decode import DamagedImage
    from xkd_jax.detection import detect
    from xkd_jax.reporting import drawing
    from xkd_jax.reporting.files import write_file

    targets = _targets(files, options.out) if options.out else []
    threshold = _THRESHOLD if options.threshold is None else options.threshold
    for i, found in enumerate(detect(model, recorded, files, threshold)):
        if isinstance(found, DamagedImage):
            yield {"path": str(files[i]), "error": str(found)}, []
            continue
        if targets:
            write_file(targets[i], drawing.encode(drawing.draw_objects(found), targets[i].suffix))
        result = found.summary(masks=options.json)
        rows = [
            f"{100 * thing['score']:6.2f}%  {thing['class']}\t"
            + " ".join(f"{side:.1f}" for side in thing["box"])
            for thing in result["objects"]
        ]
        yield result, [f"{found.path}\t{row}" for row in rows or ["no objects"]]


def _targets(files: Sequence[Path], folder: Path) -> list[Path]:
    """Where the drawn copies go: the folders of the images below the one that all have in common.

    Raises:
      UserError: one of them would overwrite an image.
    """
    root = os.path.commonpath([file.absolute().parent for file in files])
    targets = [folder / file.absolute().relative_to(root) for file in files]
    targets = [
        target if target.suffix.lower() in _SUFFIXES else target.with_name(f"{target.name}.png")
        for target in targets
    ]
    originals = {file.resolve() for file in files}
    for target in targets:
        if target.resolve() in originals:
            raise UserError(f"--out {folder} would overwrite {target}; give another folder.")
    return targets
