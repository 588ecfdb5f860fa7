"""A search's live page: optuna-dashboard on this machine alone, for as long as the search runs.

It is served by a thread of the driver. So it ends with the driver however that ends, and no command line of another
process holds the password of a database. It can be looked at, and nothing else: whoever presses *delete* there would
take the study away from a search that runs.
"""

from __future__ import annotations

import errno
import importlib.util
import shlex
import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from tuning.space.space import SearchSpace
from tuning.study.store import JOURNAL, open_storage
from ugrl.errors import ConfigError
from ugrl.secrets import public_database
from ugrl.text import line

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication

LOOPBACK, FIRST, LAST = "127.0.0.1", 8080, 8099
MISSING = "optuna-dashboard is not installed: pip install 'ugrl[dashboard]'; then, beside the search: "


def by_hand(space: SearchSpace, out: Path) -> str:
    """The command that shows a search's study, now or later."""
    where = str(out / JOURNAL) if space.storage == "journal" else public_database(space.storage)
    if where.startswith("sqlite:///"):  # which counts from the search's folder
        where = f"sqlite:///{(out / where.removeprefix('sqlite:///')).absolute()}"
    return shlex.join(["optuna-dashboard", where])


class Dashboard:
    """The page of a search; a context that ends it.

    Args:
        space: Of the search; its study is in the storage already.
        out: The search's folder.
        say: Told where the page is, or how to have one, in one line.
        first: Port that is tried first; those after it follow.

    Attributes:
        url: Of the page; empty where there is none.
    """

    def __init__(self, space: SearchSpace, out: Path, say: Callable[[str], None], *, first: int = FIRST) -> None:
        self.url = ""
        self._server: _Server | None = None
        if importlib.util.find_spec("optuna_dashboard") is None:
            say(f"dashboard: {MISSING}{by_hand(space, out)}")
            return
        from optuna_dashboard import wsgi

        try:
            self._server = _served(read_only(wsgi(open_storage(space.storage, out))), first)
        except Exception as error:  # of a database, a socket, or of the dashboard: a search does without its page
            say(f"dashboard: cannot be shown ({line(error, 200)}); by hand: {by_hand(space, out)}")
            return
        port = self._server.server_port
        self.url = f"http://{LOOPBACK}:{port}/dashboard/"
        taken = "" if port == first else f" (port {first} is taken)"
        say(f"dashboard: {self.url}{taken}, until the search ends; later: {by_hand(space, out)}")
        threading.Thread(target=self._server.serve_forever, name="dashboard", daemon=True).start()

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # Of Linux: with it, two servers could have one port of which the second is never asked.
    allow_reuse_port = False


class _Silent(WSGIRequestHandler):
    timeout = 60

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is told of requests."""


def _served(app: WSGIApplication, first: int) -> _Server:
    """A server on the first port that is free.

    Raises:
        ConfigError: None of them is.
    """
    for port in range(first, first + LAST - FIRST + 1):
        try:
            server = _Server((LOOPBACK, port), _Silent)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            continue
        server.set_app(app)
        return server
    raise ConfigError(f"ports {first} to {first + LAST - FIRST} are taken")


def read_only(app: WSGIApplication) -> WSGIApplication:
    """An application that changes nothing, and answers for this machine's own names alone.

    A page of another site may lead a name of its own to this machine; it is not answered.
    """

    def answer(environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        host = environ.get("HTTP_HOST", "").rpartition(":")[0]
        status = None
        if host not in (LOOPBACK, "localhost"):
            status = HTTPStatus.NOT_FOUND
        elif environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status = HTTPStatus.METHOD_NOT_ALLOWED
        if status is None:
            return app(environ, start)
        start(f"{status.value} {status.phrase}", [("Content-Type", "text/plain")])
        return [b"this page is to be looked at: it changes nothing\n"]

    return answer
