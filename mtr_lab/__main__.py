"""``python -m mtr_lab``: evaluate a backbone unreduced and reduced."""

from omegaconf import DictConfig

from mtr_lab.cli import run_program


def main() -> None:
    """The ``mtr-lab`` command."""
    run_program("config", "mtr_lab.evaluation.run:evaluate", announce)


def announce(config: DictConfig) -> str:
    """What is evaluated."""
    mtr = config.mtr
    at = "the counts of mtr.schedule" if mtr.ratio is None else f"mtr.ratio={mtr.ratio}"
    return f"evaluating {config.backbone.name} on {config.dataset.get('name')}, unreduced and by {mtr.policy} at {at}"


if __name__ == "__main__":
    main()
