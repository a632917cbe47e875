"""A stand-in of the Hub on this machine: the part of its HTTP interface with which `huggingface_hub` creates, fills
and reads a model's repository. Files of weights and pictures travel by Git LFS, the others inside the commit."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


USER = "someone"
TOKEN = "hf_right"
READ_TOKEN = "hf_read_only"
COMMIT = "0123456789" * 4
LFS_SUFFIXES = (".safetensors", ".png")


class LocalHub(ThreadingHTTPServer):
    """`repositories` maps names "user/name" to what they hold: path -> bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def environment(self, token: str = TOKEN) -> dict[str, str]:
        # hf_xet would upload to a content store with a protocol of its own.
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


@contextmanager
def run_local_hub():
    with LocalHub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def may(self, write: bool) -> bool:
        """Whether the request's token allows it; if not, the request is answered."""
        token = self.headers["Authorization"]
        if token not in ([] if write else [None]) + [f"Bearer {TOKEN}", f"Bearer {READ_TOKEN}"]:
            self.answer({"error": "Invalid username or password."}, status=401)
            return False
        if write and token != f"Bearer {TOKEN}":
            self.answer({"error": "This token has no write access."}, status=403)
            return False
        return True

    def do_POST(self):
        body = self.read_body()
        if not self.may(write=self.path != "/api/validate-yaml"):
            return
        if self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            self.answer_upload_modes(json.loads(body)["files"])
        elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
            self.answer_lfs_actions(json.loads(body)["objects"])
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer({"error": f"no POST {self.path}"}, status=404)

    def create(self, wanted: dict):
        name = f"{wanted['organization'] or USER}/{wanted['name']}"
        exists = name in self.server.repositories
        self.server.repositories.setdefault(name, {})
        self.answer({"url": f"{self.server.url}/{name}"}, status=409 if exists else 200)

    def answer_upload_modes(self, files: list[dict]):
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self.answer({"files": modes})

    def answer_lfs_actions(self, objects: list[dict]):
        self.answer(
            {"objects": [{**entry, "actions": {"upload": {"href": self.lfs_url(entry["oid"])}}} for entry in objects]}
        )

    def lfs_url(self, oid: str) -> str:
        return f"{self.server.url}/lfs/{oid}"

    def do_PUT(self):
        content = self.read_body()
        oid = hashlib.sha256(content).hexdigest()
        if self.path == f"/lfs/{oid}":
            self.server.lfs_objects[oid] = content
            self.answer({})
        else:
            self.answer({"error": f"the content of {self.path} has the hash {oid}"}, status=400)

    def commit(self, name: str, lines: list[dict]):
        files = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs_objects[value["oid"]]
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self):
        if not self.may(write=self.path.endswith("/auth-check/write")):
            return
        if self.path.endswith("/auth-check/write"):
            self.answer({})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", self.path):
            if match[1] not in self.server.repositories:
                return self.answer({"error": "no such repository"}, 404, {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": path} for path in self.server.repositories[match[1]]]
            self.answer({"id": match[1], "sha": COMMIT, "siblings": siblings})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", self.path.partition("?")[0]):
            files = self.server.repositories[match[1]].items()
            self.answer([{"type": "file", "path": path, "size": len(data), "oid": COMMIT} for path, data in files])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
            content = self.server.repositories.get(match[1], {}).get(match[2])
            if content is None:
                return self.answer({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
            tag = hashlib.sha256(content).hexdigest()
            self.send(content, 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer({"error": f"no GET {self.path}"}, 404)

    do_HEAD = do_GET

    def read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, content: dict | list, status: int = 200, headers: dict[str, str] | None = None):
        self.send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, content: bytes, status: int, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        """Quiet."""
