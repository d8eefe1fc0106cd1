"""The smallest run of the default program, and training as the command line starts it."""

from mtr_lab.cli import run_program
from mtr_lab.train import train

SMALL = [
    "backbone.pretrained=false",
    "backbone.depth=6",
    "backbone.embed_dim=16",
    "dataset.batch_size=4",
    "trainer.limit_test_batches=2",
    "trainer.enable_progress_bar=false",
    "timing.batch_size=0",
]
"""Overrides that make the default program finish in a second."""


def train_main() -> None:
    """``python -m mtr_lab.train``."""
    run_program("train", train)
