"""The page of ``make demo`` in Chromium against PyTorch: ``python experiments/browser_agreement.py RUNTIME OUT.json``.

RUNTIME is the folder of the npm package onnxruntime-web. The bundled model, unreduced and under MTR at ratio 0.4,
classifies bundled pictures in the browser (WebAssembly) and in PyTorch, each with its own decisions. Errors are
relative to the largest output; those with the same plans are of the pictures whose tokens are reduced alike.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from parity_exports import bundled, pictures
from playwright.sync_api import sync_playwright

from mtr_lab.demo.static_page import write_page
from mtr_lab.export.deployable import recorded_plans, tensors_of

RATIO, PICTURES = 0.4, 100
PREPARATION = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
RUN = """async ([number, pixels]) => {
  const { logits, plans } = await demo.run(number, Float32Array.from(pixels));
  return [Array.from(logits), plans.map(({ dest }) => Array.from(dest, Number))];
}"""


def compare(page: Any, number: int, ratio: float, images: torch.Tensor) -> dict[str, float]:
    """Model ``number`` of the page against the model at this ratio."""
    model, errors, same_class, same_plans = bundled(ratio), [], 0, []
    for image in images:
        logits, plans = page.evaluate(RUN, [number, image.flatten().tolist()])
        with torch.no_grad(), recorded_plans(model) as own:
            expected = model(image[None])[0]
        result, dest = torch.tensor(logits), [tensor.flatten().tolist() for tensor in tensors_of(own)[::3]]
        errors.append(float((result - expected).abs().max() / max(1.0, float(expected.abs().max()))))
        same_class += int(result.argmax() == expected.argmax())
        same_plans.append(dest == plans)
    alike = [error for error, same in zip(errors, same_plans, strict=True) if same]
    return {
        "ratio": ratio,
        "pictures": len(images),
        "same_plans": len(alike) / len(images),
        "error_same_plans": max(alike, default=0.0),
        "error_own_plans": max(errors),
        "agreement": same_class / len(images),
    }


def main() -> None:
    """Measure, print, write."""
    runtime, out = map(Path, sys.argv[1:])
    model = bundled(0.0)
    config = {**model.pretrained_cfg, "crop_mode": "center"}
    images = pictures({name: config[name] for name in PREPARATION})[:PICTURES]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = write_page(Path(folder) / "demo.html", runtime, model, "vim_nano", [("mtr", RATIO)])
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        page = browser.new_page()
        page.set_default_timeout(600_000)
        page.goto(file.as_uri())
        page.wait_for_selector("body[data-ready]")
        result = {
            "browser": browser.version,
            "runtime": json.loads((runtime / "package.json").read_text())["version"],
            "page_mb": file.stat().st_size / 1e6,
            "models": [compare(page, number, ratio, images) for number, ratio in enumerate((0.0, RATIO))],
        }
        browser.close()
    print(json.dumps(result, indent=1))
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
