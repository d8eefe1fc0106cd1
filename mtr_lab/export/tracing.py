"""From a model to a program of ``torch.export``, in PyTorch's own operators."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtr_lab import ops
from mtr_lab.errors import UserError
from mtr_lab.export.deployable import Deployable


def exported_program(deployable: Deployable, images: Tensor, dynamic: bool, whole: Sequence[str] = ()) -> Any:
    """The model as a program of ``torch.export``.

    Args:
        dynamic: whether it takes any number of images.
        whole: names of this library's operators that stay in the program; the others are replaced by their parts.

    Raises:
        UserError: the model or its policy cannot be traced; says why.
    """
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    try:
        with torch.no_grad(), ops.plain_pytorch(whole), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(deployable, (images,), dynamic_shapes=shapes, strict=False)
    except UserError:
        raise
    except Exception as error:  # the tracer raises errors of many types
        raise UserError(
            f"the model cannot be exported: tracing it ended with {innermost_message(error)}. Choose another policy."
        ) from error


def innermost_message(error: BaseException) -> str:
    """The innermost message on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
