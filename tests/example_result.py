"""A result of three points."""

from mtr_lab.results.environment import describe_environment
from mtr_lab.results.schema import Point, Result


def point(policy: str, ratio: float, top1: float, kl: float) -> Point:
    return {
        "policy": policy,
        "ratio": ratio,
        "reduction": ratio + 0.0023 if ratio else 0.0,
        "flops_literature": 5.076888576e9 * (1 - ratio),
        "flops_true": 10.762770432e9 * (1 - ratio),
        "flops_overhead": 1.2e7 if ratio else 0.0,
        "tokens": [197] * 2 + [round(197 * (1 - ratio))] * 22,
        "images": 3000,
        "skipped": ["n01/broken[red].JPEG"] if ratio else [],
        "top1": top1,
        "top1_ci": [top1 - 0.014, top1 + 0.013],
        "top5": 0.951,
        "top5_ci": [0.943, 0.958],
        "agreement": 0.9 if ratio else 1.0,
        "agreement_ci": [0.889, 0.911] if ratio else [1.0, 1.0],
        "kl": kl,
        "kl_ci": [kl * 0.9, kl * 1.1],
        "img_per_s": 12345.6 / (1 - ratio / 2),
        "latency_ms": {"p50": 21.53, "p95": 25.9},
        "peak_mib": 1234.5,
    }


RESULT: Result = {
    "schema": 2,
    "task": "classification",
    "backbone": "vim_s",
    "dataset": "imagenet",
    "weights": {"source": "bundled", "sha256": "0" * 64},
    "config": {"mtr": {"ratio": [0.2, 0.4]}, "seed": 0},
    "environment": describe_environment(),
    "points": [point("none", 0.0, 0.805, 0.0), point("mtr", 0.2, 0.801, 0.0312), point("mtr", 0.4, 0.789, 0.149)],
}
