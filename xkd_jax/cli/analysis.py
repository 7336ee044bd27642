"""Analyses trained networks: `xkd-jax analysis transferability|robustness|pictures RUN ...`."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xkd_jax.cli.command import Parser, guard
from xkd_jax.errors import UserError

_EXAMPLES = """\
examples:
  xkd-jax analysis transferability runs/quickstart
  xkd-jax analysis robustness runs/quickstart
  xkd-jax analysis pictures runs/quickstart
"""
_TRANSFERABILITY = """\
examples:
  xkd-jax analysis transferability runs/quickstart
  xkd-jax analysis transferability runs/table1/resnet-none runs/table1/vit-resnet-cakd
  xkd-jax analysis transferability --teacher packaged:quickstart_teacher \\
    --student runs/a/student.safetensors runs/b/student.safetensors \\
    --data fashion_mnist_mini --out runs/pairs
"""
_ROBUSTNESS = """\
examples:
  xkd-jax analysis robustness runs/quickstart
  xkd-jax analysis robustness runs/quickstart --images 1000 --corruptions gaussian_noise jpeg
"""
_PICTURES = """\
examples:
  xkd-jax analysis pictures runs/quickstart
  xkd-jax analysis pictures runs/a --baseline runs/b
"""


def transferability(argv: Sequence[str]) -> int:
    """The verb's command line after "transferability"; returns the exit code."""
    about = (
        "Maps the student's features linearly to the teacher's and measures the cosine similarity "
        "on test images, as Fig. 1(b) and 3(b) of the paper do."
    )
    parser = Parser("analysis transferability", about, _TRANSFERABILITY)
    _add_runs(parser, nargs="*")
    parser.add_argument("--teacher", nargs="+", default=[], metavar="FILE", help="weights files")
    parser.add_argument("--student", nargs="+", default=[], metavar="FILE", help="weights files")
    parser.add_argument("--data", default="", help="for --teacher and --student: the data set")
    parser.add_argument("--train", default="train", help="its split that maps are fitted on")
    parser.add_argument("--test", default="test", help="its split for the similarities")
    parser.add_argument("--image_size", type=int, default=0, help="of --data; 0: the data's own")
    options = parser.parse_args(argv)
    if len({bool(given) for given in (options.teacher, options.student, options.data)}) > 1:
        raise UserError("--teacher, --student and --data belong together; give all three.")
    if not (options.runs or options.student):
        raise UserError("there is nothing to analyse; give a run, or --teacher and --student.")
    folder = _output(options)
    from xkd_jax.analysis import tables  # `--help` needs no JAX
    from xkd_jax.analysis import transferability as analysis
    from xkd_jax.distributed.sharding import create_mesh

    pairs = analysis.pairs_of_runs(_load(options))
    if options.student:
        split = options.data, options.data_dir, options.train, options.test, options.image_size
        pairs += analysis.pairs_of(options.teacher, options.student, *split)
    if not pairs:
        raise UserError("there is no pair to compare; give runs with a teacher, or two files.")
    mesh = create_mesh()
    rows = [row for pair in pairs for row in analysis.measure(pair, mesh, options.images)]
    folder.mkdir(parents=True, exist_ok=True)
    print(tables.write_transferability(rows, folder))
    return 0


def robustness(argv: Sequence[str]) -> int:
    """The verb's command line after "robustness"; returns the exit code."""
    about = (
        "Measures the accuracy of students and teachers on corrupted test images: the noisy "
        "protocol of Fig. 3(a), and the common corruptions at five severities."
    )
    parser = Parser("analysis robustness", about, _ROBUSTNESS)
    _add_runs(parser, nargs="+")
    names = "such as gaussian_noise; default: all"
    parser.add_argument("--corruptions", nargs="+", default=[], metavar="NAME", help=names)
    options = parser.parse_args(argv)
    folder = _output(options)
    from xkd_jax.analysis import robustness as analysis
    from xkd_jax.analysis import tables
    from xkd_jax.distributed.sharding import create_mesh

    rows = analysis.measure(_load(options), create_mesh(), options.images, options.corruptions)
    folder.mkdir(parents=True, exist_ok=True)
    print(tables.write_robustness(rows, folder))
    return 0


def pictures(argv: Sequence[str]) -> int:
    """The verb's command line after "pictures"; returns the exit code."""
    about = (
        "Draws attention maps, features, the multi-view generator's views, test images that the "
        "student has gained and lost, and the confusion matrix, into the folder of each run, its "
        "report and TensorBoard."
    )
    parser = Parser("analysis pictures", about, _PICTURES)
    _add_runs(parser, nargs="+", images=0, out="pictures/ in each run's folder")
    found = "the run to compare with; default: none, of the same comparison"
    parser.add_argument("--baseline", type=Path, metavar="RUN", help=found)
    options = parser.parse_args(argv)
    _output(options)
    from xkd_jax.analysis import pictures as analysis
    from xkd_jax.reporting import document, report

    runs = _load(options)
    baseline = options.baseline and analysis.load_baseline(options.baseline, options.data_dir)
    for folder in analysis.draw(runs, baseline, options.images, options.out):
        print(f"pictures: {folder}/")
    if options.out is None:
        for folder in options.runs:
            report.write(folder)
            print(f"page: {folder / document.PAGE}")
    return 0


KINDS = {"transferability": transferability, "robustness": robustness, "pictures": pictures}


def _add_runs(
    parser: Parser, nargs: str, images: int = 2000, out: str = "analysis/ in the first RUN's folder"
) -> None:
    """The options that all kinds share; `images` and `out` are defaults, the latter in words."""
    parser.add_argument(
        "runs", nargs=nargs, type=Path, metavar="RUN",
        help="the folder of a run, a comparison or a table's cell",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help=f"default: {out}")
    limit = f"at most, of each split; 0: all (default: {images})"
    parser.add_argument("--images", type=int, default=images, help=limit)
    parser.add_argument("--data_dir", default="", help="the TFDS folder, if the data have moved")


def _load(options: Namespace) -> Any:
    """The finished runs that are named."""
    from xkd_jax.analysis.finished import load_runs
    from xkd_jax.cli.run_folder import configure_jax

    configure_jax()
    return load_runs(options.runs, options.data_dir)


def _output(options: Namespace) -> Path:
    if options.images < 0:
        raise UserError(f"--images is {options.images}, but must be at least 0.")
    return options.out or (options.runs[0] if options.runs else Path()) / "analysis"


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    kind, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if kind not in KINDS:
        parser = Parser("analysis", "Analyses trained networks.", _EXAMPLES)
        parser.add_argument("kind", choices=KINDS, help="KIND --help lists its options")
        parser.add_argument("runs", nargs="*", metavar="RUN", help="the folder of a run")
        parser.parse_args([kind, *rest] if kind else [])
    return KINDS[kind](rest)
