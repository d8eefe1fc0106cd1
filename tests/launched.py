"""Functions that ``test_distributed`` runs in launched processes, which import nothing else."""

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from mtr_lab.tasks.ranks import Gathering, from_rank_zero


def fail(config: DictConfig) -> None:
    """Rank 1 fails as ``config.how`` says while rank 0 waits for it; for "receiving", rank 0 fails."""
    torch.distributed.init_process_group("gloo")
    fails = os.environ["RANK"] == ("0" if config.how == "receiving" else "1")
    if config.how in ("receiving", "sending"):
        gathering = Gathering[Any](print)
        gathering.put((lambda: None) if config.how == "sending" else 0)  # a function without a name cannot be pickled
    if fails:
        Path(config.file).write_text(str(time.time()))
        if config.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if config.how == "sending":
            time.sleep(2)
            gathering.put(1)
            time.sleep(600)
        raise ZeroDivisionError("by zero")
    if config.how in ("error", "killed"):
        Gathering[int](print).finish()
    time.sleep(600)


def wait(config: DictConfig) -> None:
    """Note the process, and do nothing, not even at SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as good as hanging in NCCL
    Path(config.folder, os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)


def fit(config: DictConfig) -> dict[str, list[float]]:
    """Train a linear model, its weights different in every process, for a few steps with DDP or the one for graphs."""
    from lightning import LightningModule, Trainer

    from mtr_lab.training.graphed_ddp import GRAPHED_DDP

    rank = int(os.environ["RANK"])

    class Linear(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(rank)
            self.layer, self.unused = torch.nn.Linear(3, 2), torch.nn.Parameter(torch.ones(2), requires_grad=False)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    images = torch.randn(12, 3, generator=torch.Generator().manual_seed(rank))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=GRAPHED_DDP if config.graphed else "ddp",
        max_epochs=1,
        use_distributed_sampler=False,
        **quiet,
    )
    module = Linear()
    trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=3))
    return {name: value.flatten().tolist() for name, value in module.state_dict().items()}


def listen(config: DictConfig) -> list[str]:
    """In two processes that have exchanged a message: the addresses that they and the launcher listen on, in hex."""
    torch.distributed.init_process_group("gloo")
    from_rank_zero(None)
    processes: list[Any] = [None, None]
    torch.distributed.all_gather_object(processes, os.getpid())
    sockets = set()
    for process in (*processes, os.getppid()):
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor))
    rows = [row.split() for file in ("tcp", "tcp6") for row in Path("/proc/net", file).read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


def interfaces(config: DictConfig) -> list[str]:
    """The network interfaces that gloo and NCCL are told to use in a launched process."""
    return [os.environ[f"{backend}_SOCKET_IFNAME"] for backend in ("GLOO", "NCCL")]


def gather(config: DictConfig) -> tuple[list[list[int]], str, str]:
    """In two processes: the gathered batches, the message of rank 0, and the start method of new processes."""
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    gathered = []
    for batches in config.batches:
        delivered: list[int] = []
        gathering = Gathering(delivered.append)
        for batch in range(rank, batches, 2):
            gathering.put(batch)
        end = time.monotonic() + 60
        while rank == 0 and len(delivered) < batches:
            assert time.monotonic() < end, "they come though the other has not finished"
            time.sleep(0.01)
        from_rank_zero(None)
        gathering.finish()
        gathered.append(delivered)
    assert rank == 0 or not any(gathered)
    return gathered, from_rank_zero(f"of {rank}" if rank == 0 else ""), multiprocessing.get_start_method()
