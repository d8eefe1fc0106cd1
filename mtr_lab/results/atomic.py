"""Atomic writes: a file exists complete or not at all."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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


def remove_unfinished(folder: Path) -> None:
    """Remove from a folder what ``replace_file`` has left in processes that were killed; hold the folder's lock."""
    for path in folder.glob(".*"):
        if _UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


_UNFINISHED = re.compile(r"\..+\.(json|npz|safetensors|ckpt|csv|svg|png|gif)\.\d+")
