"""SIGKILL of a real training at random moments, and resuming: the weights of an uninterrupted run, to the bit."""

import csv
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch

from mtr_lab.train import main
from mtr_lab.training.checkpoint import read_plain

SAMPLE = Path(str(resources.files("mtr_lab") / "assets" / "imagenette_sample"))
EPOCHS = 8


def train(arguments: list[str], output: str) -> None:
    """Run the program as the process's own, with what it prints in a file."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = ["mtr-lab train", *arguments]
    main()


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Overrides for a run with everything that is random, of short epochs."""
    for wnid in sorted(path.name for path in SAMPLE.glob("n*"))[:3]:
        shutil.copytree(SAMPLE / wnid, tmp_path / "images" / "train" / wnid, ignore=lambda _, names: sorted(names)[8:])
    shutil.copytree(tmp_path / "images" / "train", tmp_path / "images" / "val")
    return [
        f"dataset.root={tmp_path / 'images'}",
        *("dataset.batch_size=6", "dataset.num_workers=0", "dataset.holdout=0.2"),
        *("backbone.depth=3", "backbone.embed_dim=16", "backbone.img_size=48", "backbone.drop_path_rate=0.3"),
        *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false"),
        *(f"training.epochs={EPOCHS}", "training.warmup_epochs=1", "training.ema_decay=0.5"),
    ]


@pytest.fixture
def processes() -> Iterator[multiprocessing.context.ForkServerContext]:
    """Processes that are forked from one that has imported the program."""
    multiprocessing.set_forkserver_preload(["mtr_lab.training.run", __name__])
    of_other_tests = multiprocessing.active_children()
    yield multiprocessing.get_context("forkserver")
    assert not [child for child in multiprocessing.active_children() if child not in of_other_tests]


def course(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as stream:
        return [{**row, "img_per_s": ""} for row in csv.DictReader(stream)]


@pytest.mark.slow
def test_a_training_that_is_killed_ends_with_the_same_weights(processes, options: list[str], tmp_path: Path) -> None:
    """Every kill leaves ``last.ckpt`` absent or complete; a finished run that is resumed changes nothing."""
    straight, killed, output = tmp_path / "straight", tmp_path / "killed", str(tmp_path / "output")

    def start(folder: Path) -> multiprocessing.Process:
        last = folder / "last.ckpt"
        resume = [f"training.resume={last}"] if last.exists() else []
        process = processes.Process(target=train, args=([f"hydra.run.dir={folder}", *options, *resume], output))
        process.start()
        return process

    def finish(folder: Path) -> float:
        begin, process = time.monotonic(), start(folder)
        process.join()
        assert process.exitcode == 0, Path(output).read_text()
        return time.monotonic() - begin

    def kill(moment: str) -> None:
        """Kill a process at a random moment, soon after it has finished an epoch, or while it writes a checkpoint."""
        begun, process, last = time.time(), start(killed), killed / "last.ckpt"
        end = time.monotonic() + rng.uniform(0, duration)
        while process.is_alive():
            if moment == "any" and time.monotonic() > end:
                break
            if moment == "after an epoch" and last.exists() and last.stat().st_mtime > begun:
                time.sleep(rng.uniform(0, duration / EPOCHS))
                break
            if moment == "writing" and list(killed.glob(".last.ckpt.*")):
                break
            time.sleep(0.0002)
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), Path(output).read_text()
        kills.append(process.exitcode != 0)
        if last.exists():
            epochs.add(read_plain(last)["epoch"])  # compares the checksums
        if (weights := killed / "model.safetensors").exists():
            assert weights.read_bytes() == expected

    finish(straight)  # the first process waits for the imports
    shutil.rmtree(straight)
    duration, rng = finish(straight), random.Random(0)
    kills: list[bool] = []
    epochs: set[int] = set()
    expected = (straight / "model.safetensors").read_bytes()
    for moment in itertools.cycle(("any", "after an epoch", "writing")):
        if (killed / "training.json").exists():
            if sum(kills) >= 4:
                break
            shutil.rmtree(killed)  # it ended before it was killed often enough
        kill(moment)
    kill("any")  # a finished run
    for _ in range(2):
        finish(killed)
        assert (killed / "model.safetensors").read_bytes() == expected
        assert course(killed) == course(straight)
    assert len(epochs) > 1, "the kills met one epoch only"
    assert {path.name for path in killed.glob(".*")} == {".hydra", ".lock"}
