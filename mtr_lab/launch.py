"""Launch one process a device, all with the configuration that this process has resolved."""

import copy
import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mtr_lab.errors import UserError, user_errors

T = TypeVar("T")


def has_to_launch(trainer: lightning.Trainer) -> bool:
    """Whether the trainer needs several processes, and neither torchrun nor SLURM has started them.

    Raises:
        UserError: several machines are asked for, and neither torchrun nor SLURM has started the processes; or torchrun
            or SLURM has started a sweep.
    """
    if trainer.world_size == 1:
        return False
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    if not environment.creates_processes_externally:
        if trainer.num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes={trainer.num_nodes}: this program starts processes on its own machine only. Start "
                "it on every machine: torchrun --nnodes=… --nproc-per-node=… -m mtr_lab …, or srun python -m mtr_lab …."
            )
        return True
    if HydraConfig.get().mode == RunMode.MULTIRUN and "MTR_LAB_LAUNCHED" not in os.environ:
        raise UserError(
            "a sweep (-m) starts the processes of every job itself: run it without torchrun or srun, as "
            "mtr-lab eval -m trainer=ddp …; hydra/launcher=slurm gives every job its own machine."
        )
    return False


def launch(function: Callable[[DictConfig], T], config: DictConfig, processes: int) -> T:
    """Call ``function`` with the resolved ``config`` in new processes on this machine, under torchelastic's agent.

    They get torchrun's environment variables. If one of them fails, the agent terminates the others.

    Returns:
        What rank 0's call returned.

    Raises:
        UserError: a process failed by the user's mistake.
        RuntimeError: a process failed otherwise. The message has the traceback of the first one that failed, or the
            rank of one that was killed.
    """
    resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    hydra: DictConfig = copy.deepcopy(HydraConfig.instance().cfg)  # type: ignore[assignment]
    with open_dict(hydra):
        OmegaConf.set_readonly(hydra.hydra, False)
        hydra.hydra.sweep.dir = str(HydraConfig.get().sweep.dir)  # may contain the time
    with tempfile.TemporaryDirectory() as errors:
        agent = elastic_launch(
            LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=processes,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                run_id="mtr_lab",
                max_restarts=0,
                local_addr="localhost",
            ),
            _work,
        )
        for name in list(logging.root.manager.loggerDict):
            if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
                logging.getLogger(name).setLevel(logging.CRITICAL)  # the error is raised below, once
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            returned: dict[int, T] = agent(function, resolved, hydra, errors, multiprocessing.get_start_method())
        except ChildFailedError as error:
            files = sorted(Path(errors).iterdir())  # by time: later errors may follow from the first one
            if files:
                raise pickle.loads(files[0].read_bytes()) from None
            rank, failure = error.get_first_failure()
            raise RuntimeError(f"process {rank} of {processes} died: {failure.message}") from None
        finally:
            for number, handler in handlers.items():  # the agent does not restore them
                signal.signal(number, handler)
    return returned[0]


def _work(
    function: Callable[[DictConfig], T], config: DictConfig, hydra: DictConfig, errors: str, start_method: str
) -> T:
    # For the data loader's workers: the agent has spawned this process, and they would be spawned too, and import
    # everything again.
    multiprocessing.set_start_method(start_method, force=True)
    HydraConfig.instance().cfg = hydra  # type: ignore[assignment]
    os.environ["MTR_LAB_LAUNCHED"] = "1"
    try:
        return function(config)
    except BaseException as error:
        reported: Exception = RuntimeError(f"process {os.environ['RANK']} failed:\n{traceback.format_exc()}")
        if isinstance(error, user_errors()):
            reported = error if isinstance(error, UserError) else UserError(str(error))
        (Path(errors) / f"{time.time_ns()}-{os.environ['RANK']}").write_bytes(pickle.dumps(reported))
        raise
