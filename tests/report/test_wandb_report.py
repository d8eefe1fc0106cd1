"""Building a W&B report, against a server in this process that speaks as much of W&B's GraphQL as that takes."""

import base64
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mtr_lab.errors import UserError
from mtr_lab.report.__main__ import main
from mtr_lab.report.result import Result, write_result
from mtr_lab.report.wandb_report import build

pytest.importorskip("wandb_workspaces")


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: list[tuple[str, dict]] = []
        self.refuse = False


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/graphql":  # its own telemetry
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        request = json.loads(content)
        query, variables = request["query"], request.get("variables") or {}
        self.server.calls.append((query, variables))
        if self.server.refuse and "upsertView" in query:
            answer = {"errors": [{"message": "permission denied"}]}
        elif "upsertView" in query:
            view = {
                "id": base64.b64encode(b"View:1").decode(),
                "type": "runs",
                "name": variables["name"],
                "displayName": variables["displayName"],
                "description": variables["description"],
                "project": {"name": variables["projectName"], "entityName": "me"},
                "spec": variables["spec"],
                "createdAt": "2025-01-01T00:00:00",
                "updatedAt": "2025-01-01T00:00:00",
                "user": {"username": "me", "name": "me", "id": "1", "photoUrl": None},
            }
            answer = {"data": {"upsertView": {"view": view, "inserted": True}}}
        elif "models" in query or "projects" in query:
            project = {
                "id": "1",
                "name": "lab",
                "entityName": "me",
                "createdAt": "2025-01-01T00:00:00",
                "isBenchmark": False,
                "user": None,
            }
            page = {"edges": [{"node": project, "cursor": "a"}], "pageInfo": {"endCursor": "a", "hasNextPage": False}}
            answer = {"data": {"models": page}}
        else:
            viewer = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "admin": False, "name": "me"}
            viewer |= {"email": "m@e", "deletedAt": None, "apiKeys": {"edges": []}, "teams": {"edges": []}}
            answer = {"data": {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}, "features": []}}}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        yield server
        server.shutdown()


def test_a_report_has_the_table_and_the_curves(result: Result, server: Server) -> None:
    address = build([result, result], "lab", entity="me")
    assert "lab" in address
    (saved,) = [variables for query, variables in server.calls if "upsertView" in query]
    assert (saved["entityName"], saved["projectName"]) == ("me", "lab")
    assert saved["displayName"] == "vim_s on imagenet"
    assert saved["spec"].count("| vim_s | imagenet | mtr@0.4 | 40.2 % | 78.9 % | 90.0 % | 0.149 |") == 1
    assert '"mtr/top1"' in saved["spec"]
    assert '"mtr/kl"' in saved["spec"]


def test_a_refusal_is_the_users_to_know(result: Result, server: Server) -> None:
    server.refuse = True
    with pytest.raises(UserError, match="W&B did not take the report for project 'lab'.*permission denied"):
        build([result], "lab", entity="me")


def test_no_login(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="log in"):
        build([result], "lab")


def test_no_package(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(UserError, match=r"mtr-lab\[workspaces\]"):
        build([result], "lab")


def test_no_result() -> None:
    with pytest.raises(UserError, match="no result to report"):
        build([], "lab")


def test_the_command_line_names_the_project(
    result: Result, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_result(result, tmp_path / "run")
    main([str(tmp_path), "wandb=team/lab"])
    assert capsys.readouterr().out.startswith("made http")
    (saved,) = [variables for query, variables in server.calls if "upsertView" in query]
    assert (saved["entityName"], saved["projectName"]) == ("team", "lab")
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main(["wandb=lab"])
    assert "say which results" in capsys.readouterr().err
