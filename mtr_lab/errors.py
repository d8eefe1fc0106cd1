"""The one exception type for mistakes a user can fix, and the "did you mean" helper its messages share."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the user's input.

    The message names the value, what was expected and what to do next. The command line prints it without a
    traceback and exits with code 2; Python callers catch it as a ``ValueError``.
    """


def unknown(kind: str, name: str, known: Iterable[str], where: str | None = None) -> UserError:
    """The error for a name that is not one of ``known``: the nearest first, then all of them, or ``where`` they are."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return UserError(f"unknown {kind} {name!r}.{hint} {where or 'Available: ' + ', '.join(known) + '.'}")
