"""Run the notebooks and store their outputs, without what differs from machine to machine: ``make notebooks``."""

import base64
import io
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image, ImageSequence

FOLDER = Path(__file__).parent
MACHINE = [(r"/\S*?/(tmp[a-z0-9_]{8})(?=/|\b)", "DIR"), (rf"{re.escape(str(FOLDER.parent))}/", "")]
"""Temporary folders and the path of the repository, and what is stored instead."""
WIDTH = 900
"""Pixels of a stored picture; wider ones are scaled down."""


def run(path: Path) -> None:
    """Run a notebook; one that fails keeps its file as it is."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = joined([plain(output) for output in cell.outputs if output.get("name") != "stderr"])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


def plain(output: Any) -> Any:
    """An output without counters, metadata and paths."""
    if "execution_count" in output:
        output.execution_count = None
    if "metadata" in output:
        output.metadata = {}
    if "text" in output:
        output.text = without_machine(output.text)
    if "image/png" in output.get("data", {}):
        output.data.pop("image/jpeg", None)  # the same picture again
    for kind, content in output.get("data", {}).items():
        if kind in ("image/png", "image/gif"):
            output.data[kind] = small(kind, content)
        elif kind.startswith("text/"):
            output.data[kind] = re.sub(r" at 0x[0-9a-fA-F]+", "", without_machine(content))
    return output


def joined(outputs: list[Any]) -> list[Any]:
    """One text where a kernel sent what a cell prints in pieces, whose number depends on the time."""
    kept: list[Any] = []
    for output in outputs:
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def small(kind: str, content: str) -> str:
    """A PNG or GIF of at most ``WIDTH`` pixels and 128 colours, base64."""
    picture, file = Image.open(io.BytesIO(base64.b64decode(content))), io.BytesIO()
    width = min(picture.width, WIDTH if kind == "image/png" else WIDTH // 2)
    size = width, round(picture.height * width / picture.width)
    frames = [frame.convert("RGB").resize(size).quantize(128) for frame in ImageSequence.Iterator(picture)]
    if kind == "image/png":
        frames[0].save(file, "PNG", optimize=True)
    else:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], loop=0, duration=picture.info["duration"])
    return base64.b64encode(file.getvalue()).decode()


def without_machine(text: str) -> str:
    for pattern, instead in MACHINE:
        text = re.sub(pattern, instead, text)
    return text


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(map(str, FOLDER.glob("*.ipynb"))):
        run(Path(name))
        print(name)
