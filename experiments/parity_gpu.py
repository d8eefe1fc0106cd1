"""Whole models on the Triton kernels against the float32 reference on the same GPU: logits and decisions.

    python experiments/parity_gpu.py IMAGES OUT.json

IMAGES is an ImageFolder of Imagenette. Models are compared twice: with the plans of each backend, which may differ at
near-ties, and with the reference's plans on both, where only the arithmetic differs.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import mtr_lab
from mtr_lab import ops
from mtr_lab.ops import Plan
from mtr_lab.reduction import Policy
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.environment import describe_environment

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POINTS = ((None, 0.0), ("mtr", 0.2), ("mtr", 0.3), ("mtr", 0.4), ("write", 0.4), ("random", 0.4))


@contextmanager
def policies_replaced(plans: list[Plan], *, record: bool) -> Iterator[None]:
    """Record every plan of the policies in ``plans``, or replay the plans recorded there."""
    original = Policy.__call__

    def decide(policy: Policy, *inputs: Any) -> Plan:
        if not record:
            return plans.pop(0)
        plans.append(original(policy, *inputs))
        return plans[-1]

    Policy.__call__ = decide
    try:
        yield
    finally:
        Policy.__call__ = original


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@torch.inference_mode()
def compare(name: str, model: nn.Module, batches: list[Tensor]) -> list[dict[str, Any]]:
    rows = []
    for policy, ratio in POINTS:
        model.float()
        if policy is not None:
            mtr_lab.patch(model, policy, ratio=ratio)
        plans: list[list[Plan]] = [[] for _ in batches]
        with ops.use_backend("reference"):
            reference = []
            for images, recorded in zip(batches, plans, strict=True):
                with policies_replaced(recorded, record=True):
                    reference.append(model(images))
        expected = torch.cat(reference)
        for dtype in DTYPES:
            model.to(dtype)
            with ops.use_backend("triton"):
                free, forced = [], []
                for images, recorded in zip(batches, plans, strict=True):
                    free.append(model(images.to(dtype)))
                    with policies_replaced(list(recorded), record=False):
                        forced.append(model(images.to(dtype)))
            same = (torch.cat(free).argmax(1) == expected.argmax(1)).float().mean()
            rows.append(
                {
                    "model": name,
                    "images": len(expected),
                    "policy": policy or "none",
                    "ratio": ratio,
                    "dtype": str(dtype).removeprefix("torch."),
                    "error_same_plan": relative(torch.cat(forced), expected),
                    "error": relative(torch.cat(free), expected),
                    "top1_agreement": float(same),
                }
            )
            print(rows[-1], flush=True)
        if policy is not None:
            mtr_lab.unpatch(model)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda")
    model = mtr_lab.create_model("vim_nano", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    loader = DataLoader(ImageFolder(arguments.images, transform), batch_size=250, num_workers=8)
    rows = compare("vim_nano", model.to(device), [images.to(device) for images, _ in loader])
    torch.manual_seed(0)
    with device:
        rows += compare("vim_s, random weights", mtr_lab.create_model("vim_s").eval(), [torch.randn(32, 3, 224, 224)])
    result = {"schema": 1, "environment": describe_environment(), "rows": rows}
    with replace_file(arguments.out) as file:
        file.write(json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    main()
