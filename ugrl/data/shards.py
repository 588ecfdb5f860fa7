"""Parquet shards and their manifest.

Layout of a prepared folder::

    OUT/manifest.json           schema version, source, class names, per split the shards and counts
    OUT/train-00000.parquet     columns id, image, width, height, tags, mask
    OUT/tune_val-00000.parquet  held out of train, for searches
    OUT/val-00000.parquet       for the final number alone

Rows lie in small row groups without compression (JPEG and PNG are compressed already), so that one row
can be read without its shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ugrl.config import nearest
from ugrl.errors import DataError
from ugrl.row import Row
from ugrl.storage import Place, StorageError, lasting, place

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
ROW_GROUP = 8
_VERSION_KEY = b"ugrl.schema_version"

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.large_binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("tags", pa.list_(pa.int16()), nullable=False),
        pa.field("mask", pa.large_binary(), nullable=True),
    ],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION).encode()},
)


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard file: its name in the folder, rows, bytes and SHA-256."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """One split: rows, how many of them have a mask, shards in order, images left out by reason."""

    rows: int
    with_masks: int
    shards: tuple[ShardInfo, ...]
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
        root: The folder (not written to the file).
        source: Name of the source.
        options: The options that decided the rows.
        class_names: The F foreground classes.
        splits: By name.
        schema_version: Of the shards.
        census: What :class:`ugrl.data.census.Inventory` counted; empty in older folders.
    """

    root: Path | Place
    source: str
    options: dict[str, Any]
    class_names: tuple[str, ...]
    splits: dict[str, SplitInfo]
    schema_version: int = SCHEMA_VERSION
    census: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """F."""
        return len(self.class_names)

    def split(self, name: str) -> SplitInfo:
        """A split by name.

        Raises:
            DataError: There is none of that name.
        """
        if name not in self.splits:
            raise DataError(f"{self.root}: no split '{name}'{nearest(name, self.splits)}")
        return self.splits[name]

    def rows(self, split: str) -> int:
        """Rows of a split."""
        return self.split(split).rows

    def paths(self, split: str) -> tuple[Path | Place, ...]:
        """The shard files of a split, in order."""
        return tuple(self.root / s.file for s in self.split(split).shards)

    def ids(self, split: str) -> tuple[str, ...]:
        """The ids of a split in shard order; row index i means ``ids(split)[i]``. Read once, then cached."""
        return _column(self.paths(split), "id")

    def tags(self, split: str) -> tuple[tuple[int, ...], ...]:
        """The tags of every row of a split, in shard order, without reading an image."""
        return _column(self.paths(split), "tags")

    def fingerprint(self) -> str:
        """A digest of the class names and of every shard's checksum: the same data, the same text."""
        parts = [f"{n}:{s.sha256}" for n, i in sorted(self.splits.items()) for s in i.shards]
        return hashlib.sha256("\n".join([*self.class_names, *parts]).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The text of ``manifest.json``: a function of the rows and options, without times or places."""
        tree = {
            "schema_version": self.schema_version,
            "source": self.source,
            "options": self.options,
            "class_names": list(self.class_names),
            "splits": {
                name: {
                    "rows": info.rows,
                    "with_masks": info.with_masks,
                    "left_out": dict(sorted(info.left_out.items())),
                    "shards": [
                        {"file": s.file, "rows": s.rows, "bytes": s.bytes, "sha256": s.sha256} for s in info.shards
                    ],
                }
                for name, info in self.splits.items()
            },
            **({"census": self.census} if self.census else {}),
        }
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def load(folder: str | Path | Place) -> Manifest:
        """Read and check the manifest of a prepared folder (not the shards' contents: :func:`verify`).

        Args:
            folder: A path, or a URI of a remote one.

        Raises:
            DataError: No such folder or manifest, an unfinished folder, another schema version, a shard
                that is missing or of another size.
            StorageError: A remote storage does not answer.
        """
        where = place(folder)
        root: Path | Place = where if where.local is None else Path(str(folder))
        path = root / MANIFEST
        if isinstance(root, Path) and not place(path).exists():
            partial = partial_of(root)
            if root.name.endswith(".partial") and root.is_dir():
                raise DataError(f"{root}: unfinished; run 'ugrl prepare' with the same options again to finish it")
            if partial.is_dir():
                raise DataError(f"{root}: not there yet, but {partial.name} is; run 'ugrl prepare' again to finish it")
        sizes = where.sizes()
        if MANIFEST not in sizes:
            raise DataError(f"{root}: no {MANIFEST}; expected a folder written by 'ugrl prepare'")
        try:
            tree = json.loads(place(path).read())
            version = tree["schema_version"]
        except (StorageError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a manifest ({type(error).__name__}: {error})") from None
        if version != SCHEMA_VERSION:
            raise DataError(f"{path}: schema version {version}; expected {SCHEMA_VERSION}: run 'ugrl prepare' again")
        try:
            manifest = _from_tree(root, tree)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: not a manifest ({type(error).__name__}: {error})") from None
        for name, info in manifest.splits.items():
            for shard in info.shards:
                file = root / shard.file
                if shard.file not in sizes:
                    raise DataError(f"{file}: missing shard of split '{name}'; the manifest expects {shard.rows} rows")
                if sizes[shard.file] != shard.bytes:
                    raise DataError(f"{file}: {sizes[shard.file]} bytes; the manifest expects {shard.bytes}")
        return manifest


def _from_tree(root: Path | Place, tree: dict[str, Any]) -> Manifest:
    splits = {
        name: SplitInfo(
            rows=int(info["rows"]),
            with_masks=int(info["with_masks"]),
            shards=tuple(ShardInfo(s["file"], int(s["rows"]), int(s["bytes"]), s["sha256"]) for s in info["shards"]),
            left_out=dict(info.get("left_out", {})),
        )
        for name, info in tree["splits"].items()
    }
    return Manifest(
        root=root,
        source=str(tree["source"]),
        options=dict(tree["options"]),
        class_names=tuple(tree["class_names"]),
        splits=splits,
        schema_version=int(tree["schema_version"]),
        census=dict(tree.get("census", {})),
    )


def partial_of(out: Path) -> Path:
    """Where a folder is written before it is renamed: ``OUT.partial``."""
    return out.with_name(out.name + ".partial")


@lru_cache(maxsize=16)
def _column(paths: tuple[Path | Place, ...], name: str) -> tuple[Any, ...]:
    out: list[Any] = []
    for path in paths:
        with open_shard(path) as shard:
            out += shard.read([name], use_threads=False).column(name).to_pylist()
    return tuple(tuple(v) if isinstance(v, list) else v for v in out)


def open_shard(path: Path | Place, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """A shard for reading.

    Args:
        path: The file; a local one is mapped into memory, of a remote one only what is asked for is fetched.
        metadata: Its footer, where it has been read before.

    Raises:
        DataError: Missing, not Parquet, or of another schema version.
    """
    try:
        if isinstance(path, Place) and path.local is None:
            filesystem, name = path.filesystem()
            shard = pq.ParquetFile(filesystem.open_input_file(name), metadata=metadata, pre_buffer=True)
        else:
            shard = pq.ParquetFile(Path(path), metadata=metadata, memory_map=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable shard ({str(error).splitlines()[0]})") from None
    except (OSError, pa.ArrowException) as error:
        if isinstance(path, Place) and not lasting(error):
            raise StorageError(f"{path}: {str(error).splitlines()[0]}") from None
        raise DataError(f"{path}: not a readable shard ({str(error).splitlines()[0]})") from None
    if metadata is None:
        found = (shard.metadata.metadata or {}).get(_VERSION_KEY, b"none").decode()
        if found != str(SCHEMA_VERSION):
            shard.close()
            raise DataError(f"{path}: shard of schema version {found}; expected {SCHEMA_VERSION}: prepare it again")
    return shard


def to_table(rows: Sequence[Row]) -> pa.Table:
    """Rows as an Arrow table of :data:`SCHEMA`."""
    columns = {
        "id": [r.id for r in rows],
        "image": [r.image for r in rows],
        "width": [r.width for r in rows],
        "height": [r.height for r in rows],
        "tags": [list(r.tags) for r in rows],
        "mask": [r.mask for r in rows],
    }
    return pa.Table.from_pydict(columns, schema=SCHEMA)


def from_table(table: pa.Table) -> list[Row]:
    """The rows of an Arrow table of :data:`SCHEMA`."""
    names = ("id", "image", "width", "height", "tags", "mask")
    columns = [table.column(n).to_pylist() for n in names]
    return [Row(i, image, w, h, tuple(tags), mask) for i, image, w, h, tags, mask in zip(*columns, strict=True)]


def write_rows(path: Path, rows: Iterator[Row]) -> tuple[int, int]:
    """Write a shard in bounded memory: at most one row group of rows is held.

    Returns:
        Rows written, and how many of them have a mask. With no row, no file is left.
    """
    count = masks = 0
    group: list[Row] = []
    with pq.ParquetWriter(path, SCHEMA, compression="none", use_dictionary=False, write_statistics=False) as writer:
        for row in rows:
            group.append(row)
            count += 1
            masks += row.mask is not None
            if len(group) == ROW_GROUP:
                writer.write_table(to_table(group), row_group_size=ROW_GROUP)
                group = []
        if group:
            writer.write_table(to_table(group), row_group_size=ROW_GROUP)
    if count == 0:
        path.unlink()
    else:
        sync(path)
    return count, masks


def sync(path: Path) -> None:
    """Have a file's or folder's contents on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one go."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    os.replace(draft, path)
    sync(path.parent)


def sha256(path: Path | Place) -> str:
    """A file's checksum; a local one is read in blocks."""
    if isinstance(path, Place) and path.local is None:
        return hashlib.sha256(path.read()).hexdigest()
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def verify(folder: str | Path | Place) -> Manifest:
    """Check every shard of a prepared folder against its checksum and row count.

    Raises:
        DataError: As :meth:`Manifest.load`, or a shard that differs from what was written.
    """
    manifest = Manifest.load(folder)
    for info in manifest.splits.values():
        for shard in info.shards:
            path = manifest.root / shard.file
            found = sha256(path)
            if found != shard.sha256:
                raise DataError(f"{path}: checksum {found[:12]}…; the manifest expects {shard.sha256[:12]}…")
            with open_shard(path) as file:
                if file.metadata.num_rows != shard.rows:
                    raise DataError(f"{path}: {file.metadata.num_rows} rows; the manifest expects {shard.rows}")
    return manifest
