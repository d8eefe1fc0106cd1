"""Functions that ``test_distributed`` runs in launched processes, which import nothing else."""

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
        gathering = Gathering[Any]()
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
        Gathering[int]().finish([0])
    time.sleep(600)


def wait(config: DictConfig) -> None:
    """Note the process, and do nothing."""
    Path(config.folder, os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)


def gather(config: DictConfig) -> tuple[list[list[int]], str, str]:
    """In two processes: the gathered batches, the message of rank 0, and the start method of new processes."""
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    gathered = []
    for batches in config.batches:
        mine, gathering = list(range(rank, batches, 2)), Gathering[int]()
        for batch in mine:
            gathering.put(batch)
        end = time.monotonic() + 60
        while rank == 0 and batches and [len(arrived) for arrived in gathering._incoming] != [batches // 2]:
            assert time.monotonic() < end, "they come though the other has not finished"
            time.sleep(0.01)
        from_rank_zero(None)
        gathered.append(gathering.finish(mine))
    assert rank == 0 or not any(gathered)
    return gathered, from_rank_zero(f"of {rank}" if rank == 0 else ""), multiprocessing.get_start_method()
