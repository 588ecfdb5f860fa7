"""A source becomes a folder of shards, in bounded memory, and survives being killed.

Everything is written to ``OUT.partial``; each shard under a temporary name first, and noted in a journal
once it is on the disk. Started again with the same options, work goes on at the first shard that is not
in the journal. The folder takes its name last. The shards are a function of the source and the options:
an interrupted run ends with the same bytes as any other.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from ugrl import foreign
from ugrl.command import folder_for
from ugrl.data.census import Census, Inventory, census_of
from ugrl.data.mask_folder import TaughtSource
from ugrl.data.progress import Progress
from ugrl.data.shards import (
    MANIFEST,
    ROW_GROUP,
    SCHEMA_VERSION,
    TEACHER_VERSION,
    Manifest,
    ShardInfo,
    SplitInfo,
    from_table,
    open_shard,
    partial_of,
    sha256,
    write_rows,
)
from ugrl.data.source import RowError, Source
from ugrl.errors import BusyError, DataError
from ugrl.files import DRAFT, replacing, sync, write_whole
from ugrl.row import Row
from ugrl.seeding import derive
from ugrl.storage import Place
from ugrl.text import brief, line

JOURNAL = "journal.json"
TUNE_VAL = "tune_val"
OnError = Literal["raise", "skip"]


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One shard to write.

    Attributes:
        split: Of the shards (``train``, ``tune_val``, ``val``).
        origin: Split of the source that the ids belong to.
        file: Name of the shard's file.
        ids: Ids of its rows, in order.
    """

    split: str
    origin: str
    file: str
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShardDone:
    """One shard on the disk; ``rows`` is 0, and there is no file, where every row was left out."""

    split: str
    file: str
    rows: int
    with_masks: int
    bytes: int
    sha256: str
    left_out: dict[str, int] = field(default_factory=dict)
    census: dict[str, Any] = field(default_factory=dict)
    with_teachers: int = 0


WriteShard = Callable[[Source, ShardJob, Path, OnError], ShardDone]
# Runs the first argument over the jobs and yields results in any order, see ``prepare``.
ShardMap = Callable[[WriteShard, Source, list[ShardJob], Path, OnError], Iterable[ShardDone]]


def hold_out(
    ids: list[str], tags: Callable[[str], tuple[int, ...] | None], share: float | int, seed: int
) -> frozenset[str]:
    """Which training ids go to ``tune_val``.

    Rows are put in order by their rarest class and, within it, by a seeded hash of the id; every 1/share-th
    is taken. So each class gives its share, give or take one.

    Args:
        ids: Of the source's train split.
        tags: Tags of an id, or ``None`` where unknown (then the hash alone decides).
        share: A share below 1, or a number of rows.
        seed: Seed of the hash that decides.

    Raises:
        DataError: Nothing would be left in train, or nothing held out though asked for.
    """
    n = len(ids)
    count = round(n * share) if share < 1 else int(share)
    if share < 0 or count >= n or (share > 0 and count == 0):
        raise DataError(
            f"tune_val {share} of {n} training rows leaves {count} held out and {n - count} in train; "
            "expected both above 0 (0 turns it off)"
        )
    known = {id: tags(id) or () for id in ids}
    frequency = Counter(t for row in known.values() for t in row)

    def place(id: str) -> tuple[int, int]:
        rarest = min(known[id], key=lambda t: (frequency[t], t), default=0)
        return rarest, derive(seed, TUNE_VAL, id)

    ordered = sorted(ids, key=place)
    return frozenset(id for i, id in enumerate(ordered) if (i + 1) * count // n > i * count // n)


def plan(source: Source, *, tune_val: float | int, shard_rows: int, seed: int) -> list[ShardJob]:
    """Every shard to write, in order.

    Raises:
        DataError: An empty split, an id that appears twice, or a share that holds out all or nothing.
    """
    if shard_rows < 1:
        raise DataError(f"shard_rows is {shard_rows}; expected ≥ 1")
    found = source.splits()
    where = f"source '{source.name}'" + (f" at {source.root}" if source.root else "")
    if not found:
        raise DataError(f"{where}: no split found")
    seen: dict[str, str] = {}
    for split, ids in found.items():
        if not ids:
            why = "".join(f", {n} left out ({r})" for r, n in source.left_out.get(split, {}).items())
            raise DataError(f"{where}: split '{split}' is empty{why}")
        for id in ids:
            if id in seen:
                raise DataError(f"{where}: id {brief(id)} appears twice, in '{seen[id]}' and in '{split}'")
            seen[id] = split

    splits: dict[str, tuple[str, list[str]]] = {}
    for split, ids in found.items():
        splits[split] = split, ids
        if split == "train" and tune_val:
            held = hold_out(ids, lambda id: source.tags("train", id), tune_val, seed)
            splits["train"] = "train", [id for id in ids if id not in held]
            splits[TUNE_VAL] = "train", [id for id in ids if id in held]
    return [
        ShardJob(split, origin, f"{split}-{k:05d}.parquet", tuple(ids[start : start + shard_rows]))
        for split, (origin, ids) in splits.items()
        for k, start in enumerate(range(0, len(ids), shard_rows))
    ]


def write_shard(
    source: Source, job: ShardJob, folder: Path, on_error: OnError, on_row: Callable[[int], None] | None = None
) -> ShardDone:
    """Write one shard under a temporary name, then rename it; works in any process.

    Args:
        source: The data set.
        job: Which rows of it go into which shard.
        folder: Folder in which the shard is written.
        on_error: As for :func:`prepare`.
        on_row: Called with 1 before each row.

    Raises:
        RowError: A row cannot be used and ``on_error`` is ``raise``; no file is left.
    """
    left_out: Counter[str] = Counter()
    census, taught = Census(len(source.class_names)), 0

    def rows() -> Iterator[Row]:
        nonlocal taught
        for id in job.ids:
            if on_row is not None:
                on_row(1)
            try:
                row = source.row(job.origin, id)
            except RowError as error:
                if on_error == "raise":
                    raise
                left_out[error.reason] += 1
                continue
            census.add(row)
            taught += row.teacher is not None
            yield row

    with replacing(folder / job.file) as draft:
        count, masks = write_rows(draft, rows(), version_of(source))
        if count == 0:
            return ShardDone(job.split, job.file, 0, 0, 0, "", dict(left_out))
        size, digest = draft.stat().st_size, sha256(draft)
    return ShardDone(job.split, job.file, count, masks, size, digest, dict(left_out), census.to_tree(), taught)


def version_of(source: Source) -> int:
    """The schema version that the shards of a source have."""
    return TEACHER_VERSION if isinstance(source, TaughtSource) else SCHEMA_VERSION


def prepare(
    source: Source,
    out: str | Path,
    *,
    tune_val: float | int = 0.1,
    shard_rows: int = 512,
    on_error: OnError = "raise",
    seed: int = 0,
    progress: bool = False,
    shard_map: ShardMap | None = None,
) -> Manifest:
    """Write a source to a folder of shards.

    Args:
        source: The data set.
        out: The folder; it must not exist.
        tune_val: Share (below 1) or number of training rows held out as ``tune_val``; 0 for none.
        shard_rows: Rows of the source that go into one shard.
        on_error: Whether a row that cannot be used stops the work, or is left out and counted.
        seed: Of the held-out choice.
        progress: Whether progress goes to stderr.
        shard_map: Called with :func:`write_shard`, the source, the jobs, the folder and ``on_error``; runs
            the jobs anywhere and yields what is done in any order. ``None``: one by one, here.

    Returns:
        The manifest of the finished folder.

    Raises:
        DataError: ``out`` exists, or other options than the unfinished folder was begun with, or bad
            input. ``out`` then does not exist; what has been written stays in ``OUT.partial`` and is
            used by the next run.
    """
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error is {on_error!r}; expected raise or skip")
    out = target(out, source.root)
    partial = partial_of(out)
    jobs = plan(source, tune_val=tune_val, shard_rows=shard_rows, seed=seed)
    options = {
        "schema_version": version_of(source),
        "source": source.name,
        "root": None if source.root is None else str(source.root.resolve()),
        **{f"source.{key}": value for key, value in source.options.items()},
        **({"teacher": str(source.masks.root.resolve())} if isinstance(source, TaughtSource) else {}),
        "tune_val": tune_val,
        "shard_rows": shard_rows,
        "seed": seed,
        "ids": hashlib.sha256(repr([(j.file, j.ids) for j in jobs]).encode()).hexdigest()[:16],
    }
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            if out.exists():  # made by another process since this one looked
                if not any(partial.iterdir()):
                    partial.rmdir()
                raise BusyError(f"{out}: another process has just made it")
            done = _resume(partial, options)
            try:
                _write_all(source, jobs, partial, options, done, on_error, progress, shard_map)
                manifest = _manifest(source, jobs, done, partial, tune_val=tune_val, seed=seed)
            except DataError as error:
                if not done:
                    shutil.rmtree(partial)
                    raise
                hint = " or with --on-error skip" if isinstance(error, RowError) and on_error == "raise" else ""
                stay = f"{len(done)} of {len(jobs)} shards stay in {line(partial)}"
                raise DataError(f"{error} ({stay}; run again{hint} to go on from there)") from None
            write_whole(partial / MANIFEST, manifest.to_json())
            os.replace(partial, out)
            sync(out.parent)
            (out / JOURNAL).unlink()
    except OSError as error:
        raise DataError(
            f"{line(partial)}: cannot be written: {error.strerror or line(error)}; run again to go on"
        ) from None
    return replace(manifest, root=out)


def target(out: str | Path, root: Path | None) -> Path:
    """The folder to write, checked before any work is paid for.

    Args:
        out: Name of the folder.
        root: Of the source, whose files may not be touched.

    Raises:
        DataError: It exists, or lies where the source does.
        ConfigError: It cannot be written.
    """
    out = folder_for(out)
    if out.exists():
        kind = "a prepared data set" if (out / MANIFEST).is_file() else "something else"
        raise DataError(f"{line(out)}: exists already ({kind}); choose another name or remove it")
    if not out.name or out.name == "..":
        raise DataError(f"--out {brief(str(out))}; expected the name of a new folder")
    if root is not None:
        inside = root.resolve()
        for place in (out.resolve(), partial_of(out).resolve()):
            # Directly in the root nothing is read from; further down images and masks are looked for.
            deep = place.is_relative_to(inside) and place.parent != inside
            if deep or inside.is_relative_to(place):
                raise DataError(
                    f"{line(out)}: lies in the data set's own folder {line(root)}; choose a place beside it"
                )
    return out


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Refuse a second writer; the lock goes with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not folder.is_dir() or not os.path.samestat(os.fstat(handle), folder.stat()):
            raise BlockingIOError  # its writer was done, and renamed it, before the lock was ours
        yield
    except BlockingIOError:
        raise BusyError(f"{folder}: another process is writing it") from None
    finally:
        os.close(handle)


def _resume(partial: Path, options: dict[str, Any]) -> dict[str, ShardDone]:
    """Shards that an earlier run finished, by file name."""
    path = partial / JOURNAL
    if not path.is_file():
        if strangers := sorted(p.name for p in partial.iterdir() if not p.name.endswith(DRAFT)):
            raise DataError(f"{partial}: holds '{strangers[0]}' but no journal; remove the folder")
        for draft in partial.iterdir():  # of a process that was killed
            draft.unlink()
        write_whole(path, json.dumps({"options": options, "shards": []}, indent=1))
        return {}
    try:
        tree = foreign.read_json(path, "journal")
        begun = foreign.as_dict(foreign.field(tree, "options", line(path)), line(path))
        shards = [
            _noted(entry, line(path)) for entry in foreign.as_list(foreign.field(tree, "shards", path.name), path.name)
        ]
    except DataError as error:
        raise DataError(f"{error} (broken journal; remove {line(partial)})") from None
    done = {shard.file: shard for shard in shards if shard.rows}
    now = json.loads(json.dumps(options))
    for key in [*now, *begun]:
        if begun.get(key) != now.get(key):
            what = "other rows" if key == "ids" else f"{key} {begun.get(key)!r}, now {now.get(key)!r}"
            raise DataError(f"{partial}: begun with {what}; use the same options to go on, or remove the folder")
    for name, shard in done.items():
        if shard.rows and (not (partial / name).is_file() or (partial / name).stat().st_size != shard.bytes):
            raise DataError(f"{partial / name}: in the journal but missing or changed; remove {partial}")
    # A shard that was renamed but not noted yet is written again; drafts of a killed run go.
    for path in partial.iterdir():
        if path.name in done or path.name == JOURNAL:
            continue
        if path.is_file() and path.name.endswith((".parquet", ".json", DRAFT)):
            path.unlink()  # what else lies there is somebody's, and no reader looks at it
    return done


def _noted(tree: Any, where: str) -> ShardDone:
    """An entry of the journal."""

    def text(key: str) -> str:
        return foreign.as_str(foreign.field(tree, key, where), f"{where}: {key}")

    def number(key: str) -> int:
        return foreign.as_int(foreign.field(tree, key, where), f"{where}: {key}", least=0)

    left_out = foreign.as_dict(foreign.field(tree, "left_out", where), where)
    return ShardDone(
        split=text("split"),
        file=text("file"),
        rows=number("rows"),
        with_masks=number("with_masks"),
        bytes=number("bytes"),
        sha256=text("sha256"),
        left_out={reason: foreign.as_int(n, where, least=0) for reason, n in left_out.items()},
        census=foreign.as_dict(tree.get("census", {}), where),
        with_teachers=foreign.as_int(tree.get("with_teachers", 0), f"{where}: with_teachers", least=0),
    )


def _write_all(
    source: Source,
    jobs: list[ShardJob],
    partial: Path,
    options: dict[str, Any],
    done: dict[str, ShardDone],
    on_error: OnError,
    progress: bool,
    shard_map: ShardMap | None,
) -> None:
    sizes = {job.file: len(job.ids) for job in jobs}
    with Progress(total=sum(sizes.values()), what="rows", enabled=progress) as bar:
        bar.advance(sum(sizes[name] for name in done))
        todo = [job for job in jobs if job.file not in done]
        results: Iterable[ShardDone]
        if shard_map is None:
            results = (write_shard(source, job, partial, on_error, bar.advance) for job in todo)
        else:
            results = shard_map(write_shard, source, todo, partial, on_error)
        for shard in results:
            done[shard.file] = shard
            journal = {"options": options, "shards": [asdict(s) for s in done.values()]}
            write_whole(partial / JOURNAL, json.dumps(journal, ensure_ascii=False))
            if shard_map is not None:
                bar.advance(sizes[shard.file])


def _manifest(
    source: Source, jobs: list[ShardJob], done: dict[str, ShardDone], partial: Path, *, tune_val: float | int, seed: int
) -> Manifest:
    splits: dict[str, SplitInfo] = {}
    inventory = Inventory(tuple(source.class_names), {}, getattr(source, "stray", {}))
    for split in dict.fromkeys(job.split for job in jobs):
        parts = [done[job.file] for job in jobs if job.split == split]
        left_out = Counter(source.left_out.get(split, {}))
        for part in parts:
            left_out.update(part.left_out)
        rows = sum(p.rows for p in parts)
        if rows == 0:
            why = ", ".join(f"{n} × {reason}" for reason, n in sorted(left_out.items()))
            raise DataError(f"split '{split}' is empty: every row was left out ({why})")
        inventory.splits[split] = census = Census(len(source.class_names))
        for part in parts:
            if part.rows:
                census.merge(_census(part, partial, len(source.class_names)))
        splits[split] = SplitInfo(
            rows=rows,
            with_masks=sum(p.with_masks for p in parts),
            shards=tuple(ShardInfo(p.file, p.rows, p.bytes, p.sha256) for p in parts if p.rows),
            left_out=dict(left_out),
            with_teachers=sum(p.with_teachers for p in parts),
        )
    return Manifest(
        root=partial,
        source=source.name,
        options={**source.options, "tune_val": tune_val, "tune_val_seed": seed},
        class_names=tuple(source.class_names),
        splits=splits,
        schema_version=version_of(source),
        census=inventory.to_tree(),
    )


def _census(part: ShardDone, folder: Path, classes: int) -> Census:
    if part.census:
        return Census.from_tree(part.census, f"{folder / JOURNAL}: {part.file}")
    return recount(folder / part.file, classes)  # written by a version that did not count


def recount(shard: Path | Place, classes: int) -> Census:
    """The census of a shard that is there.

    Raises:
        DataError: It cannot be read.
    """
    with open_shard(shard) as file:
        batches = file.iter_batches(batch_size=ROW_GROUP, use_threads=False)
        return census_of((row for batch in batches for row in from_table(pa.Table.from_batches([batch]))), classes)


def inventory_of(manifest: Manifest, progress: bool = False) -> Inventory:
    """What a prepared folder holds: as its manifest says, else counted in its shards.

    Raises:
        DataError: A manifest or shard that cannot be read.
    """
    if manifest.census:
        return Inventory.from_tree(manifest.census, manifest.class_names, f"{manifest.root / MANIFEST}: census")
    found = Inventory(manifest.class_names, {})
    with Progress(total=sum(i.rows for i in manifest.splits.values()), what="rows", enabled=progress) as bar:
        for split, info in manifest.splits.items():
            found.splits[split] = census = Census(manifest.num_classes)
            for path, shard in zip(manifest.paths(split), info.shards, strict=True):
                census.merge(recount(path, manifest.num_classes))
                bar.advance(shard.rows)
    return found
