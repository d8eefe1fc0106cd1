"""``trainer=ddp``: the figures of a single process, with any launcher; and the end of all processes when one fails."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from launched import fail, fit, gather, interfaces, listen, wait
from lightning.fabric.plugins.environments import MPIEnvironment
from omegaconf import OmegaConf
from safetensors.torch import load_file
from small_dense import DATA, DETECTION, SEGMENTATION
from small_run import SMALL
from torch.multiprocessing import start_processes

from mtr_lab.__main__ import main
from mtr_lab.compose import make_trainer
from mtr_lab.configuration import CONF
from mtr_lab.launch import has_to_launch, launch
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import read_result
from mtr_lab.tasks.classification.training import ClassifierTraining
from mtr_lab.train import main as train_main

SAMPLE = Path(str(resources.files("mtr_lab") / "assets" / "imagenette_sample"))
WHOLE = [*(override for override in SMALL if "limit" not in override), "backbone.img_size=64", "mtr.ratio=0.3"]
WHOLE += ["trainer.accelerator=cpu"]
DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def image_folder(root: Path, images: int) -> list[str]:
    """Overrides for a dataset of ``images`` bundled images, spread evenly over the ten classes."""
    for i, path in enumerate(zip(*(sorted(folder.iterdir()) for folder in sorted(SAMPLE.glob("n*"))), strict=True)):
        for image in path[: max(0, images - 10 * i)]:
            (root / image.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(image, root / image.parent.name)
    for folder in SAMPLE.glob("n*"):
        (root / folder.name).mkdir(exist_ok=True)
    assert len(list(root.rglob("*.JPEG"))) == images
    return ["dataset=imagefolder", f"dataset.root={root}", "dataset.num_workers=0"]


def unreadable(root: Path, number: int) -> str:
    """Damage an image of a folder, and return its name."""
    image = sorted(root.rglob("*.JPEG"))[number]
    image.write_bytes(image.read_bytes()[:200])
    return image.relative_to(root).as_posix()


def same_predictions(one: Path, other: Path) -> bool:
    """Whether two run folders hold the same predictions, to the last digit."""
    first, second = (vars(load_predictions(folder)) for folder in (one, other))
    return all(np.array_equal(first[name], second[name], equal_nan=first[name].dtype.kind == "f") for name in first)


def equal(one: Path, other: Path) -> bool:
    """Whether two run folders hold the same figures, to the last digit."""
    return same_predictions(one, other) and repr(read_result(one)["points"]) == repr(read_result(other)["points"])


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched processes are forked from one that has imported everything; their output is lost."""
    multiprocessing.set_forkserver_preload(["mtr_lab.evaluation.run"])
    monkeypatch.setattr("mtr_lab.launch.start_processes", partial(start_processes, start_method="forkserver"))


def test_the_figures_are_those_of_one_process_even_if_another_has_no_batch(forked, run_program, tmp_path: Path) -> None:
    data = [*image_folder(tmp_path / "images", 7), "dataset.on_error=skip"]
    broken = unreadable(tmp_path / "images", 5)
    alone = run_program(main, *WHOLE, *data)
    assert alone.code == 0, alone.err
    folder = alone.folder.rename(tmp_path / "alone")
    run = run_program(main, *WHOLE, *data, *DDP, "trainer.devices=3", "resume=false")
    assert run.code == 0, run.err
    assert equal(run.folder, folder)
    assert read_result(run.folder)["points"][0]["images"] == 6
    assert read_result(run.folder)["points"][0]["skipped"] == [broken]


@pytest.mark.slow
def test_processes_that_the_program_has_started_write_and_print_once(run_program, tmp_path: Path) -> None:
    data = image_folder(tmp_path / "images", 97)
    alone = run_program(main, *WHOLE, *data)
    assert alone.code == 0, alone.err
    folder = alone.folder.rename(tmp_path / "alone")
    run = run_program(main, *WHOLE, *data, *DDP)
    assert run.code == 0, run.err
    assert run.out.count("wrote") == 2, run.out
    assert equal(run.folder, folder)
    assert read_result(run.folder)["points"][0]["images"] == 97


@pytest.mark.slow
def test_the_processes_may_have_different_numbers_of_batches(forked, run_program, tmp_path: Path) -> None:
    data = image_folder(tmp_path / "images", 500)
    alone = run_program(main, *WHOLE, *data)
    assert alone.code == 0, alone.err
    folder = alone.folder.rename(tmp_path / "alone")
    run = run_program(main, *WHOLE, *data, *DDP, "trainer.devices=3")
    assert run.code == 0, run.err
    assert equal(run.folder, folder)
    assert read_result(run.folder)["points"][0]["images"] == 500


@pytest.mark.slow
def test_a_job_of_a_sweep_reuses_the_unreduced_model_and_changes_no_digit(forked, run_program, tmp_path: Path) -> None:
    """The limit is on the batches of both processes together; rank 0 times and draws."""
    overrides = [*WHOLE, "trainer.limit_test_batches=3", "timing.batch_size=2", "timing.seconds=0", "pictures=2"]
    sweep = ["hydra.mode=MULTIRUN", f"hydra.sweep.dir={tmp_path / 'sweep'}", *overrides]
    assert run_program(main, *sweep, "mtr.ratio=0.2").code == 0
    run = run_program(main, *sweep, *DDP, "mtr.ratio=0.2,0.99,0.3")
    assert "3 points: 1 computed, 1 finished before" in run.out
    assert run.code == 2
    assert "mtr.ratio=0.99 is out of reach" in run.out
    (found,) = (path.parent for path in (tmp_path / "sweep").glob("*mtr.ratio=0.3*/result.json"))
    result = read_result(found)
    assert [point["ratio"] for point in result["points"]] == [0, 0.3]
    assert result["unreduced"]["reused"]
    assert all(point["img_per_s"] > 0 for point in result["points"])
    assert len(list((found / "pictures").glob("*.png"))) == 2
    alone = run_program(main, *overrides, "mtr.ratio=0.3", "timing.batch_size=0", "pictures=0")
    assert same_predictions(found, alone.folder)


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_ends_both(forked, run_program, tmp_path: Path) -> None:
    data = image_folder(tmp_path / "images", 12)
    broken = unreadable(tmp_path / "images", 5)  # in the second batch of four, of rank 1
    run = run_program(main, *WHOLE, *data, *DDP)
    assert run.code == 2
    assert run.err.count(f"mtr_lab: cannot decode image {broken}") == 1
    assert "Traceback" not in run.err
    assert not (run.folder / "result.json").exists()


def started(*command: str, **environment: str) -> subprocess.Popen:
    """Start Python with the number of threads of this process, on which the sums of a convolution depend."""
    path = {"PYTHONPATH": str(CONF.parent), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**os.environ, **path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


DENSE = ["dataset.batch_size=2", "trainer.limit_test_batches=3", "timing.batch_size=0", "mtr.ratio=0.2"]


@pytest.mark.slow
def test_processes_that_torchrun_has_started(run_program, tmp_path: Path) -> None:
    overrides = [*DETECTION, *DENSE]
    alone = run_program(main, *overrides)
    assert alone.code == 0, alone.err
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mtr_lab"]
    run = started(*torchrun, *overrides, "trainer=ddp", "trainer.accelerator=cpu", f"hydra.run.dir={tmp_path / 'both'}")
    out, _ = run.communicate()
    assert run.returncode == 0, out
    assert out.count("result.json") == 1
    assert equal(tmp_path / "both", alone.folder)
    assert [point["images"] for point in read_result(alone.folder)["points"]] == [6, 6]


@pytest.mark.slow
def test_two_nodes_of_slurm(run_program, tmp_path: Path) -> None:
    overrides = [*SEGMENTATION, *DENSE]
    alone = run_program(main, *overrides)
    assert alone.code == 0, alone.err
    command = ["mtr_lab", *overrides, f"hydra.run.dir={tmp_path / 'both'}", "trainer=ddp", "trainer.accelerator=cpu"]
    command += ["trainer.devices=1", "trainer.num_nodes=2", "trainer.trusted_network=true"]
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "job", "MASTER_PORT": str(free_port()), "MASTER_ADDR": "localhost"}
    both = [started(*command, **slurm, SLURM_PROCID=str(rank), SLURM_NODEID=str(rank)) for rank in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert ["result.json" in output for output in outputs] == [True, False]
    assert equal(tmp_path / "both", alone.folder)


def test_one_task_of_slurm_starts_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1", "PROCID": "0", "JOB_NAME": "job"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("config", ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"])
    assert has_to_launch(make_trainer(config.trainer, distributed=True, logger=False))


def test_a_sweep_is_not_for_torchrun(run_program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variables = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    variables |= {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run = run_program(main, "hydra.mode=MULTIRUN", f"hydra.sweep.dir={tmp_path / 'sweep'}", *SMALL, *DDP)
    assert run.code == 2
    assert "run it without torchrun or srun" in run.out + run.err


def test_other_nodes_are_not_for_this_program(run_program) -> None:
    run = run_program(main, *SMALL, *DDP, "trainer.num_nodes=2")
    assert run.code == 2
    assert "Start it on every machine: torchrun --nnodes" in run.err


def test_several_machines_need_the_users_word_for_their_network(run_program, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "LOCAL_RANK": "0", "GROUP_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    variables |= {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    for name, value in {**variables, "GROUP_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    run = run_program(main, *SMALL, "trainer=ddp", "trainer.accelerator=cpu")
    assert run.code == 2
    assert "trainer.trusted_network=true" in run.err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_of_one_machine_listen_on_the_loopback_interface_alone(
    hydra_config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where the shell names another interface, as those of clusters do."""
    others = [name for _, name in socket.if_nameindex() if name.startswith(("eth", "en"))]
    if not others:
        pytest.skip("there is no other interface")
    for backend in ("GLOO", "NCCL"):
        monkeypatch.setenv(f"{backend}_SOCKET_IFNAME", others[0])
    monkeypatch.setattr("mtr_lab.launch.start_processes", partial(start_processes, start_method="fork"))
    addresses = launch(listen, OmegaConf.create(), 2)
    assert len(addresses) >= 3  # the store, and gloo in both processes
    assert set(addresses) == {"0100007F"}


def test_nccl_is_told_the_loopback_interface(hydra_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the shell names another; in launched processes, and in those that torchrun has started on one machine."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    names = [f"{backend}_SOCKET_IFNAME" for backend in ("GLOO", "NCCL")]
    for name in names:
        monkeypatch.setenv(name, "eth9")
    monkeypatch.setattr("mtr_lab.launch.start_processes", partial(start_processes, start_method="fork"))
    assert launch(interfaces, OmegaConf.create(), 2) == [loopback, loopback]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("config", ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"])
    has_to_launch(make_trainer(config.trainer, distributed=True, logger=False))
    assert [os.environ[name] for name in names] == [loopback, loopback]


@pytest.mark.parametrize("overrides", [[], DDP])
def test_mpi_is_not_looked_for(monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> None:
    """Once imported, it listens on all interfaces."""
    monkeypatch.setattr(MPIEnvironment, "detect", lambda: pytest.fail("MPI is imported"))
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("config", overrides)
    make_trainer(config.trainer, distributed=True, logger=False)


def test_one_device_needs_no_process_group(run_program) -> None:
    run = run_program(main, *SMALL, *DDP, "trainer.devices=1")
    assert run.code == 0, run.err
    assert not torch.distributed.is_initialized()
    assert "LOCAL_RANK" not in os.environ


@pytest.fixture
def hydra_config(forked):
    """Hydra's configuration, as while a program runs."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        HydraConfig.instance().set_config(hydra.compose("config", return_hydra_config=True))
    yield
    HydraConfig.instance().cfg = None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("error", r"process 1 failed:(.|\n)*in fail(.|\n)*ZeroDivisionError: by zero"),
        pytest.param("killed", r"process 1 of 2 died: Signal 9 \(SIGKILL\)$", marks=pytest.mark.slow),
        ("receiving", r"process 0 failed:(.|\n)*in fail(.|\n)*ZeroDivisionError: by zero"),
    ],
)
def test_a_process_that_fails_stops_the_other(hydra_config, tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        launch(fail, OmegaConf.create({"how": how, "file": str(tmp_path / "failed")}), 2)
    assert time.time() - float((tmp_path / "failed").read_text()) < 60


@pytest.mark.parametrize(
    ("killed", "number", "code"),
    [
        ("launcher", signal.SIGKILL, -signal.SIGKILL),
        ("launcher", signal.SIGTERM, 128 + signal.SIGTERM),
        pytest.param("rank", signal.SIGKILL, 1, marks=pytest.mark.slow),
    ],
)
def test_a_kill_ends_all_within_15_seconds(
    hydra_config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, killed: str, number: signal.Signals, code: int
) -> None:
    monkeypatch.setattr("mtr_lab.launch.start_processes", partial(start_processes, start_method="fork"))
    arguments = (wait, OmegaConf.create({"folder": str(tmp_path)}), 2)
    launcher = multiprocessing.get_context("fork").Process(target=launch, args=arguments)
    launcher.start()
    started = lambda: [int(path.read_text() or 0) for path in tmp_path.iterdir()]  # noqa: E731
    until(lambda: len(started()) == 2 and all(started()))
    assert all(map(runs, started()))
    os.kill(launcher.pid if killed == "launcher" else started()[0], number)
    until(lambda: not any(map(runs, started())))
    launcher.join(5)
    assert launcher.exitcode == code


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, 15 seconds at most."""
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def runs(process: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_rank_that_cannot_send_fails_with_its_next_batch(hydra_config, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"process 1 failed:(.|\n)*gathering\.put\(1\)(.|\n)*[Pp]ickl"):
        launch(fail, OmegaConf.create({"how": "sending", "file": str(tmp_path / "failed")}), 2)


def test_batches_are_gathered_in_their_order(hydra_config) -> None:
    gathered, told, start_method = launch(gather, OmegaConf.create({"batches": [0, 1, 7, 40]}), 2)
    assert gathered == [list(range(batches)) for batches in (0, 1, 7, 40)]
    assert told == "of 0"
    assert start_method == multiprocessing.get_start_method()  # of the data loader's workers


def test_gradients_averaged_in_one_message_train_as_ddp_does(hydra_config) -> None:
    """Also from weights that differ."""
    expected, weights = (launch(fit, OmegaConf.create({"graphed": graphed}), 2) for graphed in (False, True))
    for name, value in expected.items():
        assert weights[name] == pytest.approx(value), name


@pytest.fixture
def training_folder(tmp_path: Path) -> list[str]:
    """Overrides to train on twelve of the bundled images, three classes, without randomness of a process's own."""
    for wnid in sorted(path.name for path in SAMPLE.glob("n*"))[:3]:
        images = sorted((SAMPLE / wnid).iterdir())
        for split, chosen in (("train", images[:5]), ("val", images[5:6])):
            (tmp_path / "images" / split / wnid).mkdir(parents=True)
            for image in chosen:
                shutil.copy(image, tmp_path / "images" / split / wnid)
    return [
        f"dataset.root={tmp_path / 'images'}",
        "dataset.num_workers=0",
        "dataset.batch_size=4",
        "dataset.holdout=0.2",
        *("backbone.depth=3", "backbone.embed_dim=16", "backbone.img_size=48"),
        *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false"),
        *("training.mixup=0", "training.cutmix=0", "training.epochs=2", "training.warmup_epochs=0"),
        "training.ema_decay=0.5",
    ]


@pytest.mark.slow
def test_two_processes_train_as_one_does(run_program, training_folder: list[str], tmp_path: Path) -> None:
    """Order, augmentation, gradients and average; also if a run of one process is resumed by two."""
    alone = run_program(train_main, *training_folder)
    assert alone.code == 0, alone.err
    expected = load_file(alone.folder / "model.safetensors")
    losses = (alone.folder / "metrics.csv").read_text().splitlines()[-1].split(",")[4]
    shutil.rmtree(alone.folder)

    def same(overrides: list[str]) -> None:
        run = run_program(train_main, *training_folder, *DDP, *overrides)
        assert run.code == 0, run.err
        assert run.out.count("model.safetensors") == 1
        record = json.loads((run.folder / "training.json").read_text())
        assert (record["devices"], record["epochs"]) == (2, 2)
        assert record["final"]["train_loss"] == pytest.approx(float(losses), rel=1e-4)
        for name, value in load_file(run.folder / "model.safetensors").items():
            torch.testing.assert_close(value, expected[name], rtol=5e-3, atol=1e-4)

    same([])
    with pytest.MonkeyPatch.context() as patch:  # one process, one epoch
        stop = lambda module: module.current_epoch == 0 or pytest.fail("stopped")  # noqa: E731
        patch.setattr(ClassifierTraining, "on_train_epoch_start", stop)
        with pytest.raises(pytest.fail.Exception):
            run_program(train_main, *training_folder)
    last = shutil.copy(alone.folder / "last.ckpt", tmp_path / "one.ckpt")
    same([f"training.resume={last}"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("detection", DETECTION), ("segmentation", SEGMENTATION)])
def test_two_processes_train_a_dense_task(forked, run_program, tmp_path: Path, name: str, options: list[str]) -> None:
    training = ["dataset.batch_size=4", "dataset.holdout=0.4", "training.epochs=2", "training.warmup_epochs=0"]
    run = run_program(train_main, *options, *DATA[name](tmp_path / "data"), *training, *DDP, "mtr.ratio=0.1")
    assert run.code == 0, run.err
    assert json.loads((run.folder / "training.json").read_text())["steps"] == 2
