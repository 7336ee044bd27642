"""The command line: prepares data sets for "tfds:NAME", without TensorFlow.

python -m xkd_jax.prepare cifar100 --data_dir ~/tensorflow_datasets
"""

import argparse
import sys

_EXAMPLES = """\
examples:
  download and prepare CIFAR-100 (170 MB):
    python -m xkd_jax.prepare cifar100 --data_dir ~/tensorflow_datasets
  from an archive that is already here:
    python -m xkd_jax.prepare cifar100 --archive cifar-100-python.tar.gz
  ImageNet, from the archives of image-net.org (needs twice their 150 GB while it works):
    python -m xkd_jax.prepare imagenet2012 --data_dir /data/tfds \\
        --archive ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar
"""


def main() -> int:
    """Prepares, and turns a user's mistake into one sentence and exit code 2."""
    options = _parser().parse_args()
    # Only now: `--help` needs none of it.
    from xkd_jax.data import open_source
    from xkd_jax.data.prepare import prepare
    from xkd_jax.errors import UserError

    try:
        folder = prepare(options.name, options.data_dir, options.archive)
        sizes = open_source(f"tfds:{options.name}", options.data_dir).sizes
    except UserError as error:
        print(f"xkd_jax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"xkd_jax: {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("xkd_jax: interrupted; run the same command again to start over.", file=sys.stderr)
        return 130
    counts = ", ".join(f"{split} {size:,}" for split, size in sizes.items())
    print(f"{folder}: {counts}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xkd_jax.data",
        description='Prepares data sets for "tfds:NAME", without TensorFlow.',
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="prepare")
    prepare = commands.add_parser("prepare", help="write a set's TFDS folder")
    prepare.add_argument("name", help="cifar10, cifar100 or imagenet2012")
    prepare.add_argument("--data_dir", default="", help="TFDS's data folder; default: its own")
    prepare.add_argument(
        "--archive", nargs="+", default=[], metavar="FILE", help="archives that are already here"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
