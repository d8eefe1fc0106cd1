"""Every kernel compiles for NVIDIA's and AMD's GPUs, on a machine without either."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mtr_lab.ops import gpu

SCRIPT = Path(__file__).parent / "compile_kernels.py"


@pytest.mark.slow
@pytest.mark.parametrize("target", [("cuda", "90"), ("hip", "gfx942")])
def test_every_kernel_compiles(target):
    sources = [path.read_text() for path in Path(gpu.__path__[0]).glob("*.py")]
    launched = {name for source in sources for name in re.findall(r"^ +(_\w+)\[", source, re.MULTILINE)}
    assert "_scan" in launched
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, SCRIPT, *target], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()[1:]) == launched
