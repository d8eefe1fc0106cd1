r"""Training on one and on several GPUs through ``mtr-lab train``: images per second, losses, and two kills.

    python experiments/ddp_training.py OUT                       # Vim-S, bf16, 512 images a step in all, 1 and 4 GPUs
    python experiments/ddp_training.py OUT --gpus 4 --part kills

Writes OUT/training.json, and the log and metrics.csv of every run. The images are gratings in noise, ten directions
for ten classes, kept on the device. Without mixup a run draws no random number by process, so the losses on any number
of GPUs differ by rounding alone. The kills: SIGKILL for one process in the middle of an epoch, and for the launcher;
timed until all others have ended. Without GPUs it runs in CPU processes:

    python experiments/ddp_training.py OUT backbone.depth=3 backbone.img_size=48 --accelerator cpu --model vim_nano \
        --batch 4 --images 40 --epochs 2 --gpus 1 2 --limit 600
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mtr_lab.results.atomic import replace_file
from mtr_lab.results.environment import describe_environment

CLASSES, SIDE = 10, 128


def make_image(number: int, folder: Path) -> None:
    """A grating whose direction is that of the class, of random frequency and phase, in noise."""
    random = np.random.default_rng(number)
    kind = number % CLASSES
    direction, frequency, phase = math.pi * kind / CLASSES, random.uniform(0.1, 0.5), random.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:SIDE, :SIDE]
    wave = np.sin(frequency * (x * math.cos(direction) + y * math.sin(direction)) + phase)
    pixels = 128 + 40 * wave[..., None] + random.normal(0, 50, (SIDE, SIDE, 3))
    (folder / f"class{kind}").mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"class{kind}" / f"{number}.jpg")


def command(options: argparse.Namespace, images: Path, gpus: int, folder: Path, epochs: int) -> list[str]:
    """A training run."""
    on_gpu = options.accelerator == "gpu"
    return [
        *(sys.executable, "-m", "mtr_lab.train"),
        *(f"backbone={options.model}", f"dataset.root={images}", "dataset.test_split=train"),
        *(
            "dataset.train_cache=device",
            f"dataset.batch_size={options.batch}",
            f"dataset.num_workers={options.workers}",
        ),
        *(f"training.epochs={epochs}", "training.warmup_epochs=1", "training.mixup=0", "training.cutmix=0"),
        *(f"trainer.accelerator={options.accelerator}", "trainer.enable_progress_bar=false"),
        *(("trainer.precision=bf16-mixed", "trainer.cuda_graph=true") if on_gpu else ()),
        *(("trainer=ddp", f"trainer.devices={gpus}") if gpus > 1 else ()),
        f"hydra.run.dir={folder}",
        *options.overrides,
    ]


def train(options: argparse.Namespace, images: Path, gpus: int) -> dict[str, Any]:
    """The epochs of a run; those after the first, in which kernels are compiled, count."""
    folder = images.parent / f"run{gpus}"
    with open(options.out / f"train{gpus}.txt", "w") as log:
        done = subprocess.run(
            command(options, images, gpus, folder, options.epochs),
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=options.limit,
        )
    if done.returncode:
        raise SystemExit(f"training on {gpus}: exit code {done.returncode}, see {log.name}")
    shutil.copy(folder / "metrics.csv", options.out / f"train{gpus}.csv")
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    rates = [float(row["img_per_s"]) for row in rows]
    return {"gpus": gpus, "img_per_s": rates, "losses": [float(row["train_loss"]) for row in rows]}


def status(pid: str) -> tuple[str, int]:
    """The state of a process and its parent: ``("Z", …)`` of one that has ended."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "Z", 0
    return state, int(parent)


def launched_by(launcher: int) -> list[str]:
    """The processes that a launcher has spawned."""
    children = [path.name for path in Path("/proc").glob("[0-9]*") if status(path.name)[1] == launcher]
    return sorted((pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()), key=int)


def wait_until(condition: Callable[[], bool], limit: float) -> float:
    """Seconds until the condition held."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > limit:
            raise SystemExit(f"waited for {limit:.0f} s in vain")
        time.sleep(0.02)
    return time.monotonic() - start


def kill(options: argparse.Namespace, images: Path, gpus: int, who: str) -> dict[str, Any]:
    """Kill ``"rank"`` or ``"launcher"`` in the second epoch."""
    folder = images.parent / f"killed_{who}"
    with open(options.out / f"killed_{who}.txt", "w") as log:
        launcher = subprocess.Popen(
            command(options, images, gpus, folder, 10_000), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_until(lambda: (folder / "last.ckpt").exists() or launcher.poll() is not None, options.limit)
            time.sleep(0.5)
            ranks = launched_by(launcher.pid)
            os.kill(int(ranks[-1]) if who == "rank" else launcher.pid, signal.SIGKILL)
            ended = wait_until(
                lambda: launcher.poll() is not None and all(status(rank)[0] == "Z" for rank in ranks), options.limit
            )
        finally:
            launcher.kill()
    last = (options.out / f"killed_{who}.txt").read_text().strip().splitlines()[-1]
    return {
        "killed": who,
        "gpus": gpus,
        "processes": len(ranks),
        "seconds": ended,
        "code": launcher.poll(),
        "says": last,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the runs")
    parser.add_argument("--model", default="vim_s")
    parser.add_argument("--batch", type=int, default=512, help="images of a step, on all GPUs together")
    parser.add_argument("--images", type=int, default=16384)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--accelerator", default="gpu")
    parser.add_argument("--workers", type=int, default=12, help="of each process, that decode")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of a run")
    parser.add_argument("--part", choices=["images", "rates", "kills"], help="one part alone")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ddp_training"), help="of images and runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    images = options.folder / "images"
    if not images.exists():
        with multiprocessing.Pool() as pool:
            pool.starmap(make_image, [(number, images / "train") for number in range(options.images)])
    record: dict[str, Any] = {
        "environment": describe_environment(),
        "settings": {key: value for key, value in vars(options).items() if key not in ("out", "part", "folder")},
    }
    if options.part in (None, "rates"):
        record["rows"] = []
        for gpus in options.gpus:
            row = train(options, images, gpus)
            first = (record["rows"] or [row])[0]
            row["scaling"] = max(row["img_per_s"][1:]) / max(first["img_per_s"][1:])
            record["rows"].append(row)
            print(row, flush=True)
    if options.part in (None, "kills"):
        with ThreadPoolExecutor() as pool:  # both at once
            killed = [pool.submit(kill, options, images, max(options.gpus), who) for who in ("rank", "launcher")]
        record["kills"] = [end.result() for end in killed]
        print(record["kills"], flush=True)
    with replace_file(options.out / f"{options.part or 'training'}.json") as stream:
        stream.write(f"{json.dumps(record, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
