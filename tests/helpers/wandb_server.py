"""A server on this machine that keeps the rows of wandb runs, and has enough of wandb for that."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_ENTITY = {"id": "entity", "name": "me"}
_PROJECT = {"id": "project", "name": "siftclip", "entity": _ENTITY}


class WandbServer:
    """Keeps the rows of each run by their place, and says how many it has."""

    def __init__(self, port: int) -> None:
        """Have no run yet; the port is where it is asked."""
        self.url = f"http://127.0.0.1:{port}"
        self.runs: dict[str, dict[int, str]] = {}  # by run and place, as JSON

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
            self._body()
            self._send({})

        def do_POST(self) -> None:
            body = self._body()
            if "/file_stream" in self.path:
                self._send(server.stream(self.path.split("/")[-2], body))
            else:
                self._send(server.answer(body))

        def _body(self) -> dict[str, Any]:
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                raw = gzip.decompress(raw)
            try:
                body = json.loads(raw)
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

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server = WandbServer(http.server_address[1])
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield server
        http.shutdown()
        thread.join()
