"""``mtr-lab eval``, or ``python -m mtr_lab``: evaluate a model unreduced and reduced."""

from omegaconf import DictConfig, ListConfig, OmegaConf

from mtr_lab.cli.help_pages import Program
from mtr_lab.cli.program import run_program
from mtr_lab.cli.settings import BUDGETS


def announce(config: DictConfig) -> str:
    """What is evaluated."""
    mtr = config.mtr
    what = f"evaluating {config.backbone.name} on {config.dataset.get('name')}, unreduced"
    if mtr.ratio in (0, []):
        return what
    budgets = [f"{key}={value}" for key in BUDGETS if (value := OmegaConf.select(config, key)) is not None]
    several = isinstance(mtr.resolution, ListConfig)
    at = budgets[0] if budgets else f"mtr.resolution={mtr.resolution}" if several else "the counts of mtr.schedule"
    return f"{what} and by {mtr.policy} at {at}"


PROGRAM = Program(
    command="mtr-lab eval",
    config_name="config",
    function="mtr_lab.evaluation.run:evaluate",
    announce=announce,
    about="Evaluate a model unreduced and under a token-reduction policy: accuracy, FLOPs, images per second. By "
    "default it evaluates the bundled model on 500 bundled images, without a network. Writes result.json to "
    "hydra.run.dir.",
    examples=(
        "mtr.ratio=0.3",
        "mtr.speedup=1.5 timing.batch_size=64",
        "mtr.max_drop=0.02 dataset=imagenette",
        "backbone=vim_s reduction=hsa dataset.root=/data/imagenet",
        "-m reduction=mtr,write mtr.ratio=0.2,0.4 hydra.sweep.dir=DIR",
    ),
)


def main() -> None:
    """The program."""
    run_program(PROGRAM)


if __name__ == "__main__":
    main()
