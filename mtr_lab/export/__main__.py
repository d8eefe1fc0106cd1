"""``mtr-lab export``, or ``python -m mtr_lab.export``: a model, reduced, in a file that runs without this library."""

from omegaconf import DictConfig

from mtr_lab.cli.help_pages import Program
from mtr_lab.cli.program import run_program
from mtr_lab.export.formats import check_request


def check(config: DictConfig) -> None:
    """Raise a ``UserError`` if no such file can be written."""
    check_request(str(config.format), str(config.precision), config.batch, config.opset)


def announce(config: DictConfig) -> str:
    """What is exported."""
    return (
        f"exporting {config.backbone.name} under {config.mtr.policy} at mtr.ratio={config.mtr.ratio} to {config.format}"
    )


PROGRAM = Program(
    command="mtr-lab export",
    config_name="export",
    function="mtr_lab.export.run:export",
    announce=announce,
    check=check,
    about="Write a reduced model to a file that runs without mtr_lab: ONNX for any runtime, or a .pt2 program for "
    "PyTorch. The file takes normalised images and says how to prepare pictures. It is compared with the model, "
    "then written to hydra.run.dir as BACKBONE.onnx or BACKBONE.pt2.",
    examples=(
        "format=onnx mtr.ratio=0.4",
        "format=pt2 backbone=vim_s mtr.ratio=0.3",
        "format=onnx precision=float16 backbone=vim_s",
        "format=onnx task=segmentation mtr.ratio=0.3",
    ),
)


def main() -> None:
    """The program."""
    run_program(PROGRAM)


if __name__ == "__main__":
    main()
