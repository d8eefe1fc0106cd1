"""The dashboard of a running sweep: a server on this machine whose page shows new results as they appear."""

import hashlib
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from mtr_lab.errors import UserError
from mtr_lab.packages import require
from mtr_lab.report.dashboard.page import NEEDS, page, to_json
from mtr_lab.report.dashboard.reader import Reader

_NAMES = ("localhost", "127.0.0.1", "[::1]")


def make_server(paths: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """Make a server on localhost whose page polls it for newer results; ``serve_forever`` runs it.

    Args:
        paths: see ``Reader``; folders may still be empty.
        port: 0 takes a free one, see the server's ``server_port``.

    Raises:
        UserError: the port is taken, Plotly is not installed, or what ``Reader.data`` refuses.
    """
    require(*NEEDS)
    source = _Source(paths)
    page(source.refresh().data, live=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # DNS rebinding: another site may let its name point to this machine in order to read the results.
            port = self.connection.getsockname()[1]
            if self.headers.get("Host") not in [f"{name}:{port}" for name in _NAMES]:
                return self._send(HTTPStatus.FORBIDDEN, f"open http://localhost:{port}".encode(), "text/plain")
            if self.path not in ("/", "/data.json"):
                return self.send_error(HTTPStatus.NOT_FOUND)
            try:
                data, json, tag = source.refresh()
            except (UserError, OSError) as error:  # a folder was removed while it was read
                return self._send(HTTPStatus.SERVICE_UNAVAILABLE, str(error).encode(), "text/plain")
            if self.path == "/":
                return self._send(HTTPStatus.OK, page(data, live=True).encode(), "text/html")
            if self.headers.get("If-None-Match") == tag:
                return self._send(HTTPStatus.NOT_MODIFIED, tag=tag)
            self._send(HTTPStatus.OK, json, "application/json", tag)

        def _send(self, status: HTTPStatus, content: bytes = b"", kind: str = "", tag: str = "") -> None:
            self.send_response(status)
            self.send_header("Cache-Control", "no-store")
            if tag:
                self.send_header("ETag", tag)
            if content:
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            """Log nothing: a line a second would hide other output."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve on port {port}: {error}. Choose another with --port.") from error


class _Snapshot(NamedTuple):
    """The data of the page at one time."""

    data: dict[str, Any]
    json: bytes
    tag: str  # an ETag, of the JSON


class _Source:
    """The newest data of the page."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._reader = Reader(paths)
        self._lock = threading.Lock()
        self._stamp: Any = None
        self._snapshot: _Snapshot | None = None

    def refresh(self) -> _Snapshot:
        """Read results that have changed. One thread reads, the others wait for it."""
        with self._lock:
            stamp = self._reader.stamp()
            if self._snapshot is None or stamp != self._stamp:
                data = self._reader.data()
                json = to_json(data).encode()
                self._snapshot = _Snapshot(data, json, f'"{hashlib.sha256(json).hexdigest()}"')
                self._stamp = stamp
            return self._snapshot
