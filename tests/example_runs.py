"""Run folders: results and the predictions they were computed from."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtr_lab.results.classifications import Classifications, top_classes
from mtr_lab.results.metrics import score
from mtr_lab.results.predictions import point_name
from mtr_lab.results.predictions_file import save_predictions
from mtr_lab.results.schema import Result, write_result

ENVIRONMENT = {
    "python": "3.11.7",
    "torch": "2.9.0",
    "mtr_lab": "0.1.0",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "platform": "Linux",
    "cpu": "A CPU",
    "threads": 2,
    "gpus": [],
    "cuda": None,
}


def write_run(
    folder: Path,
    policy: str,
    ratios: tuple[float, ...] = (0.2, 0.4),
    *,
    quality: float = 1.0,
    images: int = 200,
    first_image: int = 0,
    speed: float = 100.0,
    mtr: dict[str, Any] | None = None,
    **fields: Any,
) -> Result:
    """Write a run of ``policy``, with predictions off by ``ratio / quality``, to ``folder``, and return it.

    Args:
        images, first_image: the images of the run, numbered from 0.
        mtr: settings besides the ratio.
        fields: replace fields of the result.
    """
    numbers = np.arange(first_image, first_image + images)
    base = np.random.default_rng(1).normal(size=(10_000, 6))[numbers] * 3
    other = np.random.default_rng(sum(map(ord, policy))).normal(size=(10_000, 6))[numbers] * 8
    logits = np.stack([base, *(base + ratio / quality * other for ratio in ratios)])
    log_probs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
    names = np.array([f"image{number}" for number in numbers])
    points = [("none", 0.0), *((policy, ratio) for ratio in ratios)]
    labels = np.where(numbers % 5 > 0, base.argmax(-1), 0)
    point_names = np.array([point_name(*point) for point in points])
    top5 = top_classes(torch.from_numpy(log_probs)).numpy()
    predictions = Classifications(names, names, labels, point_names, top5, log_probs)
    result: Result = {
        "schema": 2,
        "task": "classification",
        "backbone": "vim_nano",
        "dataset": "imagenette_sample",
        "weights": {"source": "bundled", "sha256": "ab" * 32},
        "config": {"mtr": {"policy": policy, "ratio": list(ratios), "merge": "mean", **(mtr or {})}, "seed": 0},
        "environment": ENVIRONMENT,
        "points": [
            {
                "policy": name,
                "ratio": ratio,
                "reduction": ratio + 0.002 * (ratio > 0),
                "flops_literature": 4.75e8 * (1 - ratio),
                "flops_true": 1.03e9 * (1 - ratio),
                "flops_overhead": 4.1e4 * (ratio > 0),
                "tokens": [197 - round(10 * ratio) * 12 * (block // 2) for block in range(8)],
                "skipped": [],
                **score(predictions, i),
                "img_per_s": speed * (1 + ratio),
                "speedup": 1 + ratio,
                "speedup_ci": [1 + 0.9 * ratio, 1 + 1.1 * ratio],
                "latency_ms": {"p50": 20 * (1 - ratio / 2), "p95": 31.5},
                "peak_mib": 48.9,
            }
            for i, (name, ratio) in enumerate(points)
        ],
        **fields,
    }
    write_result(result, folder)
    save_predictions(predictions, folder)
    return result


def write_sweep(folder: Path) -> list[Result]:
    """Three policies on the same images, in ``folder/0`` to ``folder/2``."""
    return [
        write_run(folder / str(i), policy, quality=quality, speed=100 + i)
        for i, (policy, quality) in enumerate([("mtr", 1.0), ("write", 2.5), ("random", 1.2)])
    ]


def data_block(html: str) -> dict[str, Any]:
    """The data in a page."""
    packed = html.partition('<script type="text/plain" id="data">')[2].partition("</script>")[0]
    return json.loads(gzip.decompress(base64.b64decode(packed)))
