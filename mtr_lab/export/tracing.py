"""From a model to a program of ``torch.export`` whose operators are decomposed as a format needs."""

import warnings
from typing import Any

import torch
from torch import Tensor

from mtr_lab import ops
from mtr_lab.errors import UserError
from mtr_lab.export.deployable import Deployable


def exported_program(deployable: Deployable, images: Tensor, dynamic: bool, table: dict[Any, Any]) -> Any:
    """The model as a program of ``torch.export``, its operators decomposed as the table says.

    Raises:
        UserError: the model or its policy cannot be traced; says why.
    """
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic else None
    try:
        with torch.no_grad(), ops.use_backend("portable"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(deployable, (images,), dynamic_shapes=shapes, strict=False)
            return program.run_decompositions(table)
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
