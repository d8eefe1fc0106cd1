"""Random numbers as a function of the seed and the epoch, so that a resumed run draws those of an uninterrupted one."""

import random

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer


class SeedEpochs(Callback):
    """Seeds Python, NumPy and PyTorch at the start of every epoch, differently in every process.

    Mixup and stochastic depth draw from these; the order and the augmentation of the images have their own numbers.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sequence = np.random.SeedSequence([self._seed, trainer.current_epoch, trainer.global_rank])
        number = int(sequence.generate_state(1)[0])
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002 (timm's mixup draws from the global generator)
        torch.manual_seed(number)
