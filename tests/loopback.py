"""A server on the loopback that the real W&B client takes for W&B: it answers what is asked and keeps what is sent.

It speaks as much of the protocol as runs, tables, artifacts and reports need. It proves what is sent and that the
client accepts plausible answers, not that W&B itself would show it.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ENTITY = "lab"
KEY = "a" * 40
"""An API key of the right length."""


@dataclass
class ReceivedRun:
    """What arrived of one run. fields: of its last upsert that were not null; history: rows by line number."""

    fields: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    exit_code: int | None = None
    starts: int = 0

    @property
    def history(self) -> list[dict[str, Any]]:
        return [self.lines[number] for number in sorted(self.lines)]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history without what the client adds of its own, and without tables and histograms."""
        return [
            {key: value for key, value in line.items() if not key.startswith("_") and not isinstance(value, dict)}
            for line in self.history
        ]


@dataclass
class Loopback:
    """The server's state. Its lock is held while a request is answered.

    runs: by project and id, as in "study/run1".
    down: answers nothing but 503, as in an outage. refuses_key: answers 401, as to a key that was revoked.
    refuses_rows: answers rows with 403, which the client does not tell its caller.
    refuses_project: lets nobody write to any project.
    sweep: the YAML text of the one sweep there is; commands: what its agent is told next, one at a heartbeat.
    """

    runs: dict[str, ReceivedRun] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)
    projects: list[str] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)
    down: bool = False
    refuses_key: bool = False
    refuses_rows: bool = False
    refuses_project: bool = False
    sweep: str = ""
    commands: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    @property
    def requests(self) -> int:
        return sum(self.operations.values())

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that talks to this server and to no other; `home` keeps its settings apart."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_CONFIG_DIR": str(home / "config"),
            "WANDB_CACHE_DIR": str(home / "cache"),
            "WANDB_DATA_DIR": str(home / "data"),
            "HOME": str(home),
        }

    # -- GraphQL -----------------------------------------------------------------------------------------------------

    def answer(self, name: str, variables: Mapping[str, Any]) -> dict[str, Any] | None:
        """The data of an operation's answer; None for one that is not known here, or not allowed."""
        self.operations[name] += 1
        method = getattr(self, f"_{re.sub(r'(?<!^)(?=[A-Z])', '_', name).lower()}", None)
        if method is None:
            self.unknown.append(name)
            return None
        answered: dict[str, Any] | None = method(variables)
        return answered

    def _viewer(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "viewer": {
                "id": "user", "name": ENTITY, "entity": ENTITY, "username": ENTITY, "email": "lab@example.org",
                "flags": "{}", "admin": False, "deletedAt": None,
                "teams": {"edges": []}, "apiKeys": {"edges": []},
            }
        }  # fmt: skip

    _get_default_entity = _viewer

    def _run(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        name, run = variables["name"], self.runs.get(f"{variables['project']}/{variables['name']}")
        if run is None:
            return {"project": {"run": None}}
        shown = self._bucket(name, run) | {
            "state": "running" if run.exit_code is None else "finished" if run.exit_code == 0 else "failed",
            "group": run.fields.get("groupName"), "jobType": run.fields.get("jobType"), "commit": None,
            "readOnly": False, "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00",
            "systemMetrics": "{}", "historyKeys": {}, "projectId": 1, "user": {"name": ENTITY, "username": ENTITY},
        }  # fmt: skip
        return {"project": {"internalId": "1", "run": shown}}

    def _server_info(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}}

    def _server_features_query(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    _server_features = _server_features_query

    def _bucket(self, name: str, run: ReceivedRun) -> dict[str, Any]:
        tail = [json.dumps(line) for line in run.history[-1:]]
        return {
            "id": f"id-{name}",
            "name": name,
            "displayName": run.fields.get("displayName"),
            "description": None,
            "notes": None,
            "tags": run.fields.get("tags") or [],
            "sweepName": None,
            "config": json.dumps(run.config),
            "wandbConfig": json.dumps({"t": run.config.get("_wandb", {}).get("value", {}).get("t", {})}),
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.lines),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "project": self._project(run.fields.get("project", "")),
        }

    @staticmethod
    def _project(name: str) -> dict[str, Any]:
        return {"id": f"id-{name}", "internalId": "UHJvamVjdDox", "name": name, "entity": {"id": "e", "name": ENTITY}}

    def _run_resume_status(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        run = self.runs.get(f"{variables['project']}/{variables['name']}")
        bucket = None if run is None else self._bucket(variables["name"], run)
        return {"model": {**self._project(variables["project"]), "bucket": bucket}}

    def _upsert_bucket(self, variables: Mapping[str, Any]) -> dict[str, Any] | None:
        if self.refuses_project:
            return None
        path = f"{variables['project']}/{variables['name']}"
        inserted = path not in self.runs
        run = self.runs.setdefault(path, ReceivedRun())
        run.fields |= {key: value for key, value in variables.items() if value is not None}
        run.starts += variables.get("program") is not None  # only the first upsert of a session names it
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        if variables.get("summaryMetrics"):
            run.summary = json.loads(variables["summaryMetrics"])
        if variables.get("project") and variables["project"] not in self.projects:
            self.projects.append(variables["project"])
        return {"upsertBucket": {"bucket": self._bucket(variables["name"], run), "inserted": inserted}}

    def _create_run_files(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": self._upload_url(variables["run"], name)} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _upload_url(self, *path: str) -> str:
        return "/".join([self.url, "upload", *path])

    # Artifacts: a table is one too.

    def _artifact_type(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _create_artifact(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        flat = variables.get("input") or variables
        self.artifacts.append(dict(flat))
        number = f"artifact-{len(self.artifacts)}"
        artifact = {
            "id": number, "state": "PENDING", "versionIndex": 0,
            "artifactSequence": {"latestArtifact": None, "id": f"sequence-{number}"},
        }  # fmt: skip
        return {"createArtifact": {"artifact": artifact}}

    def _create_artifact_manifest(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        file = {"name": "manifest", "uploadUrl": self._upload_url("manifest", str(self.operations["CreateArtifact"]))}
        manifest = {"id": f"manifest-{len(self.artifacts)}", "file": {**file, "uploadHeaders": []}}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    _update_artifact_manifest = _create_artifact_manifest

    def _create_artifact_files(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        specs = variables.get("artifactFiles") or variables["input"]["artifactFiles"]
        edges = [
            {
                "node": {
                    "id": f"file-{spec['name']}", "name": spec["name"], "displayName": spec["name"],
                    "uploadUrl": self._upload_url("artifact", spec["name"]), "uploadHeaders": [],
                    "uploadMultipartUrls": None, "storagePath": f"stored/{spec['name']}",
                    "artifact": {"id": spec.get("artifactID", "artifact")},
                }
            }
            for spec in specs
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _commit_artifact(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": variables.get("artifactID"), "digest": "committed"}}}

    # Sweeps.

    def _sweep_with_runs(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        sweep = {
            "id": "sweep",
            "name": variables["sweep"],
            "state": "RUNNING",
            "config": self.sweep,
            "runs": {"edges": []},
        }
        return {"project": {"sweep": sweep}}

    def _create_agent(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "agent"}}}

    def _heartbeat(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        commands = [self.commands.pop(0)] if self.commands else []
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}

    # Reports.

    def _project_internal_id(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        name = variables.get("projectName") or variables.get("name") or ""
        return {"project": self._project(name) if name in self.projects else None}

    def _get_projects(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        user = {"id": "user", "name": ENTITY, "username": ENTITY, "email": None, "admin": False, "flags": "{}",
                "entity": ENTITY, "deletedAt": None, "apiKeys": {"edges": []}, "teams": {"edges": []}}  # fmt: skip
        edges = [
            {
                "node": {**self._project(name), "entityName": ENTITY, "createdAt": "2026-01-01T00:00:00",
                         "isBenchmark": False, "user": user},
                "cursor": name,
            }
            for name in self.projects
        ]  # fmt: skip
        return {"models": {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}}

    _projects = _get_projects

    def _create_project(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or variables["input"]["name"]
        self.projects.append(name)
        return {"upsertModel": {"model": self._project(name), "project": self._project(name), "inserted": True}}

    def _upsert_view(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        self.reports.append(dict(variables))
        view = {
            "id": f"Vmlldzo{len(self.reports)}", "name": variables["name"], "type": variables["type"],
            "displayName": variables["displayName"], "description": variables["description"],
            "project": {"id": "p", "name": variables["projectName"], "entityName": ENTITY},
            "createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00", "coverUrl": None,
            "spec": variables["spec"], "previewUrl": None, "user": {"name": ENTITY, "username": ENTITY, "userInfo": {}},
        }  # fmt: skip
        return {"upsertView": {"view": view, "inserted": True}}

    _upsert_view2 = _upsert_view

    # -- the stream of a run -----------------------------------------------------------------------------------------

    def stream(self, path: str, sent: Mapping[str, Any]) -> None:
        """Rows, summary and exit code of a run, in the form of its file stream."""
        self.operations["file_stream"] += 1
        run = self.runs[path]
        for name, chunk in (sent.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                for at, line in enumerate(chunk["content"]):
                    run.lines[chunk["offset"] + at] = json.loads(line)
            elif name == "wandb-summary.json":
                run.summary = json.loads(chunk["content"][-1])
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Loopback
    lock: threading.Lock

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing goes to the terminal."""

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _write(self, body: Any, code: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refused(self) -> bool:
        if self.state.down:
            self._write({"errors": [{"message": "down for maintenance"}]}, 503)
        elif self.state.refuses_key:
            self._write({"errors": [{"message": "user is not logged in"}]}, 401)
        return self.state.down or self.state.refuses_key

    def do_PUT(self) -> None:
        body = self._read()
        if not self._refused():
            with self.lock:
                self.state.uploads[self.path.removeprefix("/upload/")] = body
            self._write({})

    def do_GET(self) -> None:
        self._write({})

    def do_POST(self) -> None:
        body = self._read()
        if self._refused():
            return
        if self.path == "/graphql":
            asked = json.loads(body)
            named = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            name = asked.get("operationName") or (named.group(1) if named else "anonymous")
            with self.lock:
                data = self.state.answer(name, asked.get("variables") or {})
            if data is None:
                self._write({"errors": [{"message": f"{name}: permission denied"}]})
            else:
                self._write({"data": data})
        elif streamed := re.fullmatch(r"/files/[^/]+/([^/]+/[^/]+)/file_stream", self.path):
            if self.state.refuses_rows:
                self._write({"error": "denied"}, 403)
                return
            with self.lock:
                self.state.stream(streamed.group(1), json.loads(body))
            self._write({})
        else:
            self._write({})  # telemetry of the client


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may hang up: it does when it ends."""


@contextmanager
def loopback() -> Iterator[Loopback]:
    """A running server; it ends with the block."""
    state = Loopback()
    handler = type("Handler", (_Handler,), {"state": state, "lock": threading.Lock()})
    server = _Server(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
