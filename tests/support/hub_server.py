"""A model hub on this machine: it answers as the real one does, counts what it sends, and misbehaves on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_CHUNK = 64 * 1024


class HubServer:
    """One repository at one commit.

    Attributes:
        sent: bytes of content sent, by file; headers and metadata do not count.
        requests: paths asked for, in order.
    """

    def __init__(
        self, repository: str, files: dict[str, bytes], *, branch: str = "main", host: str = "127.0.0.1"
    ) -> None:
        self.repository = repository
        self.files = files
        self.branch = branch
        self.commit = COMMIT
        self.sent: Counter[str] = Counter()
        self.requests: list[str] = []
        self.tokens: list[str] = []
        """What came in the authorization header of each request for a file."""
        self.pause_per_chunk = 0.0
        self.corrupt_next: Counter[str] = Counter()
        """How many more answers for a file have one byte changed."""
        self.break_after: dict[str, int] = {}
        """The next answer for a file breaks off after so many bytes."""
        self.fail_next: list[int] = []
        """Status codes of the next answers to anything."""
        self.ignore_ranges = False
        self.refuse: int = 0
        """A status code for everybody."""
        self.before_file: Callable[[str], object] = lambda _name: None
        self._lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
                pass

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @classmethod
    def of_folder(cls, repository: str, folder: Path, *, host: str = "127.0.0.1") -> Self:
        """Serves the files of a folder, at one of this machine's addresses."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return cls(repository, files, host=host)

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT has to be."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """One request."""
        path = unquote(urlsplit(request.path).path)
        with self._lock:
            self.requests.append(request.path)
            code = self.refuse or (self.fail_next.pop(0) if self.fail_next else 0)
        if code:
            self._reply(request, code, b"")
        elif match := re.fullmatch(rf"/api/models/{self.repository}/revision/(.+)", path):
            known = match[1] in (self.branch, self.commit)
            self._reply(request, 200 if known else 404, json.dumps(self._metadata()).encode() if known else b"")
        elif (match := re.fullmatch(rf"/{self.repository}/resolve/{self.commit}/(.+)", path)) and match[
            1
        ] in self.files:
            self.tokens.append(request.headers.get("Authorization", ""))
            self._send_file(request, match[1])
        else:
            self._reply(request, 404, b"")

    def _metadata(self) -> dict[str, object]:
        siblings = []
        for name, content in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(content)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if name.endswith(".safetensors"):
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            siblings.append(entry)
        return {"id": self.repository, "sha": self.commit, "siblings": siblings}

    def _send_file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        self.before_file(name)
        content = bytearray(self.files[name])
        with self._lock:
            if self.corrupt_next[name] > 0:
                self.corrupt_next[name] -= 1
                content[-1] ^= 1
            breaks_after = self.break_after.pop(name, None)
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if asked and not self.ignore_ranges:
            start = int(asked[1])
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        end = len(content) if breaks_after is None else min(len(content), start + breaks_after)
        for offset in range(start, end, _CHUNK):
            chunk = content[offset : min(offset + _CHUNK, end)]
            try:
                request.wfile.write(chunk)
                request.wfile.flush()
            except OSError:
                request.close_connection = True
                return
            with self._lock:
                self.sent[name] += len(chunk)
            time.sleep(self.pause_per_chunk)
        if end < len(content):
            request.close_connection = True

    def _reply(self, request: BaseHTTPRequestHandler, code: int, body: bytes) -> None:
        request.send_response(code)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)
