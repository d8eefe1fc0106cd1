"""Exceptions with a message instead of a traceback, and two messages that many checks share."""

import difflib
import errno
import math
import re
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the user's input.

    The message names the value, what was expected and what to do next. The command line prints it without a
    traceback and exits with code 2; Python callers catch it as a ``ValueError``.
    """


class MachineError(RuntimeError):
    """What the machine lacks: room on a disk, memory, a permission.

    The command line prints the message without a traceback and exits with code 1.
    """


_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE}


def machine_error(error: BaseException) -> str | None:
    """The message if an exception tells what the machine lacks, ``None`` if it is another one."""
    if isinstance(error, MachineError):
        return str(error)
    if isinstance(error, BrokenPipeError):
        return "the output is no longer read (broken pipe). Files that were written are kept."
    if isinstance(error, OSError) and error.errno in _REFUSED:
        action = "write or read" if error.errno in (errno.EACCES, errno.EPERM) else "write"
        return f"cannot {action} {error.filename or 'a file'}: {error.strerror}."
    text = str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        asked = re.search(r"you tried to allocate (\d+) bytes|(?i:tried|unable) to allocate ([\d.]+ \w+)", text)
        size = "" if asked is None else f" {asked[2] or f'{int(asked[1]) / 2**30:.2f} GiB'} could not be allocated."
        return f"out of memory.{size} Lower dataset.batch_size, timing.batch_size or dataset.num_workers."
    if re.search(r"DataLoader worker .*(exited unexpectedly|killed by signal)", text):
        return f"{text.splitlines()[0].rstrip('. ')}: probably out of memory. Lower dataset.num_workers."
    return None


def one_line(error: object) -> str:
    """An exception's text in one line, without the types that OmegaConf and the folders that Hydra put below it."""
    text = re.sub(r"\n\s*((reference|object)_type=.*|full_key: *)$", "", str(error), flags=re.MULTILINE)
    text = text.partition("\nConfig search path:")[0].strip()
    text = re.sub(r"\n\s*full_key: (.*)", r", at \1", text)
    return re.sub(r"\s*\n\s*", " ", text)


def unknown(kind: str, name: object, known: Iterable[str], where: str | None = None) -> UserError:
    """The error for a name that is not one of ``known``; suggests the nearest, lists all or says ``where``."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return UserError(f"unknown {kind} {str(name)!r}.{hint} {where or 'Available: ' + ', '.join(known) + '.'}")


def check_number(name: str, value: object, kind: type[int] | type[float], least: float, most: float = math.inf) -> None:
    """Raise a ``UserError`` unless ``value`` is an integer (or a number, for ``float``) from ``least`` to ``most``."""
    fits = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    if not fits or not least <= value < math.inf or value > most:  # type: ignore[operator]
        article = "an integer" if kind is int else "a number"
        limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise UserError(f"{name}={value}: expected {article} {limits}.")


def user_errors() -> tuple[type[Exception], ...]:
    """The exceptions that mean a mistake of the user; OmegaConf's and Lightning's only where these are imported."""
    foreign = {
        "omegaconf.errors": "OmegaConfBaseException",
        "lightning.fabric.utilities.exceptions": "MisconfigurationException",
    }
    return (
        UserError,
        *(getattr(sys.modules[module], name) for module, name in foreign.items() if module in sys.modules),
    )
