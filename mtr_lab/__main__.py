"""``python -m mtr_lab``: evaluate a backbone unreduced and reduced."""

from mtr_lab.cli import run_program
from mtr_lab.evaluate import evaluate


def main() -> None:
    """The ``mtr-lab`` command."""
    run_program("config", evaluate)


if __name__ == "__main__":
    main()
