"""Trains what a recipe describes: `xkd-jax train --config quickstart`.

The command line alone; runs.py trains.
"""

import ast
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from absl import flags, logging
from ml_collections import config_flags

from xkd_jax.cli import recipes
from xkd_jax.cli.command import arguments_of, guard
from xkd_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe: a file, or the name of an installed one; RECIPE:VARIANT."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; default: runs/RECIPE.")
_COMPILE_FOR = flags.DEFINE_string(
    "compile_for", None, "Only compile, for TPUs such as v5e:4x4, and predict memory and speed."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, if JAX cannot detect it."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Total number of processes; 1 disables distributed start-up."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process, from 0.")
_NETWORK_ARG = re.compile(r"--?config\.(student|teacher)\.args\.(\w+)=(.*)")
_FLAGS = (_CONFIG, _WORKDIR, _COMPILE_FOR, _COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)


_USAGE = """\
usage: xkd-jax train --config RECIPE [--config.FIELD=VALUE ...] [options]

Trains what a recipe describes; the same command again resumes.

examples:
  xkd-jax train --config quickstart
  xkd-jax train --config cifar100_32:smoke --config.data.dir=DIR --config.batch_size=32
  xkd-jax train --config imagenet --compile_for v5e:16x16
  python -m xkd_jax.main --config configs/quickstart.py

On several machines, see docs/pods.md and launch/.

options:"""


def usage() -> str:
    """The text of --help."""
    lines = [_USAGE]
    helps = [(flag.name, flags.FLAGS[flag.name].help) for flag in _FLAGS]
    helps.insert(1, ("config.FIELD", "Another value for a field of the recipe's config."))
    lines += [f"  --{name:<14} {text}" for name, text in helps]
    names = textwrap.fill(", ".join(recipes.names()), 98)
    return "\n".join([*lines, "", "installed recipes:", textwrap.indent(names, "  ")])


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    arguments = arguments_of(argv, usage())
    command = shlex.join(["xkd-jax", "train", *arguments])
    config, workdir = parse(arguments)
    # Only now, for JAX takes a second: `--help` and a wrong command line need none of it.
    if _COMPILE_FOR.value is not None:
        from xkd_jax.analysis import tpu_forecast

        return tpu_forecast.run(config, _COMPILE_FOR.value)
    from xkd_jax.cli import runs

    start_processes()
    return runs.run(config, workdir, command)


def start_processes() -> None:
    """Joins the other processes, if the flags or the environment name any.

    Raises:
      UserError: as for `distributed.processes.start`.
    """
    from xkd_jax.distributed import processes

    processes.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)


def parse(arguments: list[str]):
    """The config and the run's folder.

    Raises:
      UserError: something on the command line or in the recipe is wrong.
    """
    for i, argument in enumerate(arguments):
        name, equals, recipe = argument.partition("=")
        if name == "--config" and equals:
            arguments[i] = f"--config={recipes.locate(recipe)}"
        elif name == "--config" and i + 1 < len(arguments):
            arguments[i + 1] = recipes.locate(arguments[i + 1])
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)  # Orbax logs twenty lines per checkpoint at INFO
    # config_flags only overrides what a recipe sets, and the arguments of networks are open.
    network_args = [argument for argument in arguments if _NETWORK_ARG.fullmatch(argument)]
    others = [argument for argument in arguments if argument not in network_args]
    # config_flags looks for overrides in sys.argv, whatever is parsed.
    sys.argv = [sys.argv[0], *others]
    try:
        rest = flags.FLAGS(sys.argv)[1:]
    except Exception as error:  # a recipe is a program: it can raise anything
        raise UserError(_explain(error, arguments)) from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; write --config RECIPE --workdir FOLDER.")
    if not _CONFIG.present:
        raise UserError("--config is missing; try --config quickstart.")
    config = _CONFIG.value
    path, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    if config is None:
        raise UserError(f"get_config of {path} returned None; return the config at its end.")
    for argument in network_args:
        _set_network_arg(config, argument)
    folder = f"runs/{Path(path).stem}{'_' + variant if variant else ''}"
    return config, Path(_WORKDIR.value or folder)


def _set_network_arg(config, argument: str) -> None:
    """Sets a field of the student's or the teacher's module; its name is checked later."""
    ((network, name, text),) = _NETWORK_ARG.findall(argument)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text  # a word
    try:
        with config.unlocked():
            config[network].args[name] = value
    except TypeError as error:
        right = type(config[network].args[name]).__name__
        raise UserError(f"{network}.args.{name} is {text}, but must be of type {right}.") from error


def _explain(error: Exception, arguments: list[str]) -> str:
    """One sentence for what is wrong on the command line or in the recipe.

    Args:
      error: what parsing raised.
      arguments: the command line.
    """
    if isinstance(error, UserError):
        return str(error)
    from xkd_jax.config import default_config, has_field, missing_field

    for argument in arguments:
        name = argument.split("=")[0].lstrip("-").removeprefix("config.")
        if argument.lstrip("-").startswith("config.") and not has_field(default_config(), name):
            return str(missing_field(default_config(), name))
    # absl wraps the recipe's own error: its last line, before a hint about --help, is the sentence.
    text = str(error).strip().split("\n\nPass --help")[0].splitlines()[-1]
    return text.split("Error: ")[-1].strip()
