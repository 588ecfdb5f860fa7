"""What a private Ray cluster uses: processor time of all its processes, bytes in its object store.

Ray is imported by the functions that need it, so that the module can be imported without.
"""

from __future__ import annotations

import io
import logging
import os
import resource
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ugrl.data.shards import Manifest, ShardInfo, SplitInfo, sha256, write_rows
from ugrl.files import write_whole
from ugrl.types import Row

MARK = "UGRL_BENCH_MARK"
_HZ = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@contextmanager
def private_cluster(*, cpus: int = 2, store_bytes: int | None = None) -> Iterator[str]:
    """A cluster of this machine alone; yields the mark that all its processes carry in their environment."""
    import ray

    from cluster.connect import ENVIRONMENT, end_without_destructors

    before = dict(os.environ)
    mark = os.environ[MARK] = uuid.uuid4().hex
    os.environ.pop("RAY_ADDRESS", None)
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    end_without_destructors()
    ray.init(
        address="local",
        num_cpus=cpus,
        object_store_memory=store_bytes,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield mark
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)


def processes(mark: str) -> dict[int, str]:
    """The processes that carry a mark, and how they are called, but for this one."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:  # ended meanwhile
                continue
    return found


def cpu_seconds(mark: str | None) -> float:
    """Processor time so far: of this process, and of the living ones that carry a mark."""
    mine = resource.getrusage(resource.RUSAGE_SELF)
    total = mine.ru_utime + mine.ru_stime
    for pid in processes(mark) if mark else ():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / _HZ
    return total


def private_bytes(pid: int | str = "self") -> int:
    """Memory of a process that it shares with nobody: without the object store, which is mapped into it."""
    resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * _PAGE


class StoreWatch:
    """Looks at the object store, and at this process's memory, while a ``with`` block runs.

    Attributes:
        used: Most bytes in the store, with those of deleted objects that it has not let go of yet.
        pinned: Most bytes of objects that are still needed.
        beyond: Most bytes that did not fit and were put on the disk instead, or moved there.
        memory: :func:`private_bytes` at every look.
    """

    def __init__(self, every_s: float = 0.05) -> None:
        import ray
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        self._ask = lambda: get_memory_info_reply(state).store_stats
        self.every_s = every_s
        self.used = self.pinned = self.beyond = 0
        self.memory: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-watch", daemon=True)

    def now(self) -> Any:
        """The store's figures."""
        return self._ask()

    def __enter__(self) -> StoreWatch:
        self._spilled = self.now().spilled_bytes_total
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self.every_s):
            found = self.now()
            self.used = max(self.used, found.object_store_bytes_used)
            self.pinned = max(self.pinned, found.object_store_bytes_primary_copy)
            beyond = found.object_store_bytes_fallback + found.spilled_bytes_total - self._spilled
            self.beyond = max(self.beyond, beyond)
            self.memory.append(private_bytes())

    def grown(self) -> int:
        """Bytes that the process's memory grew by, from a third of the looks on: the highest after, less before."""
        third = len(self.memory) // 3
        return max(self.memory[third:], default=0) - max(self.memory[: third + 1], default=0)


def write_noise(folder: Path, megabytes: int, *, distinct: int = 48, shards: int = 4) -> Path:
    """Shards of JPEGs of noise, which nothing compresses: images of many sizes, a few of them again and again."""
    rng, files = np.random.default_rng(0), []
    for _ in range(distinct):
        side = int(rng.uniform(128, 384))
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(out, "JPEG", quality=95)
        files.append((out.getvalue(), side))
    count = int(megabytes * 1e6 / np.mean([len(data) for data, _ in files]))
    folder.mkdir(parents=True)
    infos = []
    for k, part in enumerate(np.array_split(np.arange(count), shards)):
        path = folder / f"train-{k:05d}.parquet"
        rows = (Row(f"noise{i:06d}", *_file(files[i % distinct]), (1,), None) for i in part)
        rows_written, _ = write_rows(path, rows)
        infos.append(ShardInfo(path.name, rows_written, path.stat().st_size, sha256(path)))
    split = SplitInfo(count, 0, tuple(infos))
    write_whole(folder / "manifest.json", Manifest(folder, "folder", {}, ("thing",), {"train": split}).to_json())
    return folder


def _file(made: tuple[bytes, int]) -> tuple[bytes, int, int]:
    data, side = made
    return data, side, side
