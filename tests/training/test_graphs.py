"""Training as CUDA graphs and on several devices: what needs no device."""

import pytest
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from omegaconf import OmegaConf

from mtr_lab.errors import UserError
from mtr_lab.tasks.segmentation.task import Segmentation


def test_gradients_of_several_batches_are_not_for_graphs() -> None:
    """A replay would overwrite those of the batch before."""
    config = OmegaConf.create(
        {
            "dataset": {"batch_size": 4},
            "trainer": {"cuda_graph": True, "accumulate_grad_batches": 2},
            "training": {"teacher": None},
        }
    )
    with pytest.raises(UserError, match=r"accumulate_grad_batches=2: a CUDA graph keeps .*cuda_graph=false"):
        Segmentation({}).check_training(config, 1)
    config.trainer.cuda_graph = False
    Segmentation({}).check_training(config, 1)


def test_lightning_asks_for_a_signal_by_the_method_that_training_replaces() -> None:
    assert hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor")
