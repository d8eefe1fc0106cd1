"""Train the convolutional teacher of the Tiny ImageNet classifiers, and store it as timm does.

    python experiments/tiny_imagenet/train_teacher.py DIR OUT [--devices N] [--epochs E | --minutes M]

DIR has Tiny ImageNet's ``train`` and ``val``; the images of the ``tiny_imagenet`` experiment are held out. OUT receives
``config.json`` and ``model.safetensors``, for ``training.teacher=local-dir:OUT``, and ``teacher.json`` with the log.
On a GPU forward and backward passes are CUDA graphs, unless ``--eager``.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, SequentialLR

from mtr_lab.data import ImageDataModule
from mtr_lab.results.environment import describe_environment
from mtr_lab.tasks.classification.training import ClassifierTraining
from mtr_lab.training.averaging import WeightEMA
from mtr_lab.training.graphed_ddp import GRAPHED_DDP
from mtr_lab.training.randomness import SeedEpochs

ARCHITECTURE, CLASSES = "resnet18d", 200
WARMUP, VALIDATION = 3, 4  # epochs until the highest learning rate, and from one validation to the next
MEASURED = 4  # epochs whose time tells that of the next ones


class Resized(nn.Module):
    """A convolutional network that sees the images enlarged to ``side``, as its stem halves them twice."""

    num_classes = CLASSES
    reduction = None  # of tokens, which GraphedTraining asks for

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        network = timm.create_model(ARCHITECTURE, num_classes=CLASSES)
        self.network = network.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        images = F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False)
        logits: Tensor = self.network(images.contiguous(memory_format=torch.channels_last))
        return logits

    def no_weight_decay(self) -> set[str]:
        """Names of matrices without weight decay."""
        return set()


class Rows(lightning.Callback):
    """Keeps the metrics and the images per second of every epoch, validation included, and prints them."""

    def __init__(self, batch: int) -> None:
        self.rows: list[dict[str, float]] = []
        self._batch, self._start = batch, 0.0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        row = {name: float(value) for name, value in trainer.callback_metrics.items()}  # waits for the device
        rate = float(trainer.num_training_batches) * self._batch / (time.perf_counter() - self._start)
        self.rows.append({"epoch": trainer.current_epoch + 1, "img_per_s": round(rate), **row})
        if trainer.is_global_zero:
            print(self.rows[-1], flush=True)


class Deadline(lightning.Callback):
    """Ends training at a point in time, with the learning rate at 0.

    The number of epochs follows from the time of the last ones, without the first, which decodes the images and
    captures the graphs. Whenever it no longer fits, the rest of the cosine is stretched from where it is.

    Args:
        end: seconds since the epoch of ``time.time``.
    """

    def __init__(self, end: float) -> None:
        self._end = end
        self._ends: list[float] = []  # of the epochs since the first

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1  # the last epoch is validated

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self._ends.append(time.time())
        if len(self._ends) < 2:
            return
        times = self._ends[-MEASURED - 1 :]
        seconds, left = (times[-1] - times[0]) / (len(times) - 1), self._end - times[-1]
        done, planned = trainer.current_epoch + 1, trainer.max_epochs or 0
        surplus = left / seconds - (planned - done)  # epochs
        fits = planned <= done or -0.5 < surplus < 1.5
        epochs: int = trainer.strategy.broadcast(planned if fits else done + max(int(left / seconds), 1))
        if epochs != planned:
            stretch(trainer, epochs)
            trainer.fit_loop.max_epochs = epochs


def stretch(trainer: lightning.Trainer, epochs: int) -> None:
    """Let the cosine of the learning rate continue from its present value and end with epoch ``epochs``, from 1."""
    schedule: Any = trainer.lr_scheduler_configs[0].scheduler
    steps = (epochs - trainer.current_epoch - 1) * int(trainer.num_training_batches)
    cosine = schedule
    if isinstance(schedule, SequentialLR):
        steps -= max(schedule._milestones[0] - schedule.last_epoch, 0)  # of the warm-up
        cosine = schedule._schedulers[1]
    assert isinstance(cosine, CosineAnnealingLR)
    phase = cosine.last_epoch / cosine.T_max
    cosine.T_max = steps / (1 - phase)  # type: ignore[assignment]
    cosine.last_epoch = phase * cosine.T_max  # type: ignore[assignment]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--minutes", type=float, help="instead of --epochs: as many as end in this time")
    parser.add_argument("--side", type=int, default=128, help="pixels to which the images are enlarged")
    parser.add_argument("--batch", type=int, default=128, help="images of a step on each device")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--average", type=float, default=0.995, help="decay of the averaged weights per step")
    parser.add_argument("--workers", type=int, default=8, help="processes that decode, for each device")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--steps", type=int, help="of an epoch, to try it")
    options = parser.parse_args()

    lightning.seed_everything(0, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    config: dict[str, Any] = {
        "input_size": (3, 64, 64),
        "interpolation": "bicubic",
        "mean": timm.data.IMAGENET_DEFAULT_MEAN,
        "std": timm.data.IMAGENET_DEFAULT_STD,
        "crop_pct": 1.0,
    }
    data = ImageDataModule(
        data_config=config,
        name="tiny_imagenet",
        root=str(options.root),
        test_split="train",
        holdout=0.02,
        batch_size=options.batch * options.devices,
        num_workers=options.workers,
        train_cache="device",
        train_transform={"scale": [0.3, 1.0], "auto_augment": "rand-m9-mstd0.5-inc1"},
    )
    model = Resized(options.side)
    module = ClassifierTraining(
        model,
        lr=options.lr,
        weight_decay=0.05,
        warmup_epochs=WARMUP,
        label_smoothing=0.0,
        mixup=0.2,
        cutmix=1.0,
        cuda_graph=torch.cuda.is_available() and not options.eager,
    )
    deadline = [] if options.minutes is None else [Deadline(time.time() + 60 * options.minutes)]
    rows = Rows(options.batch * options.devices)
    trainer = lightning.Trainer(
        devices=options.devices,
        strategy=GRAPHED_DDP if options.devices > 1 else "auto",
        use_distributed_sampler=False,
        precision="bf16-mixed",
        max_epochs=options.epochs,
        limit_train_batches=options.steps,
        check_val_every_n_epoch=VALIDATION,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SeedEpochs(0), WeightEMA(options.average), rows, *deadline],
    )
    trainer.fit(module, datamodule=data)
    if not trainer.is_global_zero:
        return
    network: Any = model.network.half().cpu().to(memory_format=torch.contiguous_format)
    network.pretrained_cfg = {**network.pretrained_cfg, **config, "input_size": (3, options.side, options.side)}
    save_for_hf(network, str(options.out), safe_serialization=True)
    record = {
        "architecture": ARCHITECTURE,
        "side": options.side,
        "epochs": trainer.current_epoch,
        "average": options.average,
    }
    record |= {
        "devices": options.devices,
        "lr": options.lr,
        "batch": options.batch,
        "environment": describe_environment(),
        "rows": rows.rows,
    }
    (options.out / "teacher.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
