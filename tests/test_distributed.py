"""``trainer=ddp``: the figures of one process, whoever starts the others, and what becomes of all when one fails."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import hydra
import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from small_run import SMALL

from mtr_lab.__main__ import main
from mtr_lab.configuration import CONF
from mtr_lab.errors import UserError
from mtr_lab.launch import launch
from mtr_lab.report.predictions import load_predictions
from mtr_lab.report.result import read_result
from mtr_lab.tasks.ranks import from_rank_zero, gather_batches

SAMPLE = Path(str(resources.files("mtr_lab") / "assets" / "imagenette_sample"))
WHOLE = [*(override for override in SMALL if "limit" not in override), "backbone.img_size=64", "mtr.ratio=0.3"]
WHOLE += ["trainer.accelerator=cpu"]
DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def image_folder(root: Path, images: int) -> list[str]:
    """Overrides for a dataset of so many of the bundled images, as evenly over the ten classes as can be."""
    for i, path in enumerate(zip(*(sorted(folder.iterdir()) for folder in sorted(SAMPLE.glob("n*"))), strict=True)):
        for image in path[: max(0, images - 10 * i)]:
            (root / image.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(image, root / image.parent.name)
    for folder in SAMPLE.glob("n*"):
        (root / folder.name).mkdir(exist_ok=True)
    assert len(list(root.rglob("*.JPEG"))) == images
    return ["dataset=imagefolder", f"dataset.root={root}", "dataset.num_workers=0"]


def unreadable(root: Path, number: int) -> str:
    """Damage an image of a folder, and name it."""
    image = sorted(root.rglob("*.JPEG"))[number]
    image.write_bytes(image.read_bytes()[:200])
    return image.relative_to(root).as_posix()


def equal(one: Path, other: Path) -> bool:
    """Whether two run folders hold the same figures, to the last digit."""
    first, second = (vars(load_predictions(folder)) for folder in (one, other))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    return read_result(one)["points"] == read_result(other)["points"]


@pytest.mark.parametrize(("images", "batch_size"), [(7, 4), (97, 4), (500, 50)])
def test_the_figures_do_not_depend_on_the_number_of_processes(
    run_program, tmp_path: Path, images: int, batch_size: int
) -> None:
    data = [*image_folder(tmp_path / "images", images), f"dataset.batch_size={batch_size}", "dataset.on_error=skip"]
    broken = unreadable(tmp_path / "images", images - 2)
    alone = run_program(main, *WHOLE, *data)
    assert alone.code == 0, alone.err
    folder = alone.folder.rename(tmp_path / "alone")
    for processes in (2, 3):
        run = run_program(main, *WHOLE, *data, *DDP, f"trainer.devices={processes}", "resume=false")
        assert run.code == 0, run.err
        assert run.out.count("wrote") == 2, run.out
        assert equal(run.folder, folder)
        assert read_result(run.folder)["points"][0]["images"] == images - 1
        assert read_result(run.folder)["points"][0]["skipped"] == [broken]
        shutil.rmtree(run.folder)


def test_a_limit_is_on_all_batches_together_and_the_leader_times_and_draws(run_program, tmp_path: Path) -> None:
    extra = ["trainer.limit_test_batches=3", "timing.batch_size=2", "timing.seconds=0", "pictures=5"]
    alone = run_program(main, *WHOLE, *extra)
    folder = alone.folder.rename(tmp_path / "alone")
    run = run_program(main, *WHOLE, *extra, *DDP)
    assert run.code == 0, run.err
    assert np.array_equal(load_predictions(run.folder).log_probs, load_predictions(folder).log_probs)
    assert all(point["img_per_s"] > 0 for point in read_result(run.folder)["points"])
    assert len(list((run.folder / "pictures").glob("*.png"))) == 5
    again = run_program(main, *WHOLE, *extra, "resume=true")
    assert "finished before" in again.out


def test_a_point_of_a_sweep_is_what_it_is_when_others_were_skipped(run_program, tmp_path: Path) -> None:
    sweep = ["hydra.mode=MULTIRUN", f"hydra.sweep.dir={tmp_path / 'sweep'}", *WHOLE, "trainer.limit_test_batches=3"]
    assert run_program(main, *sweep, "mtr.ratio=0.2").code == 0
    run = run_program(main, *sweep, *DDP, "mtr.ratio=0.2,0.99,0.3,0.4")
    assert "4 points: 2 computed, 1 finished before" in run.out
    assert run.code == 2
    assert "mtr.ratio=0.99 is out of reach" in run.out
    for ratio in (0.3, 0.4):
        (found,) = (tmp_path / "sweep").glob(f"*mtr.ratio={ratio}*/result.json")
        assert [point["ratio"] for point in read_result(found)["points"]] == [0, ratio]
        assert read_result(found)["unreduced"]["reused"]
        alone = run_program(main, *WHOLE, "trainer.limit_test_batches=3", f"mtr.ratio={ratio}", "resume=false")
        assert equal(found.parent, alone.folder)


def test_an_image_that_one_process_cannot_read_ends_both(run_program, tmp_path: Path) -> None:
    data = image_folder(tmp_path / "images", 12)
    broken = unreadable(tmp_path / "images", 5)  # in the second batch of four, which is rank 1's
    run = run_program(main, *WHOLE, *data, *DDP)
    assert run.code == 2
    assert run.err.count(f"mtr_lab: cannot decode image {broken}") == 1
    assert "Traceback" not in run.err
    assert not (run.folder / "result.json").exists()


def started(command: list[str], **environment: str) -> subprocess.Popen:
    path = {"PYTHONPATH": str(CONF.parent), "OMP_NUM_THREADS": "2"}
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


@pytest.fixture
def one_process(tmp_path: Path) -> SimpleNamespace:
    """A run of 97 images in one process: its overrides and its folder."""
    overrides = [*WHOLE, *image_folder(tmp_path / "images", 97), "dataset.batch_size=8"]
    run = started(["-m", "mtr_lab", *overrides, f"hydra.run.dir={tmp_path / 'alone'}"])
    out, _ = run.communicate()
    assert run.returncode == 0, out
    return SimpleNamespace(overrides=overrides, folder=tmp_path / "alone")


def test_processes_that_torchrun_has_started(one_process: SimpleNamespace, tmp_path: Path) -> None:
    where = f"hydra.run.dir={tmp_path / 'run'}"
    run = started([*TORCHRUN, "mtr_lab", *one_process.overrides, "trainer=ddp", "trainer.accelerator=cpu", where])
    out, _ = run.communicate()
    assert run.returncode == 0, out
    assert out.count("result.json") == 1
    assert equal(tmp_path / "run", one_process.folder)


def test_two_nodes_of_slurm(one_process: SimpleNamespace, tmp_path: Path) -> None:
    command = ["-m", "mtr_lab", *one_process.overrides, f"hydra.run.dir={tmp_path / 'run'}", "trainer=ddp"]
    command += ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2"]
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "job", "MASTER_PORT": str(free_port()), "MASTER_ADDR": "localhost"}
    both = [started(command, **slurm, SLURM_PROCID=str(rank), SLURM_NODEID=str(rank)) for rank in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert ["result.json" in output for output in outputs] == [True, False]
    assert equal(tmp_path / "run", one_process.folder)


def test_one_task_of_slurm_starts_its_own_processes(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1", "PROCID": "0", "JOB_NAME": "job"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    run = run_program(main, *SMALL, *DDP, "mtr.ratio=0")
    assert run.code == 0, run.err
    assert read_result(run.folder)["points"][0]["images"] == 8


def test_a_sweep_is_not_for_torchrun_and_other_nodes_are_not_for_this_program(run_program, tmp_path: Path) -> None:
    sweep = ["-m", f"hydra.sweep.dir={tmp_path / 'sweep'}", *SMALL, "trainer=ddp", "trainer.accelerator=cpu"]
    out, _ = started([*TORCHRUN, "mtr_lab", *sweep]).communicate()
    assert "run it without torchrun or srun" in out
    run = run_program(main, *SMALL, *DDP, "trainer.num_nodes=2")
    assert run.code == 2
    assert "Start it on every machine: torchrun --nnodes" in run.err


def test_one_device_needs_no_process_group(run_program) -> None:
    run = run_program(main, *SMALL, *DDP, "trainer.devices=1")
    assert run.code == 0, run.err
    assert not torch.distributed.is_initialized()
    assert "LOCAL_RANK" not in os.environ


@pytest.fixture
def hydra_config():
    """What Hydra sets while a program runs."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        HydraConfig.instance().set_config(hydra.compose("config", return_hydra_config=True))
    yield
    HydraConfig.instance().cfg = None


def fail(config: DictConfig) -> None:
    """Rank 1 fails in the way that ``config`` says while the others wait for it."""
    torch.distributed.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        Path(config.file).write_text(str(time.time()))
        if config.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"error": ZeroDivisionError, "mistake": UserError}[config.how]("by zero")
    gather_batches([0])
    time.sleep(600)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("error", RuntimeError, r"process 1 failed:(.|\n)*in fail(.|\n)*ZeroDivisionError: by zero"),
        ("mistake", UserError, "^by zero$"),
        ("killed", RuntimeError, "process 1 of 3 died: Signal 9"),
    ],
)
def test_a_process_that_fails_stops_the_others(
    hydra_config, tmp_path: Path, how: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        launch(fail, OmegaConf.create({"how": how, "file": str(tmp_path / "failed")}), 3)
    assert time.time() - float((tmp_path / "failed").read_text()) < 60


def gather(config: DictConfig) -> tuple[list[int], str, str]:
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    gathered = gather_batches(list(range(rank, config.batches, 3)))
    assert rank == 0 or not gathered
    return gathered, from_rank_zero(f"of {rank}" if rank == 0 else ""), multiprocessing.get_start_method()


def test_batches_are_gathered_in_their_order(hydra_config) -> None:
    for batches in (1, 8):
        gathered, told, start_method = launch(gather, OmegaConf.create({"batches": batches}), 3)
        assert gathered == list(range(batches))
        assert told == "of 0"
        assert start_method == multiprocessing.get_start_method()  # of the data loader's workers
