"""``mtr-lab bench``, or ``python -m mtr_lab.bench``: time models, policies and backends of the operations in turn."""

from omegaconf import DictConfig, ListConfig

from mtr_lab.cli.help_pages import Program
from mtr_lab.cli.program import run_program


def announce(config: DictConfig) -> str:
    """What is timed."""

    def values(axis: str) -> str:
        given = config.bench[axis]
        return ", ".join(map(str, given)) if isinstance(given, ListConfig) else str(given)

    asked = "ratio" if config.bench.speedup is None else "speedup"
    policies = f"{values('policy')} at {asked} {values(asked)}"
    return f"timing {values('backbone')} at batch {values('batch')}, policies {policies}"


PROGRAM = Program(
    command="mtr-lab bench",
    config_name="bench",
    function="mtr_lab.benchmark.run:bench",
    announce=announce,
    about="Time models, policies and backends in turn: images per second, latency, memory, and the share of the "
    "device's bound that is reached. Every list is an axis; all combinations are timed. Weights and images are random: "
    "speed does not depend on them. Writes bench.json to hydra.run.dir.",
    examples=(
        "bench.policy=[none,mtr,write] bench.ratio=[0.2,0.4]",
        "bench.backbone=[vim_ti,vim_s] bench.batch=[1,8]",
        "bench.speedup=[1.2,1.5]",
        "bench=h100",
    ),
)


def main() -> None:
    """The program."""
    run_program(PROGRAM)


if __name__ == "__main__":
    main()
