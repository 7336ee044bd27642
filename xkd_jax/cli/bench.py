"""Measures a recipe's training step: `xkd-jax bench --config RECIPE`."""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from xkd_jax.cli import train as command
from xkd_jax.cli.command import arguments_of, guard
from xkd_jax.errors import UserError

_ROUNDS = flags.DEFINE_integer("rounds", 20, "How often each program runs.")
_JSON = flags.DEFINE_string("json", "", "A file for the numbers.")
_USAGE = """\
usage: xkd-jax bench --config RECIPE [--config.FIELD=VALUE ...] [--rounds N] [--json FILE]

Times the training step of a recipe, or of each method that it compares, against its limit: one
forward pass of the teacher and one plain step of the student. Then times each part of the step:
data, views, teacher, student, method, adversary, optimizer. Nothing is trained or kept.

  --rounds N    how often each program runs, in turn with the others; default 20
  --json FILE   the numbers, for a program to read

examples:
  xkd-jax bench --config quickstart
  xkd-jax bench --config imagenet --config.data.dir=DIR --config.batch_size=128 --json step.json"""


@guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command line, `sys.argv[1:]` if `argv` is None; returns the exit code as `guard` says."""
    arguments = arguments_of(argv, _USAGE)
    config, _ = command.parse(arguments)
    if _ROUNDS.value < 1:
        raise UserError(f"--rounds={_ROUNDS.value} must be at least 1.")
    from xkd_jax.bench import measure  # `--help` needs no JAX
    from xkd_jax.reporting.files import write_file

    found = measure.measure(config, _ROUNDS.value)
    print(measure.describe(found))
    if _JSON.value:
        write_file(Path(_JSON.value), json.dumps(found, indent=2).encode() + b"\n")
    return 0
