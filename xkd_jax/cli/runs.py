"""From a command line to finished run folders: one run, or a comparison of several methods."""

import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import jax

from xkd_jax import train
from xkd_jax.config import Config, for_method, used, validate
from xkd_jax.distributed import processes, sharding
from xkd_jax.errors import UserError
from xkd_jax.experiment import create_experiment
from xkd_jax.reporting import report, summary
from xkd_jax.reporting.logger import say
from xkd_jax.reporting.report import CONFIG_FILE
from xkd_jax.weights import write_file

# Fields that may change when a run goes on: they don't change what it computes.
FREE = ("data.dir", "log_every", "checkpoint_every", "keep_checkpoints", "checkpoint_dir")


def run(config: Config, workdir: Path) -> int:
    """Trains what `config` says and reports it; goes on where an earlier call stopped.

    Args:
      config: a locked config; see `config.default_config`.
      workdir: the run's folder; a comparison has a folder in it for each method.

    Returns:
      The process's exit code: 0 when done or after SIGTERM, 130 after Ctrl-C.

    Raises:
      UserError: any wrong input.
    """
    validate(config)
    # A rerun of the same networks starts a minute sooner.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xkd_jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    runs = {workdir: config}
    if config.compare:
        runs = {workdir / name: for_method(config, name) for name in config.compare}
        if (workdir / CONFIG_FILE).exists():
            raise UserError(f"{workdir} holds a single run; choose another --workdir.")
    # All of them are checked before the first one starts.
    left = {folder: alone for folder, alone in runs.items() if not _is_complete(alone, folder)}
    for alone in left.values():
        create_experiment(alone)
    for folder, alone in left.items():
        try:
            stopped = _train(alone, folder)
        except OSError as error:
            raise UserError(
                f"training stopped at a file that can't be read or written ({error}); the "
                "checkpoints stay: put it right, and run the same command again to go on."
            ) from error
        if stopped:
            say(
                f"stopped by {stopped.name}; everything is saved in {workdir}: run the same "
                "command again to go on."
            )
            return 130 if stopped == signal.SIGINT else 0
    if processes.is_first():
        print(report.write(workdir))
    return 0


def _train(config: Config, folder: Path) -> signal.Signals | None:
    """Trains and measures; returns the signal that stopped it early, if one did.

    Raises:
      OSError: the disk is full, or the like.
    """
    if processes.is_first() and not (folder / CONFIG_FILE).exists():
        write_file(folder / CONFIG_FILE, (json.dumps(used(config), indent=2) + "\n").encode())
    experiment = create_experiment(config)
    state, stopped = train.run(experiment, folder)
    if stopped and int(state.step) < experiment.total_steps:
        return stopped
    variables = sharding.to_host(train.student_variables(state), experiment.mesh)
    summary.finish(experiment, variables, folder)
    return stopped


def _is_complete(config: Config, folder: Path) -> bool:
    """Whether the run in `folder`, which is made if it is missing, has nothing left to do.

    Raises:
      UserError: the folder holds another run, or can't be written.
    """
    path = folder / CONFIG_FILE
    if path.exists():
        there, here = json.loads(path.read_text()), json.loads(json.dumps(used(config)))
        differences = list(_differences(there, here, ""))
        if differences:
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            raise UserError(
                f"{folder} holds another run: {'; '.join(differences[:3])}{more}; choose another "
                "--workdir."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} can't be written ({error.strerror}); choose another --workdir."
        ) from error
    if (folder / summary.SUMMARY).exists():
        say(f"{folder} is complete.")
        return True
    return False


def _differences(there: Any, here: Any, name: str):
    """Each field in which two configs differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for field in sorted(there.keys() | here.keys()):
            inner = f"{name}.{field}" if name else field
            yield from _differences(there.get(field), here.get(field), inner)
    elif there != here and name not in FREE:
        yield f"{name} is {there!r} there and {here!r} here"
