"""``mtr-lab eval``, or ``python -m mtr_lab``: evaluate a model unreduced and reduced."""

from omegaconf import DictConfig, ListConfig

from mtr_lab.cli.help_pages import Program
from mtr_lab.cli.program import run_program


def announce(config: DictConfig) -> str:
    """What is evaluated."""
    mtr = config.mtr
    what = f"evaluating {config.backbone.name} on {config.dataset.get('name')}, unreduced"
    if mtr.ratio in (0, []):
        return what
    at = f"mtr.ratio={mtr.ratio}"
    if mtr.ratio is None:
        several = isinstance(mtr.resolution, ListConfig)
        at = f"mtr.resolution={mtr.resolution}" if several else "the counts of mtr.schedule"
    return f"{what} and by {mtr.policy} at {at}"


PROGRAM = Program(
    command="mtr-lab eval",
    config_name="config",
    function="mtr_lab.evaluation.run:evaluate",
    announce=announce,
    about="Evaluate a model unreduced and under a token-reduction policy: accuracy, FLOPs, images per second. By "
    "default the bundled model on 500 bundled images; needs no network. Writes result.json to hydra.run.dir.",
    examples=(
        "mtr.ratio=0.3",
        "backbone=vim_s reduction=hsa dataset.root=/data/imagenet",
        "-m reduction=mtr,write mtr.ratio=0.2,0.4 hydra.sweep.dir=DIR",
    ),
)


def main() -> None:
    """The program."""
    run_program(PROGRAM)


if __name__ == "__main__":
    main()
