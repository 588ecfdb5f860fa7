"""The door to Ray: what cannot be reached or started is one line that says who asked for it, before any work."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import cli, connect
from tuning import cli as tune
from ugrl.errors import ConfigError


@contextmanager
def listening(answer: bytes | None, host: str = "127.0.0.1") -> Iterator[int]:
    """A port where something answers every connection with the same words; ``None``: never."""
    with socket.create_server((host, 0)) as server:

        def serve() -> None:
            while answer is not None:
                try:
                    talk, _ = server.accept()
                except OSError:
                    return
                with talk:
                    talk.recv(100)
                    talk.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def unused() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def refused(address: str | None = None, origin: str = "--address") -> str:
    with pytest.raises(ConfigError) as caught:
        connect.check(address, origin)
    text = str(caught.value)
    assert "\n" not in text and text.isprintable() and len(text) < 400
    return text


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:PORT", "no Ray cluster answers there (connection refused); start a cluster there (ray start"),
        ("[::1]:PORT", "no Ray cluster answers there ("),
        ("ray://127.0.0.1:PORT", "no Ray cluster answers there (connection refused)"),
        ("nobody.invalid:6379", "no Ray cluster answers there ("),
        ("a" * 70 + ".b:6379", "no Ray cluster answers there ("),
        ("http://127.0.0.1:8265", "that is a dashboard's address, for `ray job submit`; a driver needs HOST:6379"),
        ("127.0.0.1", "expected HOST:PORT of a running Ray cluster"),
        ("127.0.0.1:99999", "expected HOST:PORT"),
        ("127.0.0.1:0", "expected HOST:PORT"),
        ("ray://", "expected HOST:PORT"),
        ("head\x1b[31m node:6379", "expected HOST:PORT"),
    ],
)
def test_an_address_where_nothing_answers_is_named(address: str, said: str) -> None:
    text = refused(address.replace("PORT", str(unused())))
    assert text.startswith("--address ") and said in text


@pytest.mark.parametrize("answer", [None, b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
@pytest.mark.parametrize("kind", ["", "ray://"])
def test_something_else_at_the_port_is_not_waited_for(
    answer: bytes | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "ANSWER_S", 0.3 if answer is None else 10)
    monkeypatch.setattr(connect, "_outer", lambda host: host)  # this one listens on the inner address alone
    with listening(answer) as port:
        assert "what listens there does not answer as Ray does; start" in refused(f"{kind}127.0.0.1:{port}")


def test_who_gave_the_address_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dead = f"127.0.0.1:{unused()}"
    assert refused(dead, "cluster.address").startswith(f"cluster.address={dead}: no Ray")
    monkeypatch.setenv("RAY_ADDRESS", dead)
    for given in (None, "", "auto"):
        text = refused(given)
        assert text.startswith(f"RAY_ADDRESS={dead}: no Ray") and "or unset it to start Ray on this machine" in text
    connect.check("local")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    connect.check()


@pytest.mark.parametrize(
    ("main", "words", "env", "origin"),
    [
        (cli.main, ["--config", "shapes", "--address", "DEAD"], {}, "--address DEAD"),
        (cli.main, ["--config", "shapes", "--workers", "1"], {"RAY_ADDRESS": "DEAD"}, "RAY_ADDRESS=DEAD"),
        (cli.main, ["--config", "shapes", "cluster.address=DEAD"], {}, "cluster.address=DEAD"),
        (tune.main, ["--space", "shapes", "--address", "DEAD"], {}, "--address DEAD"),
        (tune.main, ["--space", "shapes"], {"RAY_ADDRESS": "DEAD"}, "RAY_ADDRESS=DEAD"),
    ],
)
def test_a_command_says_so_before_it_makes_data(
    main: Callable[[list[str]], int],
    words: list[str],
    env: dict[str, str],
    origin: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dead = f"127.0.0.1:{unused()}"
    words = [w.replace("DEAD", dead) for w in words]
    for key, value in env.items():
        monkeypatch.setenv(key, value.replace("DEAD", dead))
    monkeypatch.setenv("UGRL_DATA", str(tmp_path / "data"))
    code = main([*words, "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1
    assert error.startswith(f"error: {origin.replace('DEAD', dead)}: no Ray cluster answers there (connection refused)")
    assert not list(tmp_path.iterdir())


def test_folders_that_ray_cannot_use_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 60)
    monkeypatch.setenv("TMPDIR", str(long))
    assert "too long for the sockets that Ray makes below it; set RAY_TMPDIR to a folder of at most" in refused()
    assert refused().startswith("TMPDIR is ")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # goes first
    connect.check()
    assert not long.exists()
    for wrong, said in (("/proc/nowhere", "No such file"), ("/dev/null", "File exists"), ("/dev/null/x", "Not a dir")):
        monkeypatch.setenv("RAY_TMPDIR", wrong)
        assert refused().startswith(f"RAY_TMPDIR is {wrong}: {said}")


def test_too_few_open_files_are_one_line() -> None:
    code = "from cluster.connect import check; from ugrl.command import guarded; exit(guarded(check))"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    done = subprocess.run([sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: this shell lets a process open 64 files (ulimit -n), too few to start Ray; allow 256, better 8192\n"
    )


@pytest.mark.ray
def test_another_servers_grpc_is_not_taken_for_ray_and_a_home_is_not_needed(tmp_path: Path) -> None:
    """In a process of its own: what Ray keeps of an environment stays in a process."""
    code = """\
from concurrent import futures
import grpc, ray
from cluster.connect import start_ray, stop_ray
from ugrl.errors import ConfigError
server = grpc.server(futures.ThreadPoolExecutor(1))
port = server.add_insecure_port("0.0.0.0:0")
server.start()
try:
    start_ray(f"localhost:{port}", "cluster.address")
except ConfigError as error:
    print(error)
server.stop(None)
print(start_ray(cpus=1), ray.get(ray.remote(lambda: 7).remote(), timeout=100))
stop_ray()
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": "/proc/nobody"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    first, second = done.stdout.splitlines()
    assert first.startswith("cluster.address=localhost:") and "Failed to connect to Ray cluster at" in first
    assert second == "1 CPUs 7"
    assert done.returncode == 0 and "Traceback" not in done.stderr
