"""A run's folder: logs, checkpoints, and the storage that they are sent to.

A local run is written where it lives. A remote one is written to a scratch folder of the node that rank 0 runs on, and
sent to its storage with every checkpoint and at the end: objects cannot be appended to. A scratch folder is locked by
its process as long as that lives; what a process that was killed has left is removed by the next one that makes such a
folder on that machine.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ugrl import config as config_mod
from ugrl import foreign
from ugrl.config import Config
from ugrl.distributed import barrier, is_main, rank, world_size
from ugrl.errors import DataError
from ugrl.eval.evaluate import EvalResult
from ugrl.files import replacing, write_whole
from ugrl.storage import Place, StorageError, retry
from ugrl.train import checkpoint
from ugrl.train.checkpoint_writer import CheckpointWriter, Saved, Snapshot, send_files
from ugrl.train.observer import Hooks, Observer, nothing

SCRATCH, LOCK = "ugrl-run-", ".lock"
# A scratch folder without a lock is one that is being made, or whose process died just then.
YOUNG_S = 600.0


def make_scratch() -> tuple[Path, int]:
    """A new scratch folder, and the open file whose lock says that its process lives."""
    sweep_scratch()
    path = Path(tempfile.mkdtemp(prefix=SCRATCH))
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.write(lock, f"{socket.gethostname()} {os.getpid()}".encode())
    return path, lock


def sweep_scratch() -> None:
    """Remove scratch folders of processes of this machine that are gone.

    A lock tells more than a process's number, which another one may have by now: it ends with its process, and not
    before, also in other containers. A temporary folder that machines share may not share locks; so the host counts.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError):
            if not (path / LOCK).exists():
                if time.time() - path.stat().st_mtime > YOUNG_S:
                    path.rmdir()  # empty, or it stays
                continue
            lock = os.open(path / LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its process lives
                if os.read(lock, 1000).decode(errors="replace").split()[:1] == [socket.gethostname()]:
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


class RunFolder:
    """What one rank writes of a run; rank 0 writes most of it.

    Args:
        home: Where the run lives; ``None`` writes nothing.
        cfg: Configuration of the run.
        class_names: Names of the foreground classes, in the order of their indices.
        objective: Metric that the best checkpoints are chosen by.
        data: Fingerprint of the splits that the run reads.
        say: Told in one line what the user should know.
        check: Called before each try to write a checkpoint; raises where the run is another driver's by now.

    Attributes:
        path: The folder that is written to, once it is open; ``None`` without one.
    """

    def __init__(
        self,
        home: Place | None,
        cfg: Config,
        *,
        class_names: tuple[str, ...],
        objective: str,
        data: str,
        say: Callable[[str], None],
        check: Callable[[], None] = nothing,
    ) -> None:
        self.check = check
        self.home, self.cfg, self.class_names, self.objective, self.say = home, cfg, class_names, objective, say
        self.data = data
        self.path: Path | None = None
        self.mirror = home if home is not None and home.local is None else None
        self._writer: CheckpointWriter | None = None
        self._waiting: dict[Path, list[str]] = {}
        self._lock: int | None = None

    @property
    def main(self) -> Path | None:
        """The folder, on the rank that writes what all ranks share."""
        return self.path if is_main() else None

    def open(self, done: int, *, judged: bool = True) -> None:
        """Make the folder ready; lines of steps after ``done`` are dropped, since they will be written again.

        What was seen in the validation of step ``done`` goes, too, unless it is ``judged``: that one came to no end.
        Every rank calls this, and waits for the others before it writes.
        """
        if self.home is None:
            return
        if self.mirror is None:
            self.path = self.home.local
        elif is_main() or self.cfg.train.record_ids:
            self.path, self._lock = make_scratch()
        patience_s = self.cfg.data.storage_patience_s
        if self.mirror is not None and self.path is not None:
            home, here = self.mirror, self.path
            retry("run folder", lambda: _fetch_logs(home, here), patience_s=patience_s, log=self.say)
            if not is_main():  # rank 0 does not even know this log
                for log in here.glob("seen/*.jsonl"):
                    _cut_log(log, done, judged)
        if self.main is None:
            return
        out = self.main
        out.mkdir(parents=True, exist_ok=True)
        config = config_mod.public_dict(self.cfg)
        write_whole(out / "config.yaml", config_mod.dump(config))
        for name in checkpoint.sweep(out / "checkpoints"):
            self.say(f"{out / 'checkpoints' / name}: left half-written by a run that died; removed")
        for log in (out / "metrics.jsonl", out / "nonfinite.jsonl", *out.glob("seen/*.jsonl")):
            _cut_log(log, done, judged)
        if self.mirror is not None:
            retry("run folder", lambda: send_files(out, home), patience_s=patience_s, log=self.say)
        self._writer = CheckpointWriter(
            out,
            mirror=self.mirror,
            config=config,
            class_names=self.class_names,
            objective=self.objective,
            data=self.data,
            keep=self.cfg.train.keep_checkpoints,
            keep_best=self.cfg.train.keep_best,
            patience_s=patience_s,
            log=self.say,
            check=self.check,
        )

    def note_weights(self, source: str, loaded: str, warning: str) -> None:
        """What ``model.weights`` filled, in ``weights.json``: a resumed run loads none and leaves the file as it is."""
        if self.main is not None:
            told = {"weights": source, "loaded": loaded, "warning": warning or None}
            write_whole(self.main / "weights.json", json.dumps(told, indent=1, ensure_ascii=False) + "\n")

    def record(self, line: dict[str, float]) -> None:
        """Add a line to ``metrics.jsonl``."""
        if self.main is not None:
            self._append(self.main / "metrics.jsonl", json.dumps(line) + "\n")

    def note_ids(self, what: dict[str, int], ids: Sequence[str]) -> None:
        """Which images this rank has seen, where ``train.record_ids`` asks for it."""
        if self.cfg.train.record_ids and self.path is not None:
            self._append(self.path / "seen" / f"rank_{rank():02d}.jsonl", json.dumps({**what, "ids": list(ids)}) + "\n")

    def _append(self, path: Path, text: str) -> None:
        """Add a line to a log; a disk that refuses it keeps it waiting for the next one."""
        lines = self._waiting.setdefault(path, [])
        lines.append(text)
        size = math.inf
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                size = file.tell()
                file.write("".join(lines).encode())
            lines.clear()
        except OSError as error:
            with suppress(OSError):
                if path.stat().st_size > size:  # a full disk may have taken half a line, which would spoil the next one
                    os.truncate(path, int(size))
            if len(lines) == 1:
                self.say(f"{path}: {error.strerror or error}; its lines wait in memory")

    def submit(self, make: Callable[[], Snapshot]) -> None:
        """Have a state saved in the background (rank 0; the others make none); every rank calls this."""
        if self.mirror is not None and self.cfg.train.record_ids and world_size() > 1:
            if not is_main():
                self._send(self.mirror)
            barrier()  # a checkpoint that is whole is continued: all lines up to it must be there
        if self._writer is not None:
            self._writer.submit(make())

    def saved(self, *, wait: bool) -> Saved | None:
        """The newest checkpoint that became whole since the last call.

        Raises:
            CheckpointError: One could not be written.
        """
        if self._writer is None:
            return None
        found = self._writer.flush() if wait else self._writer.poll()
        return found[-1] if found else None

    def close(self) -> None:
        """Let the checkpoint writer end, and send the rest of a remote run; raises nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self.mirror is not None and self.path is not None:
            self._send(self.mirror)
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self.path = None

    def _send(self, home: Place) -> None:
        """What this rank has written beside checkpoints, to a remote run's storage; raises nothing."""
        files, patience_s = self.path, self.cfg.data.storage_patience_s
        assert files is not None
        try:
            retry("run folder", lambda: send_files(files, home), patience_s=patience_s, log=self.say)
        except (OSError, StorageError) as error:
            self.say(f"{home}: the last lines of the logs could not be sent ({error})")


class LogFiles(Observer):
    """``metrics.jsonl``, and ``seen/`` where ``train.record_ids`` asks for it."""

    def __init__(self, folder: RunFolder, hooks: Hooks) -> None:
        self.folder, self.hooks = folder, hooks

    def on_batch(self, done: int, ids: Sequence[str]) -> None:
        """A line for each step."""
        self.folder.note_ids({"step": done}, ids)

    def on_log(self, done: int, values: Mapping[str, float]) -> None:
        """A line of means."""
        self.hooks.check_write()
        self.folder.record({"step": done, **values})

    def on_eval_batch(self, done: int, ids: Sequence[str], images: int, total: int) -> None:
        """A line for each batch."""
        self.folder.note_ids({"eval": done}, ids)

    def on_eval(self, done: int, result: EvalResult) -> None:
        """A line of metrics."""
        self.folder.record({"step": done, **{f"val/{k}": v for k, v in result.metrics.items()}})


def _cut_log(path: Path, done: int, judged: bool) -> None:
    if not path.is_file():
        return
    with replacing(path) as draft, path.open("rb") as old, draft.open("wb") as new:
        new.writelines(text.rstrip(b"\n") + b"\n" for text in old if _keeps(text, done, judged))


def _keeps(text: bytes, done: int, judged: bool) -> bool:
    """Whether a line is of a step up to ``done``; the last words of a process that was killed are of none."""
    try:
        tree = foreign.as_dict(foreign.parse_json(text, "a line", nan=True), "a line")
        step, seen = (foreign.as_int(tree.get(key, 0), key) for key in ("step", "eval"))
        return max(step, seen) <= done and (judged or not seen or seen < done)
    except DataError:
        return False


def _fetch_logs(home: Place, out: Path) -> None:
    """What a resumed run adds to, from where it lives; of checkpoints only what tells that they are there.

    Each rank takes the log of what it has seen; the first one those of ranks that there are no more, as well.
    """
    for name in (home / "seen").names():
        number = name.removeprefix("rank_").removesuffix(".jsonl")
        if number.isdecimal() and (int(number) == rank() or (is_main() and int(number) >= world_size())):
            (home / "seen" / name).download(out / "seen" / name)
    for folder in ("", "checkpoints") if is_main() else ():
        there = home / folder if folder else home
        for name in there.names():
            if name.endswith((".json", ".jsonl")):
                (there / name).download(out / folder / name)
            elif name.startswith(checkpoint.PREFIX) and (there / name / "state.json").exists():
                (there / name / "state.json").download(out / folder / name / "state.json")
