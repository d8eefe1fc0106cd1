"""Launch one process per device, all with the configuration that this process has resolved."""

import copy
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread, current_thread, main_thread
from typing import Any

import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from torch.distributed import TCPStore
from torch.multiprocessing import ProcessExitedException, start_processes

from mtr_lab.cli.signals import exit_at_signals
from mtr_lab.errors import MachineError, UserError, machine_error, user_errors

GRACE = 3.0
"""Seconds after which processes that outlive another's failure get SIGTERM, and as many later SIGKILL: one that waits
for a dead one in NCCL hears nothing else."""


def has_to_launch(trainer: lightning.Trainer, trusted_network: bool = False) -> bool:
    """Whether the trainer needs several processes, and neither torchrun nor SLURM has started them.

    Processes of one machine listen on the loopback interface alone from then on.

    Args:
        trusted_network: the user vouches for the network between several machines.

    Raises:
        UserError: several machines are asked for, and neither torchrun nor SLURM has started the processes, or the user
            does not vouch for their network; or torchrun or SLURM has started a sweep.
    """
    if trainer.world_size == 1:
        return False
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    if trainer.num_nodes == 1:
        os.environ.update(_on_loopback())
    if not environment.creates_processes_externally:
        if trainer.num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes={trainer.num_nodes}: this program starts processes on its own machine only. Start "
                "it on every machine: torchrun --nnodes=… --nproc-per-node=… -m mtr_lab …, or srun python -m mtr_lab …."
            )
        return True
    if HydraConfig.get().mode == RunMode.MULTIRUN and not is_launched():
        raise UserError(
            "a sweep (-m) starts the processes of every job itself: run it without torchrun or srun, as "
            "mtr-lab eval -m trainer=ddp …; hydra/launcher=slurm gives every job its own machine."
        )
    if trainer.num_nodes > 1 and not trusted_network:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: the processes of several machines open ports without a password "
            "and unpickle what they receive, so anybody who reaches a port can run code. If nobody else reaches the "
            "network between the machines, add trainer.trusted_network=true."
        )
    return False


def is_launched() -> bool:
    """Whether :func:`launch` has started this process."""
    return "MTR_LAB_LAUNCHED" in os.environ


def launch(function: Callable[[DictConfig], Any], config: DictConfig, processes: int) -> Any:
    """Call ``function`` with the resolved ``config`` in new processes on this machine.

    They get torchrun's environment variables, and meet in a store that this process keeps. That store, gloo and NCCL
    listen on the loopback interface alone, since they unpickle what they receive. If one of the processes fails, the
    others are ended. They also end if this process does, by whatever signal.

    Returns:
        What rank 0's call returned, as JSON keeps it: a path is a string.

    Raises:
        UserError: a process failed by the user's mistake.
        MachineError: the machine lacked something.
        RuntimeError: a process failed otherwise. The message has the traceback of the first one that failed, or the
            rank of one that was killed.
    """
    resolved = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    hydra: DictConfig = copy.deepcopy(HydraConfig.instance().cfg)  # type: ignore[assignment]
    with open_dict(hydra):
        OmegaConf.set_readonly(hydra.hydra, False)
        hydra.hydra.sweep.dir = str(HydraConfig.get().sweep.dir)  # may contain the time
    logging.getLogger("torch.multiprocessing").setLevel(logging.CRITICAL)  # the error is raised below, once
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    with tempfile.TemporaryDirectory() as folder, exit_at_signals():
        arguments = (processes, port, function, resolved, hydra, folder, multiprocessing.get_start_method())
        with _ignoring_sigint():
            ranks: Any = start_processes(_work, arguments, processes, join=False)
        try:
            while not ranks.join(grace_period=GRACE):
                pass
            return json.loads((Path(folder) / "returned").read_text(encoding="utf-8"))
        except ProcessExitedException as error:
            files = sorted(Path(folder).glob("error-*"))  # by time: later errors may follow from the first one
            kind, message = json.loads(files[0].read_text(encoding="utf-8")) if files else ("", "")
            first = _ERRORS[kind](message) if files else None
            if first is not None and error.signal_name is None:
                raise first from None
            reason = f"Signal {-error.exit_code} ({error.signal_name})" if error.signal_name else str(error)
            raise RuntimeError(f"process {error.error_index} of {processes} died: {reason}") from first
        finally:
            _end(ranks.processes)
            del store


@contextmanager
def _ignoring_sigint() -> Iterator[None]:
    """Ignore Ctrl-C; processes that are started meanwhile ignore it from their first line on.

    It reaches them as well as this process, which ends them.
    """
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_ERRORS = {error.__name__: error for error in (UserError, MachineError, RuntimeError)}
"""What a process reports to its launcher, by name."""


def _end(processes: list[Any]) -> None:
    """End those of the processes that still run."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + GRACE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()


def _work(
    rank: int,
    processes: int,
    port: int,
    function: Callable[[DictConfig], Any],
    config: DictConfig,
    hydra: DictConfig,
    folder: str,
    start_method: str,
) -> None:
    Thread(target=_end_with_launcher, daemon=True).start()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="mtr_lab",
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_USE_AGENT_STORE="True",  # the launcher's; else rank 0 would open one
        MTR_LAB_LAUNCHED="1",
        **_on_loopback(),
    )
    # For the data loader's workers: this process was spawned, and they would be spawned too, and import everything
    # again.
    multiprocessing.set_start_method(start_method, force=True)
    HydraConfig.instance().cfg = hydra  # type: ignore[assignment]
    try:
        returned = json.dumps(function(config), default=str)
    except BaseException as error:
        kind, message = "RuntimeError", f"process {rank} failed:\n{traceback.format_exc()}"
        if isinstance(error, user_errors()):
            kind, message = "UserError", str(error)
        elif (lacking := machine_error(error)) is not None:
            kind, message = "MachineError", lacking
        (Path(folder) / f"error-{time.time_ns()}-{rank}").write_text(json.dumps([kind, message]), encoding="utf-8")
        sys.exit(1)
    if rank == 0:
        (Path(folder) / "returned").write_text(returned, encoding="utf-8")


def _on_loopback() -> dict[str, str]:
    """The variables by which gloo and NCCL listen on the interface that only this machine reaches."""
    name = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}


def _end_with_launcher() -> None:
    """Kill this process when the one that launched it has ended, if only by SIGKILL."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os.kill(os.getpid(), signal.SIGKILL)
