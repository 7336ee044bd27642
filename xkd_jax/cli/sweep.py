"""Trains a table of results: `python -m xkd_jax.sweep --config TABLE.py --workdir FOLDER`.

Each cell first chooses among its alternatives on the evaluation split and is then trained with
every seed. Finished runs are skipped and interrupted ones resumed. A run is in
FOLDER/CELL/seed0, a run for a choice in FOLDER/CELL/tuning.
"""

import runpy
import shlex
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from xkd_jax.cli import train as command
from xkd_jax.cli.command import arguments_of, guard
from xkd_jax.errors import UserError

_SHARD = flags.DEFINE_string("shard", "1/1", "I/N: only every Nth cell, beginning with the Ith.")
_COMMANDS = flags.DEFINE_bool(
    "commands", False, "Print one command for each cell instead, for the jobs of a cluster."
)
_USAGE = """\
usage: xkd-jax sweep --config TABLE [--config.FIELD=VALUE ...] [--workdir FOLDER]
                     [--shard I/N | --commands]

Trains all cells of a table with all seeds; the same command again resumes. A field's value applies
to all cells that don't set it themselves.

  --shard I/N   only every Nth cell, beginning with the Ith
  --commands    print one command for each cell instead, for the jobs of a cluster

examples:
  xkd-jax sweep --config tables/table1 --workdir runs/table1
  xkd-jax sweep --config tables/table1:gpu --config.data.dir=DIR --workdir W --commands
  xkd-jax sweep --config dinov2_cifar100:few25 --config.data.dir=DIR --workdir runs/few25
  xkd-jax sweep --config dinov2_cifar100:few25 --config.data.dir=DIR --workdir W --shard 2/4"""


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    arguments = arguments_of(argv, _USAGE)
    config, workdir = command.parse(list(arguments))
    path, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    get_table = runpy.run_path(path).get("get_table")
    table = get_table(variant) if get_table else None
    if table is None:
        raise UserError(f"{path} has no table; define get_table(variant), which returns a Table.")
    shard = parse_shard(_SHARD.value)
    from xkd_jax.cli import tables  # `--help` needs no JAX

    if _COMMANDS.value:
        if shard != (1, 1):
            raise UserError("--commands prints a command for each cell; leave out --shard.")
        tables.check_fields(table, config, list(table.cells))
        print("\n".join(commands(arguments, list(table.cells))))
        return 0
    command.start_processes()
    line = shlex.join(["xkd-jax", "sweep", *arguments])
    return tables.run(table, config, workdir, shard, line)


def commands(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """A shell command for each cell, followed by the cell's name as a comment.

    Args:
      arguments: of the whole table's command line.
      names: the cells.
    """
    kept = [argument for argument in arguments if not argument.startswith("--commands")]
    line = shlex.join(["python", "-m", "xkd_jax.sweep", *kept])
    return [f"{line} --shard={i}/{len(names)}  # {name}" for i, name in enumerate(names, 1)]


def parse_shard(text: str) -> tuple[int, int]:
    """(I, N) of "I/N".

    Raises:
      UserError: it is something else.
    """
    numbers = text.split("/")
    if len(numbers) == 2 and all(number.isdecimal() for number in numbers):
        index, count = map(int, numbers)
        if 1 <= index <= count:
            return index, count
    raise UserError(f"--shard is {text!r}, but must be I/N with 1 <= I <= N, such as 2/4.")
