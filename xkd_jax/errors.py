"""Errors caused by the user's input, each reported in one sentence."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Invalid input. The message is one sentence: what is wrong, and what would be right.

    The command line prints it without a traceback and exits with code 2.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in `known`; suggests the closest ones that are.

    Args:
      kind: what is named, e.g. "network".
      name: what the user wrote.
      known: all valid names.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}."
    return UserError(f"unknown {kind} {name!r}; {hint}")
