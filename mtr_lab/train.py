"""``python -m mtr_lab.train``: train a task's model."""

from omegaconf import DictConfig

from mtr_lab.cli import run_program


def main() -> None:
    """The program."""
    run_program("train", "mtr_lab.training.run:train", announce)


def announce(config: DictConfig) -> str:
    """What is trained."""
    task, dataset = (config[group].get("name") for group in ("task", "dataset"))
    reduced = (
        "unreduced" if config.mtr.ratio == 0 else f"reduced by {config.mtr.policy} at mtr.ratio={config.mtr.ratio}"
    )
    return f"training {config.backbone.name} for {task} on {dataset}, {config.training.epochs} epochs, {reduced}"


if __name__ == "__main__":
    main()
