"""A real S3 server on this machine."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ugrl import storage

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hidden-word", "AWS_DEFAULT_REGION": "us-east-1"}


class Server:
    """An S3 server in a process of its own."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def uri(self, path: str) -> str:
        return f"s3://{path}?scheme=http&endpoint_override=127.0.0.1:{self.port}"

    def pause(self, seconds: float) -> threading.Timer:
        """Away for a while: it neither answers nor refuses."""
        self.process.send_signal(signal.SIGSTOP)
        timer = threading.Timer(seconds, self.process.send_signal, (signal.SIGCONT,))
        timer.start()
        return timer


@contextmanager
def bucket_server() -> Iterator[Server]:
    """A running server with one bucket, its keys in the environment; the test is skipped without it."""
    pytest.importorskip("moto", reason="moto[server], a local S3 server, is not installed")
    from pyarrow import fs

    with pytest.MonkeyPatch.context() as patch:
        for key, value in KEYS.items():
            patch.setenv(key, value)
        patch.setattr(storage, "CONNECT_S", 1.0)
        patch.setattr(storage, "REQUEST_S", 1.5)
        made = Server()
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", made.port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < until and made.process.poll() is None
                time.sleep(0.1)
        root = fs.S3FileSystem(endpoint_override=f"127.0.0.1:{made.port}", scheme="http", allow_bucket_creation=True)
        root.create_dir("bucket")
        yield made
        made.process.send_signal(signal.SIGCONT)
        made.process.terminate()
        made.process.wait(timeout=20)
