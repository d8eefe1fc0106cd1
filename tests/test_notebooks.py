"""The notebooks as they are committed; ``make test-all`` executes them (``pytest --nbmake notebooks``)."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_committed_without_what_a_machine_adds(path: Path) -> None:
    """``make notebooks`` stores them so."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in code)
    assert path.stat().st_size < 2_000_000
    for cell in notebook["cells"]:
        assert not cell["metadata"], cell["source"]
    for cell in code:
        assert cell["execution_count"] is None, cell["source"]
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", output["text"]  # red in a browser
            assert not output.get("metadata")
            text = json.dumps({name: value for name, value in output.items() if name != "data"})
            text += "".join("".join(v) for kind, v in output.get("data", {}).items() if kind.startswith("text/"))
            assert not re.search(r"/(home|tmp|root|Users|work)/|0x[0-9a-f]{8}", text), text
