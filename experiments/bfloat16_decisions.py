"""Where the decisions of bfloat16 differ from those of float32: its arithmetic, or its weights.

    python experiments/bfloat16_decisions.py IMAGES OUT.json

IMAGES is an ImageFolder of Imagenette. The bundled model runs in float32, in bfloat16, and in float32 with weights
that were rounded to bfloat16; each with its own plans, and with the plans of float32.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from parity_gpu import policies_replaced
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import mtr_lab
from mtr_lab.ops import Plan
from mtr_lab.results.atomic import replace_file
from mtr_lab.results.environment import describe_environment

POINTS = (("mtr", 0.3), ("mtr", 0.4), ("write", 0.4), ("fovea", 0.3), ("fovea", 0.4))


@torch.inference_mode()
def classes(model: nn.Module, batches: list[Tensor], plans: list[Plan], *, record: bool) -> Tensor:
    """The most probable class of every image, (B,)."""
    dtype = next(model.parameters()).dtype
    with policies_replaced(plans, record=record):
        return torch.cat([model(images.to(dtype)).argmax(1) for images in batches])


def removed_alike(plans: list[Plan], others: list[Plan]) -> float:
    """The share of removed tokens that the other plans remove at the same step."""
    same = [
        torch.isin(one, other).float().mean()
        for plan, against in zip(plans, others, strict=True)
        for one, other in zip(plan.removed, against.removed, strict=True)
    ]
    return float(torch.stack(same).mean())


def compare(model: nn.Module, batches: list[Tensor]) -> list[dict[str, Any]]:
    rows = []
    for policy, ratio in POINTS:
        mtr_lab.patch(model, policy, ratio=ratio)
        exact: list[Plan] = []
        expected = classes(model, batches, exact, record=True)
        narrow = copy.deepcopy(model).bfloat16()
        for name, other in (
            ("bfloat16", narrow),
            ("weights rounded, float32 arithmetic", copy.deepcopy(narrow).float()),
        ):
            own: list[Plan] = []
            shares = {
                "own_plans": classes(other, batches, own, record=True),
                "plans_of_float32": classes(other, batches, list(exact), record=False),
                "its_plans_in_float32": classes(model, batches, list(own), record=False),
            }
            rows.append({"policy": policy, "ratio": ratio, "arithmetic": name, "images": len(expected)})
            rows[-1] |= {key: float((predicted == expected).float().mean()) for key, predicted in shares.items()}
            rows[-1]["removed_alike"] = removed_alike(own, exact)
            print(rows[-1], flush=True)
        mtr_lab.unpatch(model)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = mtr_lab.create_model("vim_nano", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    loader = DataLoader(ImageFolder(arguments.images, transform), batch_size=50)
    rows = compare(model.to(device), [images.to(device) for images, _ in loader])
    result = {"environment": describe_environment(), "rows": rows}
    with replace_file(arguments.out) as file:
        file.write(json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    main()
