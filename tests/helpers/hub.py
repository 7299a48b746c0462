"""A local stand-in for the HTTP interface of the Hugging Face Hub: reading repositories, and committing to them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub

from compressvit.model import hub


class Hub(BaseHTTPRequestHandler):
    """Files of repositories by `ORG/NAME`, at the address that a client asks for them."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    private: ClassVar[dict[str, bool]] = {}
    asked: ClassVar[list[str]] = []
    token = "hf_of_nobody"
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, whole):
        if self.path.startswith("/api/models/"):
            return self._describe(*self.path.strip("/").split("/")[2:4])
        if self.path.startswith("/api/"):  # what a client asks for besides, such as who it is
            return self._say(404, {"error": "not here"})
        organisation, name, kind, revision, file = self.path.strip("/").split("/")
        files = self.repositories.get(f"{organisation}/{name}")
        self.asked.append(f"{self.command} {revision} {file}")
        content = None if files is None or kind != "resolve" else files.get(file)
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "RepoNotFound" if files is None else "EntryNotFound")
            content = b""
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if whole:
            self.wfile.write(content)

    def do_POST(self):
        """What `create_repo` and `create_commit` ask for."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.path.strip("/").split("/")
        self.asked.append(f"POST {self.path}")
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            return self._say(401, {"error": "Invalid username or password."})
        if kind[:3] == ["api", "repos", "create"]:
            given = json.loads(content)
            name = f"{given['organization']}/{given['name']}"
            if name in self.repositories:
                return self._say(409, {"url": f"http://{self.headers['Host']}/{name}", "error": "it is there already"})
            self.private[name] = bool(given.get("private") or given.get("visibility") == "private")
            self.repositories.setdefault(name, {})
            return self._say(200, {"url": f"http://{self.headers['Host']}/{name}"})
        if kind[-1] == "validate-yaml":
            return self._say(200, {"errors": [], "warnings": []})
        organisation, name, verb = kind[2:5]
        if verb == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(content)["files"]
            ]
            return self._say(200, {"files": files})
        assert verb == "commit"
        for line in content.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                file = entry["value"]
                self.repositories[f"{organisation}/{name}"][file["path"]] = base64.b64decode(file["content"])
        url = f"http://{self.headers['Host']}/{organisation}/{name}/commit/{self.commit}"
        return self._say(200, {"success": True, "commitOid": self.commit, "commitUrl": url, "hookOutput": ""})

    def _say(self, code, found):
        content = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _describe(self, organisation, name):
        files = self.repositories.get(f"{organisation}/{name}")
        self.asked.append("what is there")
        found = {
            "id": f"{organisation}/{name}",
            "sha": self.commit,
            "private": self.private.get(f"{organisation}/{name}", False),
            "siblings": [{"rfilename": file} for file in files or ()],
        }
        content = json.dumps(found).encode()
        self.send_response(404 if files is None else 200)
        if files is None:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def repositories_of(monkeypatch, tmp_path):
    """What the stand-in has, empty at first, for as long as a test lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": address,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(Hub, "repositories", {})
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "private", {})
    monkeypatch.setenv("HF_TOKEN", Hub.token)
    hub._downloaded.cache_clear()
    yield Hub.repositories
    hub._downloaded.cache_clear()
    server.shutdown()
    server.server_close()
