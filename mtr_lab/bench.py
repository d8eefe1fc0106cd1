"""``python -m mtr_lab.bench``: time backbones, policies and backends of the operations in turn."""

from omegaconf import DictConfig, ListConfig

from mtr_lab.cli import run_program


def main() -> None:
    """The program."""
    run_program("bench", "mtr_lab.benchmark.run:bench", announce)


def announce(config: DictConfig) -> str:
    """What is timed."""

    def values(axis: str) -> str:
        given = config.bench[axis]
        return ", ".join(map(str, given)) if isinstance(given, ListConfig) else str(given)

    policies = f"{values('policy')} at ratio {values('ratio')}"
    return f"timing {values('backbone')} at batch {values('batch')}, policies {policies}"


if __name__ == "__main__":
    main()
