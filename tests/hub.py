"""Hugging Face on loopback, for tests that import `hub`."""

import functools
import hashlib
import http.server
import threading

import pytest


class Hub(http.server.SimpleHTTPRequestHandler):
    """Files as Hugging Face serves them: large ones from elsewhere, with their SHA-256, some only with a token."""

    asked: list = []  # noqa: RUF012

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, content):
        self.asked.append((self.command, self.path, self.headers.get("Authorization")))
        elsewhere = self.path.startswith("/bytes/")
        if "/secret/" in self.path and not elsewhere and self.headers.get("Authorization") != "Bearer right":
            self.send_error(401)
            return
        path = self.translate_path(self.path)
        try:
            data = open(path, "rb").read()  # noqa: SIM115
        except OSError:
            self.send_error(404)
            return
        if not elsewhere:
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/bytes{self.path}")
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if content:
            self.wfile.write(data)

    def translate_path(self, path):
        return super().translate_path(path.removeprefix("/bytes"))

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback that serves a folder, REPOSITORY/resolve/REVISION/FILE."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=tmp_path / "hub"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setenv("SRA_JAX_CACHE", str(tmp_path / "cache"))

    def put(name, content):
        path = tmp_path / "hub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    yield put
    server.shutdown()
