"""The dashboard: results as one HTML file that works without a network."""

import base64
import gzip
import hashlib
import importlib.resources
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtr_lab.errors import UserError
from mtr_lab.packages import require
from mtr_lab.report.dashboard.reader import Reader
from mtr_lab.results.atomic import write_output
from mtr_lab.results.schema import FILE_NAME

NEEDS = ("plotly", "report", "the report's page")
_SCRIPTS = (
    *("format", "dom", "styles", "data", "charts", "tokens", "training", "tables", "differences"),
    *("ablation", "chooser", "address", "lightbox", "downloads", "details", "filters", "main"),
)
"""The files of the page's script, in this order: a file's top level may use the files before it."""


def build(paths: Sequence[Path], output: Path) -> dict[str, Any]:
    """Write the report of some results to one self-contained file, and return its data.

    Args:
        paths: see ``Reader``.
        output: the HTML file; it appears complete or not at all.

    Raises:
        UserError: see ``Reader.data``; there is no result; Plotly is not installed; ``output`` cannot be written.
        MachineError: see :func:`~mtr_lab.results.atomic.replace_output`.
    """
    require(*NEEDS)
    data = Reader(paths).data()
    if not data["runs"] and not data["trainings"]:
        reason = " ".join(data["notes"]) or f"No {FILE_NAME} in {', '.join(map(str, paths))}."
        raise UserError(f"nothing to show. {reason}")
    html = page(data)
    write_output(output, html.encode())
    return data


def page(data: dict[str, Any], *, live: bool = False) -> str:
    """The HTML of a report.

    Its content security policy allows only its two scripts, and no request but those of a live page to its server.

    Args:
        data: of ``Reader.data``.
        live: whether the page polls its server for newer data.

    Raises:
        ImportError: Plotly is not installed, see ``NEEDS``.
    """
    from plotly.offline import get_plotlyjs

    files = importlib.resources.files("mtr_lab.report.dashboard")
    template, style, *parts = (
        (files / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", *(f"{name}.js" for name in _SCRIPTS))
    )
    script = "\n".join(['"use strict";', "(async () => {", *parts, "})();", ""])  # one scope, apart from Plotly's
    # Browsers hash the text with line feeds, up to the end tag, which must not occur in it.
    scripts = [text.replace("\r\n", "\n").replace("</script", r"<\/script") for text in (get_plotlyjs(), script)]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    sources = {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "connect-src": "'self'" if live else "'none'",
        "script-src": " ".join(f"'sha256-{digest}'" for digest in hashes),
    }
    values = {
        "live": str(live).lower(),
        "policy": "; ".join(f"{name} {value}" for name, value in sources.items()),
        "style": style,
        "data": _packed(to_json(data)),
        "plotly": _packed(scripts[0]),
        "script": scripts[1],
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _packed(text: str) -> str:
    """A text as the page unpacks it: compressed by gzip, in base64. A page of many results is a fifth as large."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def to_json(data: dict[str, Any]) -> str:
    """JSON as browsers read it: numbers that are not finite, from hand-written results, are null."""
    try:
        return json.dumps(data, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(data), parse_constant=lambda name: None), ensure_ascii=False)
