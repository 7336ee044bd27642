"""What goes wrong because of the user's input, said in one sentence."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A wrong input. Its text is one sentence: what is wrong, and what would be right.

    `main` prints it without a traceback and exits with code 2.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among `known`, with the nearest ones that are.

    Args:
      kind: what the name stands for, e.g. "network".
      name: what the user wrote.
      known: every name that would be right.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}."
    return UserError(f"unknown {kind} {name!r}; {hint}")
