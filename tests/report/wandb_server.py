"""A server in this process with the part of W&B's API that uploads runs and builds reports."""

import base64
import gzip
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """Records the requests it receives.

    Attributes:
        calls: (query, variables) of every GraphQL request.
        streamed: the content of every file_stream request, by which a run is sent while it lasts.
        files: uploaded content by name; the files of an artifact have its name in front.
        refuse: whether to refuse reports.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.streamed: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuse = False

    def asked(self, field: str) -> list[dict[str, Any]]:
        """The variables of the requests for a field of the API, in order."""
        return [variables for query, variables in self.calls if f"{field}(" in query]

    def lines(self, file: str) -> list[dict[str, Any]]:
        """The JSON objects streamed into a file, one per line."""
        parts = [content["files"][file] for content in self.streamed if file in content.get("files", {})]
        return [json.loads(line) for part in parts for line in part["content"]]


class Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        content = self.content()
        if self.path == "/graphql":
            request = json.loads(content)
            query, variables = request["query"], request.get("variables") or {}
            self.server.calls.append((query, variables))
            self.answer(self.graphql(query, variables))
        elif self.path.endswith("/file_stream"):
            self.server.streamed.append(json.loads(content))
            self.answer({"exitcode": None, "limits": {}})
        else:  # its own telemetry
            self.answer({})

    def do_PUT(self) -> None:
        self.server.files[self.path.removeprefix("/upload/")] = self.content()
        self.answer({})

    def graphql(self, query: str, asked: dict[str, Any]) -> dict[str, Any]:
        if self.server.refuse and "upsertView" in query:
            return {"errors": [{"message": "permission denied"}]}
        for field, answer in FIELDS.items():
            if f"{field}(" in query:
                return {"data": {field: answer(self.server.address, asked)}}
        viewer = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "admin": False, "name": "me"}
        viewer |= {"email": "m@e", "deletedAt": None, "apiKeys": {"edges": []}, "teams": {"edges": []}}
        server = {"cliVersionInfo": {}, "features": []}
        nothing = {"model": None, "project": None, "entity": None}  # there is no such run or artifact yet
        return {"data": {"viewer": viewer, "serverInfo": server, **nothing}}

    def content(self) -> bytes:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        return gzip.decompress(content) if self.headers["Content-Encoding"] == "gzip" else content

    def answer(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def run(address: str, asked: dict[str, Any]) -> dict[str, Any]:
    project = {"id": "1", "name": asked["project"], "entity": {"id": "1", "name": asked["entity"] or "me"}}
    bucket = {"id": "1", "name": asked["name"], "displayName": "run", "description": "", "config": "{}"}
    return {"bucket": {**bucket, "project": project, "sweepName": None, "historyLineCount": 0}, "inserted": True}


def run_files(address: str, asked: dict[str, Any]) -> dict[str, Any]:
    files = [{"name": name, "uploadUrl": f"{address}/upload/{name}"} for name in asked["files"]]
    return {"runID": "1", "uploadHeaders": [], "files": files}


def artifact(address: str, asked: dict[str, Any]) -> dict[str, Any]:
    artifact = {"id": asked["input"]["artifactCollectionName"], "state": "PENDING"}
    return {"artifact": {**artifact, "artifactSequence": {"latestArtifact": None}}}


def artifact_files(address: str, asked: dict[str, Any]) -> dict[str, Any]:
    nodes = []
    for file in asked["input"]["artifactFiles"]:
        upload = {"uploadUrl": f"{address}/upload/{file['artifactID']}/{file['name']}", "uploadHeaders": []}
        node = {"storagePath": file["name"], "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}
        nodes.append({"node": {**node, **upload}})
    return {"files": {"edges": nodes}}


def artifact_manifest(address: str, asked: dict[str, Any]) -> dict[str, Any]:
    upload = {"uploadUrl": f"{address}/upload/{asked['artifactID']}/{asked['name']}", "uploadHeaders": []}
    return {"artifactManifest": {"id": "1", "file": {"id": "1", **upload}}}


def committed_artifact(address: str, asked: dict[str, Any]) -> dict[str, Any]:
    return {"artifact": {"id": asked["artifactID"], "digest": ""}}


def view(address: str, asked: dict[str, Any]) -> dict[str, Any]:
    view = {
        "id": base64.b64encode(b"View:1").decode(),
        "type": "runs",
        "name": asked["name"],
        "displayName": asked["displayName"],
        "description": asked["description"],
        "project": {"name": asked["projectName"], "entityName": "me"},
        "spec": asked["spec"],
        "createdAt": "2025-01-01T00:00:00",
        "updatedAt": "2025-01-01T00:00:00",
        "user": {"username": "me", "name": "me", "id": "1", "photoUrl": None},
    }
    return {"view": view, "inserted": True}


def projects(address: str, asked: dict[str, Any]) -> dict[str, Any]:
    project = {
        "id": "1",
        "name": "lab",
        "entityName": "me",
        "createdAt": "2025-01-01T00:00:00",
        "isBenchmark": False,
        "user": None,
    }
    return {
        "edges": [{"node": project, "cursor": "a"}],
        "pageInfo": {"endCursor": "a", "hasNextPage": False},
    }


FIELDS = {
    "upsertBucket": run,
    "createRunFiles": run_files,
    "createArtifact": artifact,
    "createArtifactFiles": artifact_files,
    "createArtifactManifest": artifact_manifest,
    "commitArtifact": committed_artifact,
    "upsertView": view,
    "models": projects,
}
"""The function that answers for each field of the API."""
