"""Whether an exported file computes what its model computes: measured before the file gets its name."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtr_lab import ops
from mtr_lab.errors import UserError
from mtr_lab.export.deployable import forced_plans, recorded_plans, tensors_of

TOLERANCES = {"pt2": 1e-5, "onnx": 1e-4}
HALF_TOLERANCE = 3e-2
"""Of float16, whose roundings are 8192 times as large."""


@dataclass(frozen=True)
class Parity:
    """A file's outputs against its model's, on the images of the verification."""

    images: int
    error: float
    """The largest absolute difference, divided by the model's largest output if that is above 1."""
    agreement: float
    """The share of outputs (images, or pixels) of the same class, each side with its own decisions."""
    plans: float
    """The share of images whose tokens are reduced in the same way, each side with its own decisions."""


def verify(model: nn.Module, run: Any, images: Sequence[Tensor], tolerance: float) -> Parity:
    """Compare a file's outputs with its model's, which follows the file's plans.

    A runtime rounds differently from PyTorch, and may rank two tokens of nearly equal score the other way round. So the
    model is forced to the plans that the file returns; what the two decide by themselves is reported.

    Args:
        run: images -> the outputs of the file, followed by its plans' tensors if it returns them.
        images: batches, of different sizes if the file takes any.

    Raises:
        UserError: the outputs differ by more than the tolerance, or are not finite.
    """
    error, same, outputs_seen, same_plans, seen = 0.0, 0, 0, 0, 0
    dtype = next(model.parameters()).dtype
    for batch in images:
        with torch.no_grad(), ops.use_backend("portable"):
            with recorded_plans(model) as plans:
                free = model(batch.to(dtype)).float()
            result, *tensors = run(batch)
            expected = free
            own = tensors_of(plans)
            if tensors:
                with forced_plans(model, tensors, plans):
                    expected = model(batch.to(dtype)).float()
        if not torch.isfinite(result).all():
            raise UserError("the exported file's outputs are not finite. Nothing was written.")
        error = max(error, float((result - expected).abs().max() / max(1.0, float(expected.abs().max()))))
        agree = result.argmax(1) == free.argmax(1)
        same, outputs_seen = same + int(agree.sum()), outputs_seen + agree.numel()
        equal = [(a == b).flatten(1).all(1) for a, b in zip(own[::3], tensors[::3], strict=False)]
        same_plans += int(torch.stack(equal).all(0).sum()) if equal else len(batch)
        seen += len(batch)
    if not error <= tolerance:
        raise UserError(
            f"the exported file differs from the model by {error:.1e}, more than {tolerance:.0e}, with the same plans. "
            "Nothing was written."
        )
    return Parity(seen, error, same / outputs_seen, same_plans / seen)
