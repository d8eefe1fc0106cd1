"""The dashboard of a running sweep: served on this machine, it follows the results."""

import hashlib
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mtr_lab.errors import UserError
from mtr_lab.report.dashboard import Reader, page, to_json


def make_server(paths: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server on localhost whose page asks it for changed results; ``serve_forever`` runs it.

    Args:
        paths: see ``Reader``; folders may still be empty.
        port: 0 takes a free one, see the server's ``server_port``.

    Raises:
        UserError: the port is taken, or what ``Reader.data`` and ``page`` refuse.
    """
    source = _Source(paths)
    page(source.data, live=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in ("/", "/data.json"):
                return self.send_error(HTTPStatus.NOT_FOUND)
            try:
                source.refresh()
            except (UserError, OSError) as error:  # a folder that went away while it was read
                return self._send(HTTPStatus.SERVICE_UNAVAILABLE, str(error).encode(), "text/plain")
            if self.path == "/":
                return self._send(HTTPStatus.OK, page(source.data, live=True).encode(), "text/html")
            if self.headers.get("If-None-Match") == source.tag:
                return self._send(HTTPStatus.NOT_MODIFIED)
            self._send(HTTPStatus.OK, source.json, "application/json")

        def _send(self, status: HTTPStatus, content: bytes = b"", kind: str = "") -> None:
            self.send_response(status)
            self.send_header("ETag", source.tag)
            self.send_header("Cache-Control", "no-store")
            if content:
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            """Nothing: a line a second would hide what matters."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve on port {port}: {error}. Choose another with --port.") from error


class _Source:
    """The newest data of some results, as the page reads it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._reader = Reader(paths)
        self._lock = threading.Lock()
        self._stamp: Any = None
        self.refresh()

    def refresh(self) -> None:
        """Read what has changed. One thread does, the others wait for it."""
        with self._lock:
            stamp = self._reader.stamp()
            if stamp != self._stamp:
                self.data = self._reader.data()
                self.json = to_json(self.data).encode()
                self.tag = f'"{hashlib.sha256(self.json).hexdigest()}"'
                self._stamp = stamp
