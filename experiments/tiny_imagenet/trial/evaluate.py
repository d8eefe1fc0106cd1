"""``evaluate.py FILE OVERRIDES``: mtr-lab eval that imports everything, and begins when the file exists."""
import os, sys, time
import lightning, timm, torch, torchmetrics  # noqa
import mtr_lab.compose, mtr_lab.tasks.evaluation  # noqa
from mtr_lab.__main__ import main

wait = sys.argv.pop(1)
while not os.path.exists(wait):
    time.sleep(0.2)
main()
