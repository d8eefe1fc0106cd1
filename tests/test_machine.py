"""What the machine may lack while it evaluates: memory of the device or of the host, a worker, a permission."""

import gc
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from example_runs import write_run
from small_dense import DETECTION, QUICK, SEGMENTATION
from small_run import SMALL
from torch.utils.data import get_worker_info

from mtr_lab.__main__ import main
from mtr_lab.backbones.vision_mamba import VisionMamba
from mtr_lab.data.classification.images import Preparation
from mtr_lab.results.predictions_file import load_predictions
from mtr_lab.results.schema import read_result
from mtr_lab.tasks.classification.evaluation import ClassifierEvaluation

TASKS = {
    "classification": [*SMALL, "backbone.img_size=32", "mtr.ratio=0.3", "trainer.accelerator=cpu"],
    "detection": [*DETECTION, *QUICK, "dataset.batch_size=4"],
    "segmentation": [*SEGMENTATION, *QUICK, "dataset.batch_size=4"],
}


@pytest.fixture
def with_memory_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """``with_memory_for(2)``: the device has no memory for more images; -> the sizes of the batches it runs."""
    embed, run = VisionMamba.embed, []

    def limit(most: int) -> list[int]:
        def limited(self, images):
            if len(images) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …")
            run.append(len(images))
            return embed(self, images)

        monkeypatch.setattr(VisionMamba, "embed", limited)
        return run

    return limit


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(run_program, with_memory_for, task: str) -> None:
    whole = run_program(main, *TASKS[task])
    assert whole.code == 0, whole.err
    assert "batch_size" not in read_result(whole.folder)
    expected = vars(load_predictions(whole.folder))
    batches = with_memory_for(1)
    run = run_program(main, *TASKS[task], "resume=false")
    assert run.code == 0, run.err
    assert set(batches) == {1}
    assert read_result(run.folder)["batch_size"] == 1
    assert run.out.count("out of memory at") == 2  # at 4 and at 2 images, in the first batch
    found = vars(load_predictions(run.folder))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_gpu_that_is_full_gets_smaller_batches(run_program, cuda_graph: bool) -> None:
    """It really is: the process may take three quarters of what the batch needs."""
    model = ["backbone.embed_dim=384", "backbone.img_size=224", "backbone.pretrained=false", "mtr.ratio=0.3"]
    run_of = [
        "dataset.batch_size=128",
        "trainer.limit_test_batches=2",
        "timing.batch_size=0",
        "trainer.accelerator=gpu",
    ]
    options = [*model, *run_of, "trainer.enable_progress_bar=false", f"trainer.cuda_graph={cuda_graph}", "resume=false"]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    whole = run_program(main, *options)
    assert whole.code == 0, whole.err
    assert "batch_size" not in read_result(whole.folder)
    expected = load_predictions(whole.folder).log_probs
    needed = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.75 * needed / total)
    try:
        run = run_program(main, *options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert run.code == 0, run.err
    assert "out of memory at 128 images at once: continuing with 64" in run.out
    assert read_result(run.folder)["batch_size"] <= 64
    close = np.isclose(load_predictions(run.folder).log_probs, expected, rtol=1e-3, atol=1e-3).all(-1)
    assert close.mean() > 0.97  # products of other shapes round otherwise, which may decide between two tokens


def test_one_image_that_does_not_fit_is_one_line(run_program, with_memory_for) -> None:
    with_memory_for(0)
    run = run_program(main, *TASKS["classification"])
    assert run.code == 1
    assert run.err.splitlines()[-1].startswith("mtr_lab: out of memory. 2.50 GiB could not be allocated.")
    assert "Traceback" not in run.err


@pytest.mark.parametrize("allocate", [torch.empty, np.empty])
def test_without_memory_the_host_says_what_it_needed(run_program, monkeypatch: pytest.MonkeyPatch, allocate) -> None:
    monkeypatch.setattr(ClassifierEvaluation, "forward_at", lambda self, point, images: allocate(2**52))
    run = run_program(main, *TASKS["classification"])
    assert run.code == 1
    (line,) = run.err.splitlines()
    assert line.startswith("mtr_lab: out of memory. ")
    assert any(size in line for size in ("16777216.00 GiB", "32.0 PiB"))
    assert not (run.folder / "result.json").exists()


@pytest.mark.parametrize("cached", [False, True])
def test_a_killed_worker_is_one_line(
    run_program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cached: bool
) -> None:
    """Of the loader, or of the cache that decodes: as the system kills it when memory is short."""
    decode = Preparation.decode

    def killed(self, *args, **options):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(self, *args, **options)

    monkeypatch.setattr(Preparation, "decode", killed)
    cache = [f"dataset.cache={tmp_path / 'cache'}"] if cached else []
    run = run_program(main, *TASKS["classification"], "dataset.num_workers=1", *cache)
    assert run.code == 1
    *bar, line = run.err.splitlines()
    assert re.search(r"^mtr_lab: DataLoader worker \(pid.*\) (exited|is killed).*Lower dataset.num_workers.", line)
    assert bool(bar) == cached
    assert "Traceback" not in run.err
    assert {path.suffix for path in (tmp_path / "cache").glob("*")} <= {".lock"}


@pytest.mark.skipif(sys.platform != "linux", reason="a folder that nobody can write to")
@pytest.mark.parametrize("key", ["hydra.run.dir", "dataset.cache"])
def test_a_folder_without_permission_is_one_line(run_command, tmp_path: Path, key: str) -> None:
    run = run_command(main, *TASKS["classification"], f"hydra.run.dir={tmp_path / 'run'}", f"{key}=/sys/kernel/mtr_lab")
    assert run.code in (1, 2)
    (line,) = run.err.splitlines()
    assert "/sys/kernel/mtr_lab" in line
    assert "ermi" in line  # Operation not permitted, Permission denied


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
@pytest.mark.parametrize(
    ("kind", "expected"), [("full", "No space left on device"), ("pipe", "is no longer read (broken pipe)")]
)
def test_an_output_that_cannot_be_printed_is_one_line(tmp_path: Path, kind: str, expected: str) -> None:
    write_run(tmp_path / "run", "mtr", images=20)
    if kind == "full":
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, output = os.pipe()
        os.close(reading)
    command = [sys.executable, "-m", "mtr_lab.report", tmp_path / "run", "-o", tmp_path / "report.html"]
    run = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    os.close(output)
    assert run.returncode == 1, run.stderr
    (line,) = run.stderr.splitlines()
    assert line.startswith("mtr_lab: ")
    assert expected in line
    assert (tmp_path / "report.html").is_file()
