"""``mtr-lab train``, or ``python -m mtr_lab.train``: train a task's model."""

from omegaconf import DictConfig

from mtr_lab.cli.help_pages import Program
from mtr_lab.cli.program import run_program


def announce(config: DictConfig) -> str:
    """What is trained."""
    task, dataset = (config[group].get("name") for group in ("task", "dataset"))
    reduced = (
        "unreduced" if config.mtr.ratio == 0 else f"reduced by {config.mtr.policy} at mtr.ratio={config.mtr.ratio}"
    )
    epochs = f"{config.training.epochs} epoch{'s' * (config.training.epochs != 1)}"
    return f"training {config.backbone.name} for {task} on {dataset}, {epochs}, {reduced}"


PROGRAM = Program(
    command="mtr-lab train",
    config_name="train",
    function="mtr_lab.training.run:train",
    announce=announce,
    about="Train a classifier, a detector or a segmenter. Writes model.safetensors (averaged weights, half precision), "
    "metrics.csv, curve.svg, training.json and last.ckpt to hydra.run.dir.",
    examples=(
        "dataset.root=DIR dataset.holdout=0.1",
        "task=detection dataset=voc dataset.root=DIR",
        "backbone.pretrained=true mtr.ratio=0.4 dataset.root=DIR",
        "experiment=vim_nano dataset.root=DIR",
    ),
)


def main() -> None:
    """The program."""
    run_program(PROGRAM)


if __name__ == "__main__":
    main()
