"""What every verb shares: its argument parser, and how it turns errors into sentences."""

import argparse
import functools
import os
import re
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn, Protocol

from xkd_jax.errors import UserError

INSTALLING_JAX = "https://docs.jax.dev/en/latest/installation.html"


class Main(Protocol):
    """A verb's `main`."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Returns the exit code; `argv` is `sys.argv[1:]` if None."""
        ...


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError`, and shows `examples` below its help.

    Args:
      verb: the name after `xkd-jax`.
      description: one sentence.
      examples: shown as they are.
    """

    def __init__(self, verb: str, description: str, examples: str):
        super().__init__(
            prog=f"xkd-jax {verb}",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print below its usage."""
        raise UserError(f"{message}; see {self.prog} --help.")


def arguments_of(argv: Sequence[str] | None, usage: str) -> list[str]:
    """The command line of a verb without a `Parser`; as there, --help prints and ends the process.

    Args:
      argv: the verb's; None for `sys.argv[1:]`.
      usage: the text of --help.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(usage)
        raise SystemExit(0)
    return arguments


def guard(main: Main) -> Main:
    """Wraps a verb's `main(argv)` so that expected failures end in one sentence and an exit code.

    2 for wrong input, files that can't be read or written and a platform on which JAX can't start;
    130 after Ctrl-C; 141 when the reader of a pipe has gone, silently. Anything else is a bug and
    keeps its traceback. In multi-process runs all processes end together.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        try:
            try:
                return main(argv)
            finally:
                sys.stdout.flush()
        except UserError as error:
            return _fail(f"xkd_jax: {error}", 2)
        except BrokenPipeError:
            # Python flushes standard output once more at exit, and would complain again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # as a shell reports SIGPIPE
        except OSError as error:
            return _fail(f"xkd_jax: {_explain_os_error(error)}", 2)
        except KeyboardInterrupt:
            return _fail("xkd_jax: interrupted; run the same command again to continue.", 130)
        except Exception as error:
            sentence = _explain_jax_failure(error)
            if sentence:
                return _fail(f"xkd_jax: {sentence}", 2)
            if not _several():
                raise
            return _fail(traceback.format_exc(), 1)

    return guarded


def _processes():
    """The module of multi-process training, unless nothing has imported it (and JAX) yet."""
    return sys.modules.get("xkd_jax.distributed.processes")


def _several() -> bool:
    processes = _processes()
    return processes is not None and processes.several()


def _fail(text: str, code: int) -> int:
    processes = _processes()
    if processes is not None:
        return processes.fail(text, code)
    print(text, file=sys.stderr)
    return code


def _explain_os_error(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        return f"a file or connection failed ({reason}); check the disk and the network."
    return f"{error.filename} can't be read or written ({reason}); give another path."


def _explain_jax_failure(error: Exception) -> str:
    """One sentence if `error` means that JAX can't start on the platform it was told to use."""
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(error, RuntimeError | AssertionError):
        return ""
    found = re.match(r"Unable to initialize backend '(\w+)': ([^\n]*)", str(error))
    wanted = jax.config.jax_platforms or ""
    if found:
        platform, reason = found.groups()
        reason = reason.split(" (set JAX_PLATFORMS")[0].split(" (you may need to")[0].rstrip(".")
    elif "cuda" in wanted and isinstance(error, AssertionError) and not _starts(jax):
        # JAX skips CUDA silently on a machine without a GPU, then asserts that it found a platform.
        platform, reason = "cuda", "no NVIDIA GPU is visible"
    else:
        return ""
    asked, instead = "", "set JAX_PLATFORMS=cpu"
    if wanted:
        asked, instead = f"JAX_PLATFORMS={wanted}, but ", "unset JAX_PLATFORMS"
    return (
        f"{asked}JAX can't use the platform {platform!r} here ({reason[:200]}); {instead}, or "
        f"install JAX for that platform: {INSTALLING_JAX}"
    )


def _starts(jax: ModuleType) -> bool:
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False
