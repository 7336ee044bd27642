"""Trains what a config describes; the same command again resumes.

python -m xkd_jax.main --config configs/quickstart.py
python -m xkd_jax.main --config configs/cifar100_32.py:smoke --workdir runs/a --config.batch_size=32
python -m xkd_jax.main --config configs/imagenet.py --compile_for v5e:16x16

On several machines, see docs/pods.md and launch/.
"""

import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe, e.g. configs/quickstart.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; runs/<recipe> if not given.")
_COMPILE_FOR = flags.DEFINE_string("compile_for", None, "TPUs to compile for, such as v5e:4x4.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where not found.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the run; 1: this one is alone.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process, from 0.")


def main(argv: list[str]) -> int:
    """Runs, and turns a user's mistake into one sentence and exit code 2."""
    from xkd_jax.cli import runs
    from xkd_jax.distributed import processes
    from xkd_jax.errors import UserError

    logging.set_verbosity(logging.WARNING)  # Orbax tells twenty lines a save at INFO
    try:
        recipe = (
            config_flags.get_config_filename(flags.FLAGS["config"]) if _CONFIG.present else None
        )
        workdir = runs.read_flags(recipe, _WORKDIR.value, argv[1:])
        if _COMPILE_FOR.value is not None:
            from xkd_jax.analysis import tpu_forecast

            return tpu_forecast.run(_CONFIG.value, _COMPILE_FOR.value)
        processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        return runs.run(_CONFIG.value, workdir)
    except UserError as error:
        return processes.fail(f"xkd_jax: {error}", 2)
    except KeyboardInterrupt:  # before or after the loop, which saves by itself
        return processes.fail("xkd_jax: interrupted; run the same command again to go on.", 130)
    except Exception:
        if not processes.several():
            raise
        return processes.fail(traceback.format_exc(), 1)


def parse(argv: list[str]) -> list[str]:
    """Parses flags; a wrong one ends the program in one sentence."""
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # a recipe is a program: it can raise anything
        from xkd_jax.cli import runs

        print(f"xkd_jax: {runs.explain(error, argv)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
