"""A page over HTTP, for this machine alone."""

from __future__ import annotations

import errno
import mimetypes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from ugrl.errors import ConfigError
from ugrl.view.page import Page

LOOPBACK = "127.0.0.1"


class Server(ThreadingHTTPServer):
    """Serves the files of a page, out of memory.

    Args:
        page: Its first file is also what ``/`` shows.
        port: 0 for any that is free.

    Raises:
        ConfigError: The port is taken.
    """

    daemon_threads = True

    def __init__(self, page: Page, port: int = 0) -> None:
        self.files = {f"/{name}": data for name, data in page.files.items()}
        self.files["/"] = next(iter(page.files.values()))
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise ConfigError(f"--port {port}: {why}; choose another, or leave it out for any that is free") from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 60

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        # A page of another site may lead a name of its own to this machine; it is not answered.
        host = self.headers.get("Host", "").rpartition(":")[0]
        path = unquote(self.path.partition("?")[0])
        data = self.server.files.get(path) if host in (LOOPBACK, "localhost") else None
        if data is None:
            self.send_error(404)
            return
        kind = mimetypes.guess_type(path)[0] or ("text/html" if path == "/" else "application/octet-stream")
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text/") else kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is told of requests."""
