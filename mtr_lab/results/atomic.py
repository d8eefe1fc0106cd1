"""Atomic writes: a file exists complete or not at all."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mtr_lab.errors import MachineError, UserError, machine_error


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary stream whose content replaces ``path`` when the block ends without an exception.

    After a crash or an exception ``path`` is unchanged. The content is synced to disk before the file gets its name.
    Missing folders are created.

    Raises:
        OSError: it cannot be written; ``filename`` is ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within one file system.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # which a full disk does not tell
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def check_output(path: Path) -> None:
    """Raise an error if a file that the user named cannot be written, before the work that it is for.

    Raises:
        UserError: it is a folder, or below a file.
        MachineError: its folder is not writable.
    """
    if os.path.isdir(path):
        raise UserError(f"cannot write {path}: it is a folder.")
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: {folder} is not a folder.")
    if not os.access(folder, os.W_OK):
        raise MachineError(f"cannot write {path}: the folder {folder} is not writable.")


def write_output(path: Path, content: bytes) -> None:
    """Write a file that the user named, all of it or nothing; see :func:`replace_output`."""
    with replace_output(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def replace_output(path: Path) -> Iterator[BinaryIO]:
    """Open a file that the user named for writing, as :func:`replace_file` does.

    Raises:
        UserError: a file cannot have this path.
        MachineError: the machine refuses to write it.
    """
    try:
        with replace_file(path) as stream:
            yield stream
    except OSError as error:
        kind = UserError if machine_error(error) is None else MachineError
        raise kind(f"cannot write {path}: {error.strerror or error}.") from error


def remove_unfinished(folder: Path) -> None:
    """Remove from a folder what ``replace_file`` has left in processes that were killed; hold the folder's lock."""
    for path in folder.glob(".*"):
        if _UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


_UNFINISHED = re.compile(r"\..+\.(json|npz|safetensors|ckpt|csv|svg|png|gif)\.\d+")
