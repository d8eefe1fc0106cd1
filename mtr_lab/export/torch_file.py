"""Programs of ``torch.export`` in files, ``.pt2``: they run where PyTorch is installed, without this library."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtr_lab.errors import MachineError, UserError
from mtr_lab.export.deployable import Deployable, Description
from mtr_lab.export.tracing import exported_program, innermost_message

METADATA = "mtr_lab.json"
"""The extra file that holds the description."""


def to_program(deployable: Deployable, images: Tensor, description: Description) -> Any:
    """The model as a program of PyTorch's operators alone, ``torch.export.ExportedProgram``.

    Raises:
        UserError: the model or its policy cannot be traced.
    """
    return exported_program(deployable, images, description.batch is None)


def program_content(program: Any, description: Description) -> bytes:
    """The file."""
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={METADATA: json.dumps(description.asdict())})
    return stream.getvalue()


def compiled_content(program: Any, description: Description, folder: Path) -> bytes:
    """The file of a package that AOTInductor compiles for this machine's processor.

    Args:
        folder: where the compiler may write.

    Raises:
        MachineError: the compiler fails.
    """
    file = folder / "package.pt2"
    metadata = {METADATA: json.dumps(description.asdict())}
    try:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(file), inductor_configs={"aot_inductor.metadata": metadata}
        )
    except Exception as error:  # PyTorch raises errors of many types
        raise MachineError(f"format=aotinductor: compiling ended with {innermost_message(error)}.") from error
    return file.read_bytes()


class TorchFile:
    """A ``.pt2`` file that can be called: images (B, channels, H, W) in float32 to the first output.

    Raises:
        UserError: PyTorch cannot read the file.
    """

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise UserError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}.")
        try:
            with zipfile.ZipFile(file) as archive:
                is_compiled = any("/aotinductor/" in name for name in archive.namelist())
            extra = {METADATA: ""}
            if is_compiled:
                self._run: Any = torch._inductor.aoti_load_package(str(file))
                self.metadata = self._run.get_metadata().get(METADATA)
            else:
                self._run = torch.export.load(file, extra_files=extra).module()
                self.metadata = extra[METADATA] or None
        except Exception as error:  # PyTorch raises errors of many types
            raise UserError(f"{file} is not a readable .pt2 file: {innermost_message(error)}.") from error

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        result = self._run(images)
        output: Tensor = result[0] if isinstance(result, tuple | list) else result
        return output
