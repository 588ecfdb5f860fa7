"""Connect to a Ray cluster or start a private one, and disconnect. An address and this machine are checked first.

Without the check, Ray tries for ten minutes to reach a cluster that is gone. Where this machine does not let Ray's
processes start, Ray shows their tracebacks.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import logging
import os
import re
import resource
import secrets
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster.capacity import Capacity, capacity
from ugrl.errors import ConfigError
from ugrl.hear import descendants, end
from ugrl.secrets import masked
from ugrl.text import line

# An address has this long to answer.
ANSWER_S = 10.0
# A killed process of a private cluster has this long to end.
END_S = 5.0
# With fewer open files, the processes of a private cluster die one by one. The hard limit counts: Ray raises the other.
LEAST_FILES = 256
# The longest path of a Unix socket, and what Ray appends to its folder: ray/session_…/sockets/plasma_store.
SOCKET_BYTES, SESSION_BYTES = 107, 68
# How an HTTP/2 connection begins, with an empty frame of settings. A gRPC server answers with such a frame.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
SETTINGS = 4
# The port of ray://HOST.
CLIENT_PORT = 10001

ENVIRONMENT = {
    # The controller asks workers for news this often. At the default of 2 s, every report waits for it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # In every process, a relative path counts from the folder where the command was started.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Do not set CUDA_VISIBLE_DEVICES in processes without a GPU. This will be Ray's default.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A reading process may rest for a second between two blocks. Ray must not end it and start another one. This
    # counts on nodes that this process starts.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def check(address: str | None = None, origin: str = "--address") -> None:
    """Refuse within seconds what :func:`start_ray` could not do.

    Args:
        address: A cluster's address. Without it ``RAY_ADDRESS`` counts. Without both, Ray will be started here.
        origin: The option or key that gave ``address``, for messages.

    Raises:
        ConfigError: Nothing answers at the address, or something that is not Ray; or this machine cannot start Ray.
    """
    address, shown = _choose_address(address, origin)
    if address is None:
        _check_machine()
    elif address == "auto":
        found = _find_cluster(shown)
        if found is not None:
            _check_port(found, f"{shown} ({found})")
    else:
        _check_port(address, shown)


def _choose_address(address: str | None, origin: str) -> tuple[str | None, str]:
    """The address to connect to (``None``: start Ray here), and how messages call it."""
    given = os.environ.get("RAY_ADDRESS", "").strip()
    if given and (not address or address == "auto"):  # as Ray has it
        address, origin = given, "RAY_ADDRESS"
    if not address or address == "local":
        return None, "a Ray of this machine"
    return address, f"{origin}{' ' if origin.startswith('-') else '='}{masked(line(address))}"


def start_ray(address: str | None = None, origin: str = "--address", *, cpus: int | None = None) -> Capacity:
    """Connect to a cluster, or start a private one on this machine.

    Args:
        address: The address of a running cluster. ``None`` takes ``RAY_ADDRESS`` where it is set, as in
            ``ray job submit``; otherwise Ray is started here, for this process alone.
        origin: The option or key that gave the address, for messages.
        cpus: Logical CPUs of a private cluster; by default all of the machine's.

    Returns:
        What the cluster has.

    Raises:
        ConfigError: Nothing answers at ``address``, or Ray cannot start here.
    """
    import ray

    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if not ray.is_initialized():
        _connect(address, origin, cpus)
    # An error comes back as an exception. Tune would also print it with its traceback.
    for name in ("ray.train", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return capacity()


def stop_ray() -> None:
    """Disconnect, and end a private cluster.

    Nobody else uses the processes of a private cluster, so they are killed. Ray would ask one after the other to
    leave, and wait up to a second for each.
    """
    import ray

    from cluster.ray_internals import disconnect_private, is_private

    if not is_private():
        ray.shutdown()
        return
    started = disconnect_private()
    roots = [process.pid for process in started if process.poll() is None]
    end([*roots, *descendants(roots)])
    for process in started:
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)


@functools.cache
def end_without_destructors() -> None:
    """Once Python has ended, this process is left at once, with its exit status; call it before ``ray.init``.

    Ray's threads outlive ``ray.shutdown``, and C++ then destroys what they use. One that writes a log at that moment
    aborts a process whose work is done: "terminate called after throwing an instance of 'std::bad_alloc'".
    """
    atexit.register(_leave_before_destructors)


def _leave_before_destructors() -> None:
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    if hasattr(libc, "on_exit"):  # of glibc. What is registered last runs first, and gets the status
        libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)


def _connect(address: str | None, origin: str, cpus: int | None) -> None:
    import ray

    from cluster.ray_internals import leave_signals_alone

    check(address, origin)
    leave_signals_alone()
    end_without_destructors()
    address, shown = _choose_address(address, origin)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        if address is None:
            _start_private(cpus, quiet)
        else:
            with _one_try():
                ray.init(address=address, **quiet)
    except Exception as error:  # Ray raises all kinds, a bare Exception among them
        ray.shutdown()
        raise ConfigError(f"{shown}: {reason(error)}{_hint(error)}") from None


def _start_private(cpus: int | None, quiet: dict[str, Any]) -> None:
    import ray

    from cluster.ray_internals import free_agent_port

    _make_token()
    # Nobody is told the address of a private cluster's dashboard. Without it, ten processes less are started.
    private: dict[str, Any] = {"address": "local", "num_cpus": cpus, "include_dashboard": False, **quiet}
    with free_agent_port():
        try:
            ray.init(**private)
        except Exception:  # on a busy machine, Ray's processes may not be ready in time
            ray.shutdown()
            ray.init(**private)


@contextmanager
def _one_try() -> Iterator[None]:
    """Let Ray ask a cluster once; its default is twenty times."""
    name, tries = "RAY_gcs_server_port_wait_time_s", "1"
    if name in os.environ:
        yield
        return
    os.environ[name] = tries
    try:
        yield
    finally:
        del os.environ[name]


def _encrypted() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() not in ("0", "false")


def _find_cluster(shown: str) -> str | None:
    """The address of the cluster that runs on this machine; ``None`` where Ray cannot be asked."""
    from cluster.ray_internals import find_cluster

    try:
        return find_cluster()
    except (ConnectionError, ValueError, OSError):
        raise ConfigError(f"{shown}: no Ray cluster runs on this machine; {_way_out(shown)}") from None


def _check_port(address: str, shown: str) -> None:
    """Refuse an address where Ray does not answer; messages call it ``shown``."""
    if re.match(r"(?i)https?://", address):
        raise ConfigError(f"{shown}: that is a dashboard's address, for `ray job submit`; a driver needs HOST:6379")
    found = re.fullmatch(r"(ray://)?\[?([^\s\[\]/@]+?)\]?(?::(\d{1,5}))?/?", address)
    port = int((found[3] or CLIENT_PORT if found[1] else found[3]) or 0) if found else 0
    if found is None or not 0 < port < 65536:
        raise ConfigError(f"{shown}: expected HOST:PORT of a running Ray cluster (its head's port is 6379), or auto")
    host = found[2] if found[1] else _outer(found[2])
    try:
        with socket.create_connection((host, port), timeout=ANSWER_S) as peer:
            is_ray = _encrypted() or _speaks_grpc(peer)
    except (OSError, UnicodeError) as error:
        why = line(getattr(error, "strerror", None) or error).lower()
        raise ConfigError(f"{shown}: no Ray cluster answers there ({why}); {_way_out(shown)}") from None
    if not is_ray:
        raise ConfigError(f"{shown}: what listens there does not answer as Ray does; {_way_out(shown)}")


def _outer(host: str) -> str:
    if host not in ("localhost", "127.0.0.1", "::1"):
        return host
    from cluster.ray_internals import host_for_ray

    return host_for_ray(host)


def answers(host: str, port: int, timeout_s: float) -> bool:
    """Whether a cluster's head answers. A connection alone says little: the kernel accepts it for a stopped process."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as peer:
            return _encrypted() or _speaks_grpc(peer)
    except OSError:
        return False


def _speaks_grpc(peer: socket.socket) -> bool:
    peer.settimeout(ANSWER_S)
    try:
        peer.sendall(PREFACE)
        head = b""
        while len(head) < 9 and (more := peer.recv(9 - len(head))):
            head += more
    except OSError:
        return False
    return len(head) == 9 and head[3] == SETTINGS and head[5:] == bytes(4)


def _way_out(shown: str) -> str:
    alone = "unset it" if shown.startswith("RAY_ADDRESS") else "leave it out"
    return f"start a cluster there (ray start --head), correct the address, or {alone} to start Ray on this machine"


def _check_machine() -> None:
    """Refuse a machine where Ray cannot start."""
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


def _make_token() -> None:
    """Give a private cluster a token in the environment, unless there is a token. Ray would write one to the home."""
    if {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    try:
        if (Path.home() / ".ray" / "auth_token").is_file():
            return
    except (OSError, RuntimeError):  # no such home
        pass
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def reason(error: BaseException) -> str:
    """The first line of Ray's message, without a traceback."""
    text = str(error).partition("Traceback (most recent call last)")[0].strip()
    return line(text.splitlines()[0]).rstrip(".") if text else type(error).__name__


def _hint(error: BaseException) -> str:
    if type(error).__name__ == "AuthenticationError" or "oken" in str(error):
        return "; give the cluster's token: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
    return ""
