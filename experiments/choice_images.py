"""Draw the validation images on which the lab's policies are chosen; the others stay unseen until the final table.

    python experiments/choice_images.py DIR experiments/vim_nano_choice/validation.txt

DIR holds the class folders of Imagenette's validation images. ``dataset.include`` and ``dataset.exclude`` take lists.
"""

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

COUNT = 1000
SEED = 0


def draw(ids: Iterable[str]) -> list[str]:
    """The ``COUNT`` ids (<class>/<image>) of the lowest hashes, sorted by name: the same for every order of ``ids``."""
    return sorted(sorted(ids, key=hash_of)[:COUNT])


def hash_of(id: str) -> str:
    """A hash of the seed and an id."""
    return hashlib.blake2b(f"{SEED}/{id}".encode(), digest_size=8).hexdigest()


def main() -> None:
    """Write the list."""
    directory, out = map(Path, sys.argv[1:])
    ids = [path.relative_to(directory).as_posix() for path in directory.glob("*/*.JPEG")]
    out.parent.mkdir(exist_ok=True)
    out.write_text("".join(f"{id}\n" for id in draw(ids)), encoding="utf-8")


if __name__ == "__main__":
    main()
