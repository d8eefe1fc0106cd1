"""``python -m mtr_lab.bench``: time backbones, policies and backends of the operations in turn."""

from omegaconf import DictConfig

from mtr_lab.cli import run_program


def main() -> None:
    """The program."""
    run_program("bench", "mtr_lab.benchmark:bench", announce)


def announce(config: DictConfig) -> str:
    """What is timed."""
    axes = ("backbone", "batch", "policy", "ratio")
    return "timing " + " ".join(f"bench.{axis}={config.bench[axis]}" for axis in axes)


if __name__ == "__main__":
    main()
