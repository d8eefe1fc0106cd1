"""The addresses that all processes of a program listen on: ``python experiments/listening.py OUT.json``.

Runs an evaluation and a training by ``trainer=ddp``, on every GPU or in two processes on the CPU, and as a control a
process that imports mpi4py, whose daemon listens on all interfaces. A process belongs to a program if it has inherited
its environment, even if its parent has ended. Linux only; reads /proc twenty times a second.
"""

import argparse
import ipaddress
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

MARK = "MTR_LAB_LISTENING"
LISTENS = "0A"
SAMPLE = Path(str(resources.files("mtr_lab") / "assets" / "imagenette_sample"))
SECONDS = 120.0
"""After which a program is ended."""


def processes(mark: str) -> dict[int, str]:
    """The processes with the mark in their environment: number and command."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes() + b"\0":
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:150]
        except OSError:
            continue
    return found


def address(text: str) -> str:
    """An address of /proc/net/tcp or tcp6 in its usual form."""
    octets = b"".join(bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    return str(ipaddress.ip_address(octets))


def listening(owners: dict[int, str]) -> set[tuple[str, str]]:
    """Address and command of every socket that one of these processes listens on."""
    sockets = {}
    for process, command in owners.items():
        try:
            for descriptor in Path(f"/proc/{process}/fd").iterdir():
                try:
                    sockets[os.readlink(descriptor)] = command
                except OSError:
                    continue
        except OSError:
            continue
    found = set()
    for file in ("tcp", "tcp6"):
        for line in Path("/proc/net", file).read_text().splitlines()[1:]:
            row = line.split()
            owner = sockets.get(f"socket:[{row[9]}]")
            if row[3] == LISTENS and owner is not None:
                found.add((address(row[1].partition(":")[0]), owner))
    return found


def watched(mark: str, command: list[str]) -> dict[str, Any]:
    """Run a program and note what its processes listen on."""
    with tempfile.TemporaryFile("w+") as output:
        environment = {**os.environ, MARK: mark}
        program = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        found, seen, polls, end = set(), set(), 0, time.monotonic() + SECONDS
        while program.poll() is None and time.monotonic() < end:
            now = processes(mark)
            seen |= set(now)
            found |= listening(now)
            polls += 1
            time.sleep(0.05)
        if program.poll() is None:
            program.terminate()
        code = program.wait()
        output.seek(0)
        tail = output.read().splitlines()[-4:]
    return {
        "code": code,
        "processes": len(seen),
        "polls": polls,
        "addresses": sorted({one for one, _ in found}),
        "sockets": sorted(f"{one}  {command}" for one, command in found),
        "output": tail,
    }


def training_set(root: Path) -> list[str]:
    """Overrides for a training on bundled images."""
    for folder in sorted(SAMPLE.glob("n*")):
        for split, chosen in (("train", slice(0, 40)), ("val", slice(40, 50))):
            (root / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[chosen]:
                (root / split / folder.name / image.name).symlink_to(image)
    return [f"dataset.root={root}", "dataset.batch_size=40", "training.epochs=2", "training.warmup_epochs=0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--accelerator", choices=("gpu", "cpu"), default="gpu")
    options = parser.parse_args()
    out, accelerator = options.out, options.accelerator
    devices = torch.cuda.device_count() if accelerator == "gpu" else 2
    ddp = ["trainer=ddp", f"trainer.accelerator={accelerator}", f"trainer.devices={devices}"]
    ddp.append("trainer.enable_progress_bar=false")
    try:
        mpi = version("mpi4py")
    except PackageNotFoundError:
        mpi = None
    result: dict[str, Any] = {"mpi4py": mpi, "accelerator": accelerator, "devices": devices}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {
            "evaluation": ["mtr_lab", "mtr.ratio=0.3", "timing.batch_size=0", "dataset.num_workers=2", *ddp],
            "training": ["mtr_lab.train", *training_set(folder / "images"), "dataset.num_workers=2", *ddp],
        }
        for run, overrides in runs.items():
            command = [sys.executable, "-m", *overrides, f"hydra.run.dir={folder / run}"]
            result[run] = watched(run, command)
            print(run, json.dumps(result[run], indent=1), flush=True)
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        control = [sys.executable, "-c", "import time; from mpi4py import MPI; time.sleep(4)"]
        result["control: mpi4py"] = watched("control", control)
        print("control", json.dumps(result["control: mpi4py"], indent=1), flush=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
