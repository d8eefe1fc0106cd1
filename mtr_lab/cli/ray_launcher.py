"""``hydra/launcher=ray``: the jobs of a sweep on the nodes of a Ray cluster, again on another one if a node dies."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from mtr_lab.errors import UserError


class RayLauncher(Launcher):
    """Runs every job as a Ray task.

    Args:
        address: of a running cluster, ``auto`` for the one of this machine; ``None`` starts one on this machine.
        num_cpus, num_gpus: that a job takes, which limits how many run at once.
        max_retries: how often a job is started again after its process or node has died.
    """

    def __init__(self, address: str | None, num_cpus: float, num_gpus: float, max_retries: int) -> None:
        self._address = address
        self._options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_retries": max_retries}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._function, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            import ray
        except ImportError as error:
            raise UserError("hydra/launcher=ray needs an extra: pip install 'mtr-lab[ray]'.") from error
        setup_globals()
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        if not ray.is_initialized():
            ray.init(address=self._address, include_dashboard=False, log_to_driver=True)
        shared = ray.put((self._context, self._config, self._function, Singleton.get_state()))
        task = ray.remote(**self._options)(_run)
        jobs = enumerate(job_overrides, initial_job_idx)
        returned: list[JobReturn] = ray.get([task.remote(shared, number, list(job)) for number, job in jobs])
        return returned


# Hydra makes launchers of the package hydra_plugins alone, and looks for them there by name.
RayLauncher.__module__ = "hydra_plugins.mtr_lab"
try:
    import hydra_plugins  # noqa: F401
except ImportError:  # no extra has brought a plugin
    sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
    sys.modules["hydra_plugins"].__path__ = []  # Hydra looks for plugins below it
sys.modules[RayLauncher.__module__] = sys.modules[__name__]


def _run(shared: Any, number: int, overrides: list[str]) -> JobReturn:
    context, config, function, state = shared
    os.chdir(config.hydra.runtime.cwd)  # folders are relative to it
    setup_globals()
    Singleton.set_state(state)
    loader: ConfigLoader = context.config_loader
    job = loader.load_sweep_config(config, overrides)
    with open_dict(job):
        job.hydra.job.id, job.hydra.job.num = f"{job.hydra.job.name}_{number}", number
    HydraConfig.instance().set_config(job)
    return run_job(
        hydra_context=context,
        task_function=function,
        config=job,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
