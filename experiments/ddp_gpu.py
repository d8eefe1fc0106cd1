"""Images per second of an evaluation on one and on several GPUs: the evaluation's own loop, its sharding and gathering.

    python experiments/ddp_gpu.py OUT.json                       # Vim-S, bf16, batch 256 a GPU, one and two GPUs
    python experiments/ddp_gpu.py OUT.json --backend triton --gpus 1 2 4

Synthetic images of random bytes, random weights: speed depends on neither. The images are in memory, and take the way
of decoded ones from there: batches put together in workers, copied as bytes, normalised on the device. A pass is timed
on rank 0, from a barrier before it to the end of the gathering, and once more from the end of its first batch on:
before it, workers start, which takes as long for few images as for many. "waiting" is the share of the latter between
the end of a batch and the start of the next, which has come, been copied and normalised by then. Without GPUs it runs
in CPU processes:

    python experiments/ddp_gpu.py OUT.json --accelerator cpu --model vim_nano --batch 4 --batches 3 --precision 32-true
"""

import argparse
import json
import logging
import multiprocessing
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils.data import Dataset

from mtr_lab import create_model, ops
from mtr_lab.data.batches import Collate, ImageLoader
from mtr_lab.data.shard import ShardedEvaluation
from mtr_lab.reduction import Reduction, policy_config
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.environment import describe_environment
from mtr_lab.tasks.classification.evaluation import ClassifierEvaluation
from mtr_lab.tasks.evaluation import OperatingPoint

DISTINCT = 512  # images; the others are the same again
PASSES = 3


class SyntheticImages(Dataset[dict[str, Any]]):
    def __init__(self, count: int, size: tuple[int, int, int]) -> None:
        self._count = count
        self._pixels = torch.randint(0, 256, (DISTINCT, *size), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._pixels[index % DISTINCT], "label": 0, "id": str(index), "hash": ""}


class SyntheticData(LightningDataModule):
    def __init__(self, count: int, size: tuple[int, int, int], batch: int, workers: int) -> None:
        super().__init__()
        self._images, self._collate = SyntheticImages(count, size), Collate(size)
        self._options = {"batch_size": batch, "num_workers": workers, "pin_memory": torch.cuda.is_available()}

    def test_dataloader(self) -> ImageLoader:
        return ImageLoader(self._images, collate_fn=self._collate, **self._options)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        images: Tensor = batch["image"].float().div_(255).sub_(0.45).div_(0.225)
        batch["image"] = self.trainer.precision_plugin.convert_input(images)
        return batch


class Clock(Callback):
    """When the first batch was done, and the time between batches from then on."""

    first: float
    waited: float
    _asked: float

    def on_test_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx > 0:
            self.waited += time.perf_counter() - self._asked

    def on_test_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.first, self.waited = time.perf_counter(), 0.0
        self._asked = time.perf_counter()


def measure(options: argparse.Namespace, processes: int, start_method: str) -> list[tuple[float, float, float]]:
    """What each process does. Seconds of each pass, those from its first batch on, and those waited of them."""
    multiprocessing.set_start_method(start_method, force=True)  # of the workers: as mtr_lab.launch does
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    ops.set_backend(options.backend)
    torch.manual_seed(0)
    model = create_model(options.model).eval()
    reduction = Reduction(model, policy_config("mtr"))
    points = [OperatingPoint("none", 0.0, reduction.solve(0.0))]
    size = model.pretrained_cfg["input_size"]
    clock = Clock()

    def trainer(batches: int) -> tuple[Trainer, ShardedEvaluation]:
        made = Trainer(
            accelerator=options.accelerator,
            devices=processes,
            strategy="ddp",
            precision=options.precision,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=clock,
        )
        data = SyntheticData(batches * processes * options.batch, size, options.batch, options.workers)
        return made, ShardedEvaluation(data, made)

    def run(batches: int) -> tuple[float, float, float]:
        task = ClassifierEvaluation(model, reduction, points, cuda_graph=options.cuda_graph)
        made, data = trainer(batches)
        made.strategy.setup_environment()
        torch.distributed.barrier()
        start = time.perf_counter()
        made.test(task, datamodule=data, verbose=False)
        task.gather()
        end = time.perf_counter()
        if made.is_global_zero:
            assert len(task.predictions().ids) == batches * processes * options.batch
        return end - start, end - clock.first, clock.waited

    run(2)  # compiles, and tunes the libraries
    return [run(options.batches) for _ in range(PASSES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="vim_s")
    parser.add_argument("--batch", type=int, default=256, help="images on a GPU at once")
    parser.add_argument("--batches", type=int, default=160, help="a GPU and pass")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--backend", default="auto", help="of the operations: auto, triton, mamba_ssm, …")
    parser.add_argument("--cuda-graph", action="store_true")
    parser.add_argument("--accelerator", default="gpu")
    parser.add_argument("--workers", type=int, default=6, help="of each process, that put batches together")
    options = parser.parse_args()
    rows = []
    for processes in options.gpus:
        launch = LaunchConfig(
            1, 1, processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="ddp_gpu", max_restarts=0
        )
        seconds = elastic_launch(launch, measure)(options, processes, multiprocessing.get_start_method())[0]
        images = options.batches * processes * options.batch
        whole, running, waited = zip(*seconds, strict=True)
        row = {
            "gpus": processes,
            "images": images,
            "img_per_s": (images - processes * options.batch) / statistics.median(running),
            "img_per_s_with_start": images / statistics.median(whole),
            "waiting": sum(waited) / sum(running),
            "seconds": seconds,
        }
        for rate in ("img_per_s", "img_per_s_with_start"):
            row[rate.replace("img_per_s", "scaling")] = row[rate] / (rows or [row])[0][rate]
        rows.append(row)
        print(
            f"{processes} × {options.accelerator}:",
            {key: f"{row[key]:.4g}" for key in ("img_per_s", "scaling", "waiting")},
            flush=True,
        )
    record = {
        "environment": describe_environment(),
        "settings": {key: value for key, value in vars(options).items() if key not in ("out", "gpus")},
        "rows": rows,
    }
    with replace_file(options.out) as stream:
        stream.write(f"{json.dumps(record, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
