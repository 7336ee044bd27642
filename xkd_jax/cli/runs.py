"""Trains what a config describes, one run or a comparison of several methods, and reports it."""

import signal
from pathlib import Path

from xkd_jax.cli import run_folder, tables
from xkd_jax.config import Config
from xkd_jax.distributed import processes
from xkd_jax.reporting import report
from xkd_jax.reporting.logger import say
from xkd_jax.validation import validate


def run(config: Config, workdir: Path, command: str = "") -> int:
    """Trains what `config` describes and writes a report; resumes an earlier, unfinished call.

    Args:
      config: a locked config; see `config.default_config`.
      workdir: the run's folder; a comparison has a subfolder for each method.
      command: the command line, for the summary and the model card.

    Returns:
      The process's exit code: 0 when done or after SIGTERM, 130 after Ctrl-C, 1 if a method of a
      comparison has failed.

    Raises:
      UserError: any wrong input.
    """
    validate(config)
    if config.compare or config.seeds:
        return tables.run(*tables.comparison(config), workdir, command=command)
    run_folder.configure_jax()
    if run_folder.is_complete(config, workdir):
        say(f"{workdir} is complete.")
    else:
        new = [] if workdir.exists() else [workdir]
        with run_folder.removed_if_refused(new):
            run_folder.check(workdir, config)
        stopped = run_folder.train_one(config, workdir, command=command)
        if stopped:
            say(run_folder.how_to_resume(stopped, workdir))
            return 130 if stopped == signal.SIGINT else 0
    run_folder.draw_pictures(config, [workdir])
    if processes.is_first():
        print(report.write(workdir))
    return 0
