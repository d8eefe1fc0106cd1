"""How long the programs take to answer: ``python experiments/startup.py OUT.json``, about a minute.

CPU seconds (user and system) of a new process, the least of three; they depend less than seconds on what else runs.
"""

import json
import os
import resource
import subprocess
import sys

MTR_LAB = ["-c", "from mtr_lab.cli.commands import main; main()"]
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import mtr_lab": ["-c", "import mtr_lab"],
    "from mtr_lab import create_model, patch": ["-c", "from mtr_lab import create_model, patch"],
    "mtr-lab": [*MTR_LAB],
    "mtr-lab --version": [*MTR_LAB, "--version"],
    "mtr-lab policies": [*MTR_LAB, "policies"],
    "mtr-lab models": [*MTR_LAB, "models"],
    "mtr-lab eval --cfg job": [*MTR_LAB, "eval", "--cfg", "job"],
    "mtr-lab eval --ratio 0.4": [*MTR_LAB, "eval", "--ratio", "0.4"],
    "mtr_lab --version": ["-m", "mtr_lab", "--version"],
    "mtr_lab --help": ["-m", "mtr_lab", "--help"],
    "mtr_lab mtr.ratoi=0.3": ["-m", "mtr_lab", "mtr.ratoi=0.3"],
    "mtr_lab backbone=vim_xs": ["-m", "mtr_lab", "backbone=vim_xs"],
    "mtr_lab.train --help": ["-m", "mtr_lab.train", "--help"],
    "mtr_lab.bench --help": ["-m", "mtr_lab.bench", "--help"],
    "mtr_lab.visualize --help": ["-m", "mtr_lab.visualize", "--help"],
    "mtr_lab.report --help": ["-m", "mtr_lab.report", "--help"],
    "completion of backbone=vi": ["-m", "mtr_lab", "-sc", "query=bash"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of a Python process with these arguments."""
    environment = os.environ | {"COMP_LINE": "python -m mtr_lab backbone=vi", "COMP_POINT": "29"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], env=environment, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    times = {}
    for name, arguments in COMMANDS.items():
        times[name] = round(min(cpu_seconds(arguments) for _ in range(3)), 2)
        print(f"{times[name]:6.2f}  {name}", flush=True)
    with open(sys.argv[1], "w") as file:
        file.write(f"{json.dumps(times, indent=1)}\n")


if __name__ == "__main__":
    main()
