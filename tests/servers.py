"""Servers on the loopback interface for tests: a package index (PEP 503) and the Hugging Face Hub's HTTP routes."""

import hashlib
import io
import json
import threading
import time
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Reply:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Server:
    """Answers from `pages`, keeps `requests` as (method, path, Range), and can be slow or break off."""

    def __init__(self) -> None:
        self.pages: dict[str, Reply] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.stall_after: int | None = None  # bytes of a body, then nothing more comes
        self.break_after: int | None = None  # bytes of one body, then the connection closes; once
        self.ranges = True
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                server._answer(self)

            def do_GET(self) -> None:
                server._answer(self)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def gets(self, part: str) -> list[str | None]:
        """The Range headers of the GET requests whose path contains `part`."""
        return [span for method, path, span in self.requests if method == "GET" and part in path]

    def reply(self, path: str, headers: dict[str, str]) -> Reply:
        return self.pages.get(path, Reply(404))

    def _answer(self, http: BaseHTTPRequestHandler) -> None:
        path, span = unquote(urlsplit(http.path).path), http.headers.get("Range")
        self.requests.append((http.command, path, span))
        reply = self.reply(path, {name.lower(): value for name, value in http.headers.items()})
        status, body, headers = reply.status, reply.body, dict(reply.headers)
        if span and self.ranges and status == 200:
            start = int(span.removeprefix("bytes=").rstrip("-"))
            status = 206 if start < len(body) else 416
            last = f"{start}-{len(body) - 1}" if status == 206 else "*"
            headers["Content-Range"] = f"bytes {last}/{len(body)}"
            body = body[start:]
        http.send_response(status)
        for name, value in headers.items():
            http.send_header(name, value)
        if "Content-Length" not in headers:
            http.send_header("Content-Length", str(len(body)))
        http.end_headers()
        if http.command == "HEAD":
            return
        if self.break_after is not None and len(body) > self.break_after:
            body, self.break_after, http.close_connection = body[: self.break_after], None, True
        try:
            if self.stall_after is not None and len(body) > self.stall_after:
                http.wfile.write(body[: self.stall_after])
                http.wfile.flush()
                time.sleep(60)
            else:
                http.wfile.write(body)
        except OSError:
            http.close_connection = True


class Index(Server):
    """A package index with one wheel and no metadata of its own, as simple proxies serve it."""

    def offer(self, name: str, wheel: bytes) -> None:
        project = name.partition("-")[0].replace("_", "-")
        self.file = f"/files/{name}"
        self.pages[f"/simple/{project}/"] = Reply(
            headers={"Content-Type": "text/html"}, body=f'<!DOCTYPE html><a href="{self.file}">{name}</a>'.encode()
        )
        self.pages[self.file] = Reply(body=wheel, headers={"Accept-Ranges": "bytes"})


def wheel(member: str, content: bytes, name: str = "tiny_model", version: str = "1.0") -> bytes:
    """A wheel with one file beside its metadata."""
    info = f"{name}-{version}.dist-info"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


class HuggingFace(Server):
    """Repositories at one commit, by the Hub's routes: model information, and files that redirect to a store."""

    def __init__(self) -> None:
        super().__init__()
        self.store = self.url.replace("127.0.0.1", "localhost")  # another host, as the real one's is
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.cards: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.lie: dict[str, bytes] = {}  # what the store sends instead of a file

    def reply(self, path: str, headers: dict[str, str]) -> Reply:
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if token == "wrong":
            return Reply(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        words = path.strip("/").split("/")
        if words[0] == "store":
            return Reply(body=self.lie.get(words[-1], self.repositories["/".join(words[1:3])][words[-1]]))
        api = words[:2] == ["api", "models"]
        repo = "/".join(words[2:4] if api else words[:2])
        if repo not in self.repositories:
            return Reply(404 if token else 401, {"X-Error-Code": "RepoNotFound"})
        revision = words[5] if api else words[3]
        if revision not in {"main", COMMIT}:
            return Reply(404, {"X-Error-Code": "RevisionNotFound"})
        files = self.repositories[repo]
        if api:
            return self._information(repo, files) if words[4] == "revision" else Reply(404)
        if repo in self.gated and token != "granted":
            return Reply(403 if token else 401, {"X-Error-Code": "GatedRepo"})
        content = files["/".join(words[4:])]
        large = words[-1].endswith((".gguf", ".safetensors", ".pth"))
        common = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not large:
            return Reply(200, {**common, "ETag": f'"{_git(content)}"'}, content)
        linked = {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
        return Reply(302, {**common, **linked, "Location": f"{self.store}/store/{repo}/{words[-1]}"})

    def _information(self, repo: str, files: dict[str, bytes]) -> Reply:
        siblings = []
        for name, content in files.items():
            entry = {"rfilename": name, "size": len(content), "blobId": _git(content)}
            if name.endswith((".gguf", ".safetensors", ".pth")):
                entry["lfs"] = {"sha256": _sha256(content), "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        gated = "manual" if repo in self.gated else False
        body = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "gated": gated, "siblings": siblings}
        body |= {"tags": [], "downloads": 0, "likes": 0, "cardData": self.cards.get(repo, {})}
        return Reply(200, {"Content-Type": "application/json"}, json.dumps(body).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
