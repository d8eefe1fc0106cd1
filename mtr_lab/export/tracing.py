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
            program = torch.export.export(deployable, (images,), dynamic_shapes=shapes, strict=False)
        remove_idle_nodes(program)
        return program
    except UserError:
        raise
    except Exception as error:  # the tracer raises errors of many types
        raise UserError(
            f"the model cannot be exported: tracing it ended with {innermost_message(error)}. Choose another policy."
        ) from error


def remove_idle_nodes(program: Any) -> None:
    """Remove what returns its input as it is, and the assertions about it: a quarter of the nodes."""
    aten = torch.ops.aten
    for node in list(program.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
        elif node.target in (aten.to.dtype, aten.detach.default) and "output" not in {user.op for user in node.users}:
            given = node.args[0]
            if node.meta["val"].dtype == given.meta["val"].dtype:
                node.replace_all_uses_with(given)
                program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def innermost_message(error: BaseException) -> str:
    """The innermost message on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300].rstrip(".")
