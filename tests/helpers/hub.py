"""A server that plays the Hugging Face Hub for uploads, as far as huggingface_hub asks it."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class StandInHub(ThreadingHTTPServer):
    """``repositories``: their files by name. ``visibility``: what each was made with."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, Any] = {}
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: StandInHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self._answer({"error": f"no {self.path} here"}, 404)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/api/whoami-v2":
            self._answer({"name": "someone", "type": "user", "orgs": []})
        elif path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/").partition("/revision/")[0]
            files = self.server.repositories.get(name)
            if files is None:
                self._answer({"error": "Repository not found"}, 404, "RepoNotFound")
            else:
                self._answer({"id": name, "sha": "0" * 40, "siblings": [{"rfilename": n} for n in files], "tags": []})
        else:
            self._answer({"error": "Entry not found"}, 404, "EntryNotFound")

    do_HEAD = do_GET

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        if name.startswith("refused/"):
            self._answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
            return
        self.server.repositories.setdefault(name, {})
        self.server.visibility[name] = asked.get("private") or asked.get("visibility") == "private"
        self._answer({"url": f"{self.server.url}/{name}", "name": name, "id": "0"})

    def _commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[name][line["value"]["path"]] = content
        url = f"{self.server.url}/{name}/commit/{'0' * 40}"
        self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})

    def _answer(self, content: Any, status: int = 200, code: str | None = None) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)


@contextmanager
def stand_in_hub() -> Iterator[StandInHub]:
    """The server, running in a thread; for processes with HF_ENDPOINT set to its ``url``."""
    hub = StandInHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
