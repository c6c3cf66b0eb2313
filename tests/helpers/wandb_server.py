"""A server on this machine that keeps rows and artifacts of wandb runs, and has enough for that."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_ENTITY = {"id": "entity", "name": "me"}
_NO_SEQUENCE = {"latestArtifact": None}
_PROJECT = {"id": "project", "name": "siftclip", "entity": _ENTITY}


@dataclass
class KeptArtifact:
    """An artifact as the server has it."""

    name: str
    kind: str
    digest: str
    metadata: dict[str, Any]
    made_by: str  # a run
    used_by: list[str] = field(default_factory=list)  # runs
    files: list[str] = field(default_factory=list)
    is_committed: bool = False


class WandbServer:
    """Keeps the rows of each run by their place, and says how many it has."""

    def __init__(self, port: int) -> None:
        """Have no run yet; the port is where it is asked."""
        self.url = f"http://127.0.0.1:{port}"
        self.runs: dict[str, dict[int, str]] = {}  # by run and place, as JSON
        self.artifacts: dict[str, KeptArtifact] = {}  # by id
        self.uploads: dict[str, bytes] = {}  # by path

    def rows(self, run: str) -> list[dict[str, Any]]:
        """Return the rows of a run, in their order."""
        return [json.loads(row) for _, row in sorted(self.runs.get(run, {}).items())]

    def stream(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        """Take rows."""
        kept = self.runs.setdefault(run, {})
        part = (body.get("files") or {}).get("wandb-history.jsonl", {"content": [], "offset": 0})
        kept.update({part["offset"] + at: row for at, row in enumerate(part["content"])})
        return {}

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a question in GraphQL, by the fields that it asks for."""
        query, variables = body.get("query", ""), body.get("variables") or {}
        operation = re.search(r"mutation (\w*Artifact\w*)", query)
        if operation is not None:
            field_name = operation[1][0].lower() + operation[1][1:]
            return {"data": {field_name: self._of_artifact(operation[1], variables)}}
        if "query ArtifactType" in query:
            return {"data": {"project": None}}  # none of this name yet
        name = next((variables[key] for key in ("name", "run") if variables.get(key)), "")
        bucket = {"id": "bucket", "name": name, "displayName": name, "project": _PROJECT}
        answers: dict[str, Any] = {
            "upsertBucket": {
                "bucket": {**bucket, "historyLineCount": 0},
                "inserted": name not in self.runs,
            },
            "viewer": {"id": "me", "entity": "me", "username": "me", "flags": "{}", "teams": {}},
            "createRunFiles": {"runID": "bucket", "uploadHeaders": [], "files": []},
            "serverInfo": {"features": [], "cliVersionInfo": {"max_cli_version": "9.0.0"}},
            "model": {**_PROJECT, "bucket": self._state(name)},
        }
        return {"data": {field: answers[field] for field in answers if f"{field}" in query}}

    def _of_artifact(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        given = variables.get("input") or {}
        if operation == "CreateArtifact":
            return self._new_artifact(given)
        if operation.endswith("ArtifactManifest"):
            return {"artifactManifest": {"id": "manifest", "file": self._place("manifest")}}
        if operation == "CreateArtifactFiles":
            nodes = []
            for each in given["artifactFiles"]:
                self.artifacts[each["artifactID"]].files.append(each["name"])
                place = self._place(f"{each['artifactID']}/{each['name']}")
                nodes.append({"node": {**place, "artifact": {"id": each["artifactID"]}}})
            return {"files": {"edges": nodes}}
        identity = given.get("artifactID") or variables["artifactID"]
        artifact = self.artifacts[identity]
        if operation == "CommitArtifact":
            artifact.is_committed = True
        else:
            artifact.used_by.append(given["runName"])
        return {"artifact": {"id": identity, "digest": artifact.digest}}

    def _new_artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        name, digest = given["artifactCollectionName"], given["digest"]
        known = (i for i, a in self.artifacts.items() if (a.name, a.digest) == (name, digest))
        identity = next(known, given["clientID"])
        self.artifacts.setdefault(
            identity,
            KeptArtifact(
                name=name,
                kind=given["artifactTypeName"],
                digest=digest,
                metadata=json.loads(given.get("metadata") or "{}"),
                made_by=given["runName"],
            ),
        )
        is_committed = self.artifacts[identity].is_committed
        state = "COMMITTED" if is_committed else "PENDING"
        return {"artifact": {"id": identity, "state": state, "artifactSequence": _NO_SEQUENCE}}

    def _place(self, path: str) -> dict[str, Any]:
        """Where a file is to be sent."""
        return {
            "id": path,
            "storagePath": path,
            "uploadUrl": f"{self.url}/upload/{path}",
            "uploadHeaders": [],
            "uploadMultipartUrls": None,
        }

    def _state(self, run: str) -> dict[str, Any] | None:
        rows = self.runs.get(run)
        if not rows:
            return None
        last = max(rows)
        return {
            "id": "bucket",
            "name": run,
            "displayName": run,
            "tags": [],
            "notes": None,
            "summaryMetrics": "{}",
            "config": "{}",
            "wandbConfig": '{"t": 1}',
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "historyLineCount": last + 1,
            "historyTail": json.dumps([rows[last]]),
        }


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        """Say nothing of clients that have ended."""


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Start one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._send({})

        def do_PUT(self) -> None:
            server.uploads[self.path.removeprefix("/upload/")] = self._raw()
            self._send({})

        def do_POST(self) -> None:
            body = self._body()
            if "/file_stream" in self.path:
                self._send(server.stream(self.path.split("/")[-2], body))
            else:
                self._send(server.answer(body))

        def _raw(self) -> bytes:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw

        def _body(self) -> dict[str, Any]:
            try:
                body = json.loads(self._raw())
            except ValueError:  # a file that is uploaded
                body = {}
            return body if isinstance(body, dict) else {}

        def _send(self, answer: dict[str, Any]) -> None:
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with _QuietServer(("127.0.0.1", 0), Handler) as http:
        server = WandbServer(http.server_address[1])
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield server
        http.shutdown()
        thread.join()
