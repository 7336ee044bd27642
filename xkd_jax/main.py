"""Trains what a config describes; the same command again resumes.

python -m xkd_jax.main --config configs/quickstart.py
python -m xkd_jax.main --config configs/cifar100_32.py:smoke --workdir runs/a --config.batch_size=32
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, e.g. configs/quickstart.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; runs/<recipe> if not given.")


def main(argv: list[str]) -> int:
    """Runs, and turns a user's mistake into one sentence and exit code 2."""
    from xkd_jax import experiment
    from xkd_jax.errors import UserError

    logging.set_verbosity(logging.WARNING)  # Orbax tells twenty lines a save at INFO
    try:
        recipe = (
            config_flags.get_config_filename(flags.FLAGS["config"]) if _CONFIG.present else None
        )
        workdir = experiment.read_flags(recipe, _WORKDIR.value, argv[1:])
        return experiment.run(_CONFIG.value, workdir)
    except UserError as error:
        print(f"xkd_jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before or after the loop, which saves by itself
        print("xkd_jax: interrupted; run the same command again to go on.", file=sys.stderr)
        return 130


def parse(argv: list[str]) -> list[str]:
    """Parses flags; a wrong one ends the program in one sentence."""
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # a recipe is a program: it can raise anything
        from xkd_jax import experiment

        print(f"xkd_jax: {experiment.explain(error, argv)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
