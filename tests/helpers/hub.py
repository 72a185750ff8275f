"""A stand-in for the Hugging Face Hub: it takes the calls of ``create_repo`` and ``upload_folder`` and keeps the files."""

import base64
import contextlib
import http.server
import json
import threading
from collections.abc import Iterator

TOKEN = "hf_stand_in"


class Hub(http.server.ThreadingHTTPServer):
    """The server; ``files`` are those of its repositories, ``refuses`` the status of those that take no upload."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.refuses: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.partition("?")[0].split("/")[2:]
        repo = "/".join(parts[1:3])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif parts == ["repos", "create"]:
            about = json.loads(body)
            self._create("/".join(filter(None, (about.get("organization") or "me", about["name"]))))
        elif parts == ["validate-yaml"]:
            self._answer(200, {"errors": [], "warnings": []})
        elif parts[3] == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self._answer(200, {"files": modes})
        elif parts[3] == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/1", "commitOid": "1" * 40})
        else:
            self._answer(404, {"error": f"no {self.path}"})

    def do_GET(self) -> None:
        self._answer(404, {"error": f"no {self.path}"})

    def _create(self, repo: str) -> None:
        if status := self.server.refuses.get(repo):
            self._answer(
                status, {"error": f"You don't have the rights to create a model under the namespace of {repo}"}
            )
        else:
            self.server.files.setdefault(repo, {})
            self._answer(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})

    def _answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        if status >= 400:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *ignored: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def opened(monkeypatch) -> Iterator[Hub]:
    """A hub on this machine that `huggingface_hub` of this process calls, with the token of somebody who may write."""
    from huggingface_hub import constants

    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
