"""Count the files that one evaluation enters: ``python experiments/files_entered.py``.

A file is entered if a function or a class body in it runs after the start of ``python -m mtr_lab``. The script prints
the number of these files and of their lines. ``PYTHONPATH`` may name the checkout of another version.
"""

import runpy
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType

import mtr_lab

PACKAGE = Path(mtr_lab.__file__).parent
OVERRIDES = (
    "trainer.accelerator=cpu trainer.limit_test_batches=1 dataset.batch_size=4 dataset.num_workers=0 "
    "timing.batch_size=2 timing.seconds=0.2"
)


def main() -> None:
    entered: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            entered.add(frame.f_code.co_filename)

    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["mtr_lab", *OVERRIDES.split(), f"hydra.run.dir={folder}"]
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            runpy.run_module("mtr_lab", run_name="__main__", alter_sys=True)
        finally:
            sys.setprofile(None)
    files = [Path(name) for name in entered if Path(name).is_relative_to(PACKAGE)]
    print(f"{len(files)} files of {sum(len(file.read_text().splitlines()) for file in files)} lines")


if __name__ == "__main__":
    main()
