"""A stand-in for the Hugging Face hub: its HTTP interface on this machine, with what was uploaded in memory."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub

COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    """Repositories are created, written in one commit of small files, listed and read."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        repositories = self.server.repositories
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            repositories.setdefault(name, {})
            return self.answer({"url": f"{self.server.address}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name, action = re.fullmatch(r"/api/models/(\w+/\w+)/(preupload|commit)/main", self.path).groups()
        if action == "preupload":
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.answer({"files": [{"path": f["path"], **plain} for f in json.loads(body)["files"]]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.answer(
            {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}"}
        )

    def do_GET(self):
        if found := re.fullmatch(r"/api/models/(\w+/\w+)(/revision/\w+|/tree/\w+)?(\?.*)?", self.path):
            files = self.server.repositories.get(found[1])
            if files is None:
                return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            if found[2] and found[2].startswith("/tree"):
                return self.answer(
                    [{"type": "file", "path": n, "size": len(x), "oid": digest(x)} for n, x in files.items()]
                )
            siblings = [{"rfilename": name} for name in files]
            return self.answer(
                {"id": found[1], "modelId": found[1], "sha": COMMIT, "siblings": siblings, "private": False}
            )
        repository, file = re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.*)", self.path).groups()
        content = self.server.repositories.get(repository, {}).get(file)
        if content is None:
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(content)}"', "Accept-Ranges": "bytes"}
        self.answer(content, headers=headers)

    do_HEAD = do_GET

    def answer(self, content, status=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def local_hub(monkeypatch, cache):
    """Lets huggingface_hub, in this process, talk to a hub on this machine; yields {repository: {file: content}}."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories, server.address = {}, f"http://127.0.0.1:{server.server_address[1]}"
    constants = huggingface_hub.constants
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()  # the next one reads the environment anew
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.repositories
    finally:
        server.shutdown()
        server.server_close()
