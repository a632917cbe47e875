"""A stand-in of the Hub on this machine: the part of its HTTP interface with which `huggingface_hub` and `datasets`
create, fill and read the repositories of models and datasets. Files of weights, pictures and tables travel by Git LFS,
the others inside the commit."""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from unittest import mock
from urllib.parse import urlsplit

import datasets
from huggingface_hub import constants


USER = "someone"
TOKEN = "hf_right"
READ_TOKEN = "hf_read_only"
COMMIT = "0123456789" * 4
LFS_SUFFIXES = (".safetensors", ".png", ".parquet")
# Addresses of datasets begin with their kind; those of models only within the API.
REPOSITORY = r"((?:datasets/)?[^/]+/[^/]+)"
API_REPOSITORY = rf"/api/(?:models/)?{REPOSITORY}"


class LocalHub(ThreadingHTTPServer):
    """`repositories` maps names, "user/name" or "datasets/user/name", to what they hold: path -> bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.lfs_objects: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def environment(self) -> dict[str, str]:
        """Leads another process here."""
        # hf_xet would upload to a content store with a protocol of its own.
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


@contextmanager
def hub_of_this_process(url: str, token: str = TOKEN) -> Iterator[None]:
    """Leads the libraries of this process, which have read their environment already, to the Hub at `url`."""
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    with (
        mock.patch.multiple(constants, ENDPOINT=url, HUGGINGFACE_CO_URL_TEMPLATE=template),
        mock.patch.multiple(constants, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True),
        mock.patch.multiple(datasets.config, HF_ENDPOINT=url, HF_HUB_OFFLINE=False),
        mock.patch.dict(os.environ, {"HF_TOKEN": token}),
    ):
        yield


@contextmanager
def unreachable_hub() -> Iterator[str]:
    """The Hub of a machine without network: yields its address, a port that is taken and where nobody listens."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with hub_of_this_process(url):
            yield url


@contextmanager
def run_local_hub() -> Iterator[LocalHub]:
    with LocalHub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def list_tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """Files and folders below a folder; that of the whole repository is ""."""
    folders = {str(parent) for path in files for parent in list(PurePosixPath(path).parents)[:-1]}
    entries = [{"type": "directory", "path": path, "oid": COMMIT} for path in sorted(folders)]
    entries += [{"type": "file", "path": path, "size": len(data), "oid": COMMIT} for path, data in files.items()]
    start = f"{folder}/" if folder else ""
    below = [entry for entry in entries if entry["path"].startswith(start)]
    return [entry for entry in below if recursive or "/" not in entry["path"].removeprefix(start)]


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
        elif match := re.fullmatch(rf"{API_REPOSITORY}/preupload/main", self.path):
            self.answer_upload_modes(json.loads(body)["files"])
        elif match := re.fullmatch(rf"/{REPOSITORY}\.git/info/lfs/objects/batch", self.path):
            self.answer_lfs_actions(json.loads(body)["objects"])
        elif match := re.fullmatch(rf"{API_REPOSITORY}/commit/main", self.path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer({"error": f"no POST {self.path}"}, status=404)

    def create(self, wanted: dict):
        kind = "datasets/" if wanted.get("type") == "dataset" else ""
        name = f"{kind}{wanted['organization'] or USER}/{wanted['name']}"
        exists = name in self.server.repositories
        self.server.repositories.setdefault(name, {})
        if "private" in (wanted.get("visibility"), wanted.get("private") and "private") and not exists:
            self.server.private.add(name)
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
        address = urlsplit(self.path)
        if self.path.endswith("/auth-check/write"):
            self.answer({})
        elif match := re.fullmatch(rf"{API_REPOSITORY}(/revision/[^/]+)?", address.path):
            if match[1] not in self.server.repositories:
                return self.answer({"error": "no such repository"}, 404, {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": path} for path in self.server.repositories[match[1]]]
            info = {"id": match[1].removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings}
            self.answer(info | {"private": match[1] in self.server.private})
        elif match := re.fullmatch(rf"{API_REPOSITORY}/tree/[^/]+/?(.*)", address.path):
            tree = list_tree(self.server.repositories[match[1]], match[2], "recursive=true" in address.query)
            if match[2] and not tree:
                return self.answer({"error": "no such folder"}, 404, {"X-Error-Code": "EntryNotFound"})
            self.answer(tree)
        elif match := re.fullmatch(rf"/{REPOSITORY}/resolve/[^/]+/(.+)", address.path):
            content = self.server.repositories.get(match[1], {}).get(match[2])
            if content is None:
                return self.answer({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
            self.send_file(content)
        else:
            self.answer({"error": f"no GET {self.path}"}, 404)

    do_HEAD = do_GET

    def send_file(self, content: bytes):
        """The whole file, or the range of it that is asked for."""
        tag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if wanted is None:
            return self.send(content, 200, headers)
        part = content[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None]
        place = f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(content)}"
        self.send(part, 206, {**headers, "Content-Range": place})

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
