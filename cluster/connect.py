"""Before Ray is asked: is there a cluster at the address, and can one be started here?

Left to itself, Ray tries for ten minutes to reach a cluster that is gone, and shows tracebacks of its processes where
this machine does not let them start.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import resource
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ugrl.command import complain
from ugrl.errors import ClusterError, ConfigError
from ugrl.secrets import masked
from ugrl.storage import StorageError
from ugrl.text import line

ANSWER_S = 10.0
# How often a driver looks whether its cluster's head still answers.
LOOK_S = 5.0
# Workers that take longer to begin are told of.
BEGIN_S = 60.0
# Fewer let a private cluster's processes die one by one; it is the hard limit that counts, Ray raises the other one.
LEAST_FILES = 256
# A Unix socket's path, and what Ray puts behind the folder for temporary files: ray/session_…/sockets/plasma_store.
SOCKET_BYTES, SESSION_BYTES = 107, 68
# HTTP/2's first words, with an empty frame of settings: whatever speaks gRPC answers with a frame of its own.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
SETTINGS = 4
# Of ray://HOST.
CLIENT_PORT = 10001


def check(address: str | None = None, origin: str = "--address") -> None:
    """Refuse what :func:`connect` could not do, within seconds and before any work is paid for.

    Args:
        address: Of a cluster; without it ``RAY_ADDRESS`` counts, and without both a cluster is to be started here.
        origin: What gave ``address``.

    Raises:
        ConfigError: Nothing answers at the address, or something that is not Ray; or this machine cannot start Ray.
    """
    address, shown = wanted(address, origin)
    if address is None:
        _check_machine()
    elif address == "auto":
        found = _running(shown)
        _check_port(found, f"{shown} ({found})")
    else:
        _check_port(address, shown)


def wanted(address: str | None, origin: str) -> tuple[str | None, str]:
    """The address of the cluster to take, and a name for it that says who gave it.

    Returns:
        ``None`` in place of the address: one is to be started here, for this process alone.
    """
    given = os.environ.get("RAY_ADDRESS", "").strip()
    if given and (not address or address == "auto"):  # as Ray has it
        address, origin = given, "RAY_ADDRESS"
    if not address or address == "local":
        return None, "a Ray of this machine"
    return address, f"{origin}{' ' if origin.startswith('-') else '='}{masked(line(address))}"


def connect(address: str | None = None, origin: str = "--address", *, cpus: int | None = None) -> None:
    """Connect to a cluster, or start a private one; as :func:`check`, and with its errors."""
    import ray

    check(address, origin)
    address, shown = wanted(address, origin)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        if address is None:
            _own_token()
            # Nobody is told the address of a private cluster's dashboard: ten processes less to start.
            private: dict[str, Any] = {"address": "local", "num_cpus": cpus, "include_dashboard": False, **quiet}
            with _any_port():
                try:
                    ray.init(**private)
                except Exception:  # a machine under load may not have Ray's processes ready in time
                    ray.shutdown()
                    ray.init(**private)
        else:
            with _one_try():
                ray.init(address=address, **quiet)
    except Exception as error:  # Ray raises all kinds, a bare Exception among them
        ray.shutdown()
        raise ConfigError(f"{shown}: {reason(error)}{_hint(error)}") from None


@contextmanager
def _any_port() -> Iterator[None]:
    """Have the agent of a private cluster take a free port.

    Beside another Ray of this machine it would try the usual one for 3.5 s, and everything waits for it.
    """
    from ray._private.parameter import RayParams

    plain = RayParams.__init__

    @functools.wraps(plain)
    def made(self: Any, *args: Any, **more: Any) -> None:
        plain(self, *args, **{"dashboard_agent_listen_port": 0, **more})

    RayParams.__init__ = made
    try:
        yield
    finally:
        RayParams.__init__ = plain


@contextmanager
def _one_try() -> Iterator[None]:
    """Have Ray ask a cluster once, where it asks twenty times by itself."""
    name, tries = "RAY_gcs_server_port_wait_time_s", "1"
    if name in os.environ:
        yield
        return
    os.environ[name] = tries
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def head_watched(patience_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """Leave when the connected cluster's head has not answered for a while.

    A driver whose head is gone hangs in Ray, which ends it a minute later with words of its own. The process is left
    from a thread, since the main one may be in there.

    Args:
        patience_s: How long a head may be away.
        say: Told in one line that it is, and that it is back.
    """
    import ray

    address = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    ended = threading.Event()

    def watch() -> None:
        since: float | None = None
        while not ended.wait(LOOK_S):
            if not _answers(host.strip("[]"), int(port)):
                now = time.monotonic()
                if since is None:
                    since = now
                    say(f"the cluster's head at {address} does not answer; waiting up to {patience_s:g} s for it")
                elif now - since > patience_s:
                    leave(
                        f"the cluster was lost: its head at {address} has not answered for {patience_s:g} s "
                        "(cluster.head_s); continue with --resume on one that runs"
                    )
                continue
            if since is not None:
                since = None
                say("the cluster's head answers again")

    thread = threading.Thread(target=watch, name="head", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=LOOK_S)


def leave(text: str) -> None:
    """Leave the process from a thread, with one line: the main one waits in Ray, which has no deadline there."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # the cursor, which a live table has hidden
    complain(text)
    os._exit(ClusterError.status)


@contextmanager
def begin_watched(begun: Callable[[], bool], patience_s: float, say: Callable[[str], None]) -> Iterator[None]:
    """Leave when workers have not begun to train for a while.

    Ray Train waits for their place (``cluster.start_timeout_s``), but without end for their processes: on a mount that
    hangs, none gets to its first line.

    Args:
        begun: Whether they have.
        patience_s: How long they may take.
        say: Told in one line that they take long.
    """
    ended = threading.Event()

    def watch() -> None:
        since, told = time.monotonic(), False
        while not ended.wait(min(LOOK_S, patience_s)):
            waited = time.monotonic() - since
            try:
                if begun():
                    return
            except StorageError:
                continue
            if waited > patience_s:
                leave(f"the cluster was lost: its workers have not begun for {patience_s:g} s; continue with --resume")
            if waited > BEGIN_S and not told:
                say(f"the workers have not begun for {BEGIN_S:g} s; waiting up to {patience_s:g} s for them")
                told = True

    thread = threading.Thread(target=watch, name="begin", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=LOOK_S)


def _answers(host: str, port: int) -> bool:
    """Whether a head answers; the kernel takes connections for one that is stopped."""
    try:
        with socket.create_connection((host, port), timeout=LOOK_S) as talk:
            return _encrypted() or _speaks_grpc(talk)
    except OSError:
        return False


def _encrypted() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() not in ("0", "false")


def _running(shown: str) -> str:
    """The cluster that Ray finds on this machine."""
    from ray._private import services

    try:
        return str(services.canonicalize_bootstrap_address("auto"))
    except (ConnectionError, ValueError, OSError):
        raise ConfigError(f"{shown}: no Ray cluster runs on this machine; {_way_out(shown)}") from None


def _check_port(address: str, shown: str) -> None:
    """Whether Ray answers at an address, which a message calls ``shown``."""
    if re.match(r"(?i)https?://", address):
        raise ConfigError(f"{shown}: that is a dashboard's address, for `ray job submit`; a driver needs HOST:6379")
    found = re.fullmatch(r"(ray://)?\[?([^\s\[\]/@]+?)\]?(?::(\d{1,5}))?/?", address)
    port = int((found[3] or CLIENT_PORT if found[1] else found[3]) or 0) if found else 0
    if found is None or not 0 < port < 65536:
        raise ConfigError(f"{shown}: expected HOST:PORT of a running Ray cluster (its head's port is 6379), or auto")
    host = found[2] if found[1] else _as_ray(found[2])
    try:
        with socket.create_connection((host, port), timeout=ANSWER_S) as talk:
            is_ray = _encrypted() or _speaks_grpc(talk)
    except (OSError, UnicodeError) as error:
        why = line(getattr(error, "strerror", None) or error).lower()
        raise ConfigError(f"{shown}: no Ray cluster answers there ({why}); {_way_out(shown)}") from None
    if not is_ray:
        raise ConfigError(f"{shown}: what listens there does not answer as Ray does; {_way_out(shown)}")


def _as_ray(host: str) -> str:
    """Ray takes this machine's outer address for the inner one."""
    if host not in ("localhost", "127.0.0.1", "::1"):
        return host
    from ray._private import services

    return str(services.resolve_ip_for_localhost(host))


def _speaks_grpc(talk: socket.socket) -> bool:
    talk.settimeout(ANSWER_S)
    try:
        talk.sendall(PREFACE)
        head = b""
        while len(head) < 9 and (more := talk.recv(9 - len(head))):
            head += more
    except OSError:
        return False
    return len(head) == 9 and head[3] == SETTINGS and head[5:] == bytes(4)


def _way_out(shown: str) -> str:
    alone = "unset it" if shown.startswith("RAY_ADDRESS") else "leave it out"
    return f"start a cluster there (ray start --head), correct the address, or {alone} to start Ray on this machine"


def _check_machine() -> None:
    """Whether Ray can start here."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        raise ConfigError(
            f"this shell lets a process open {hard} files (ulimit -n), too few to start Ray; allow {LEAST_FILES}, "
            "better 8192"
        )
    name = next((n for n in ("RAY_TMPDIR", "TMPDIR") if n in os.environ), "RAY_TMPDIR")
    folder = os.environ.get(name, "/tmp")
    if (size := len(os.fsencode(folder))) > SOCKET_BYTES - SESSION_BYTES:
        raise ConfigError(
            f"{name} is {line(folder)}: with {size} bytes too long for the sockets that Ray makes below it; set "
            f"RAY_TMPDIR to a folder of at most {SOCKET_BYTES - SESSION_BYTES} bytes"
        )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        why = line(getattr(error, "strerror", None) or error)
        raise ConfigError(f"{name} is {line(folder)}: {why}; Ray needs a folder that can be written") from None


def _own_token() -> None:
    """A private cluster's token stays with its processes, unless there is one: Ray would write one under the home."""
    if {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    try:
        if (Path.home() / ".ray" / "auth_token").is_file():
            return
    except (OSError, RuntimeError):  # no such home
        pass
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def reason(error: BaseException) -> str:
    """The first line of what Ray says, without the traceback that it may quote."""
    text = str(error).partition("Traceback (most recent call last)")[0].strip()
    return line(text.splitlines()[0]).rstrip(".") if text else type(error).__name__


def _hint(error: BaseException) -> str:
    if type(error).__name__ == "AuthenticationError" or "oken" in str(error):
        return "; give the cluster's token: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
    return ""
