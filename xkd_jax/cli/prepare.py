"""Prepares data sets for "tfds:NAME", without TensorFlow: `xkd-jax prepare cifar100`."""

from collections.abc import Sequence

from xkd_jax.cli.command import Parser, guard

_EXAMPLES = """\
examples:
  download and prepare CIFAR-100 (170 MB):
    xkd-jax prepare cifar100 --data_dir ~/tensorflow_datasets
  from an archive that was downloaded before:
    xkd-jax prepare cifar100 --archive cifar-100-python.tar.gz
  ImageNet, from image-net.org's archives (needs twice their 150 GB while it runs):
    xkd-jax prepare imagenet2012 --data_dir /data/tfds \\
        --archive ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar
"""


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    options = _parser().parse_args(argv)
    from xkd_jax.data import open_source  # `--help` needs no JAX
    from xkd_jax.data.prepare import prepare

    folder = prepare(options.name, options.data_dir, options.archive)
    sizes = open_source(f"tfds:{options.name}", options.data_dir).sizes
    counts = ", ".join(f"{split} {size:,}" for split, size in sizes.items())
    print(f"{folder}: {counts}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "prepare", 'Prepares a data set for "tfds:NAME", without TensorFlow.', _EXAMPLES
    )
    parser.add_argument("name", help="cifar10, cifar100 or imagenet2012")
    parser.add_argument("--data_dir", default="", help="TFDS's data folder; default: TFDS's own")
    parser.add_argument(
        "--archive", nargs="+", default=[], metavar="FILE", help="archives downloaded before"
    )
    return parser
