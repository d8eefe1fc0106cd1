"""Files that exist complete or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary stream whose content becomes ``path`` when the block ends without an exception.

    The content is on the disk before the name is: after a crash ``path`` is what it was or what it should be. The
    folder is created; after an exception nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its target: a rename is atomic within one file system only.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
