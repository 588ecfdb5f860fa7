"""Parquet shards and their manifest.

Layout of a prepared folder::

    OUT/manifest.json           schema version, source, class names, per split the shards and counts
    OUT/train-00000.parquet     columns id, image, width, height, tags, mask, and perhaps teacher
    OUT/tune_val-00000.parquet  held out of train, for searches
    OUT/val-00000.parquet       for the final number alone

Of schema version 1 there is no column ``teacher`` (masks of another method), of version 2 there is: programs that know
version 1 alone refuse the others instead of passing the column over. Without teacher masks version 1 is written.

Rows lie in small row groups without compression (JPEG and PNG are compressed already), so that one row
can be read without its shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ugrl import foreign
from ugrl.errors import DataError, UgrlError
from ugrl.row import Row
from ugrl.storage import Place, StorageError, lasting, place
from ugrl.text import brief, line, nearest

SCHEMA_VERSION = 1
TEACHER_VERSION = 2  # with the column ``teacher``
MANIFEST = "manifest.json"
ROW_GROUP = 8
MOST_CLASSES = 254  # what a label of a byte can tell apart, with 0 and 255 for background and unknown
_VERSION_KEY = b"ugrl.schema_version"
_MOST_SIDE = 1 << 16

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
TEACHER = "teacher"
SCHEMAS = {
    SCHEMA_VERSION: SCHEMA,
    TEACHER_VERSION: pa.schema(
        [*SCHEMA, pa.field(TEACHER, pa.large_binary(), nullable=True)],
        metadata={_VERSION_KEY: str(TEACHER_VERSION).encode()},
    ),
}
_VERSIONS = " or ".join(map(str, SCHEMAS))


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard file: its name in the folder, rows, bytes and SHA-256."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """One split: rows, how many of them have a mask, shards in order, images left out by reason, teacher masks."""

    rows: int
    with_masks: int
    shards: tuple[ShardInfo, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    with_teachers: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a prepared folder holds.

    Attributes:
        root: The folder (not written to the file).
        source: Name of the source, as ``voc``.
        options: The options that decided the rows.
        class_names: The F foreground classes.
        splits: Splits by name, as ``train``.
        schema_version: Version of the shards' columns.
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
        """The ids of a split in shard order; row index i means ``ids(split)[i]``. Read once, then cached.

        Raises:
            DataError: A shard cannot be read, or has an id twice.
        """
        return _column(self.paths(split), self.split(split).shards, "id", self.num_classes)

    def tags(self, split: str) -> tuple[tuple[int, ...], ...]:
        """The tags of every row of a split, in shard order, without reading an image."""
        return _column(self.paths(split), self.split(split).shards, "tags", self.num_classes)

    def fingerprint(self, *splits: str) -> str:
        """A digest of the class names and of the checksum of every shard (of some splits): the same data, the same
        text.
        """
        parts = [f"{n}:{s.sha256}" for n, i in sorted(self.splits.items()) for s in i.shards if n in (splits or (n,))]
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
                    **({"with_teachers": info.with_teachers} if self.schema_version == TEACHER_VERSION else {}),
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
        text = line(path)
        tree = foreign.parse_json(place(path).read_small("manifest", error=DataError), text)
        version = foreign.field(tree, "schema_version", text)
        if type(version) is not int or version not in SCHEMAS:
            raise DataError(f"{text}: schema version {brief(version)}; expected {_VERSIONS}: run 'ugrl prepare' again")
        manifest = _from_tree(root, tree, version, text)
        for name, info in manifest.splits.items():
            for shard in info.shards:
                file = line(root / shard.file)
                if shard.file not in sizes:
                    raise DataError(
                        f"{file}: missing shard of split {brief(name)}; the manifest expects {shard.rows} rows"
                    )
                if sizes[shard.file] != shard.bytes:
                    raise DataError(f"{file}: {sizes[shard.file]} bytes; the manifest expects {shard.bytes}")
        return manifest


def _from_tree(root: Path | Place, tree: dict[str, Any], version: int, where: str) -> Manifest:
    names = [
        foreign.as_str(name, f"{where}: class_names", most=200)
        for name in foreign.as_list(foreign.field(tree, "class_names", where), f"{where}: class_names")
    ]
    if not 1 <= len(names) <= MOST_CLASSES or len(set(names)) < len(names):
        raise DataError(f"{where}: class_names {brief(names)}; expected 1…{MOST_CLASSES} different ones")
    splits = foreign.as_dict(foreign.field(tree, "splits", where), f"{where}: splits")
    return Manifest(
        root=root,
        source=foreign.as_str(foreign.field(tree, "source", where), f"{where}: source"),
        options=foreign.as_dict(foreign.field(tree, "options", where), f"{where}: options"),
        class_names=tuple(names),
        splits={name: _split(info, f"{where}: split {brief(name)}") for name, info in splits.items()},
        schema_version=version,
        census=foreign.as_dict(tree.get("census", {}), f"{where}: census"),
    )


def _split(tree: Any, where: str) -> SplitInfo:
    def count(tree: Any, key: str, where: str) -> int:
        return foreign.as_int(foreign.field(tree, key, where), f"{where}: {key}", least=0, most=1 << 50)

    shards = []
    for k, entry in enumerate(foreign.as_list(foreign.field(tree, "shards", where), f"{where}: shards")):
        at = f"{where}: shard {k}"
        file = foreign.as_str(foreign.field(entry, "file", at), f"{at}: file", most=300)
        if foreign.under(Path("/"), file, at).parent != Path("/"):
            raise DataError(f"{at}: file {brief(file)}; expected the name of a file in the folder itself")
        sha256 = foreign.as_str(foreign.field(entry, "sha256", at), f"{at}: sha256", most=64)
        shards.append(ShardInfo(file, count(entry, "rows", at), count(entry, "bytes", at), sha256))
    left_out = foreign.as_dict(tree.get("left_out", {}), f"{where}: left_out")
    rows, with_masks = count(tree, "rows", where), count(tree, "with_masks", where)
    taught = count(tree, "with_teachers", where) if "with_teachers" in tree else 0
    if sum(s.rows for s in shards) != rows or max(with_masks, taught) > rows:
        held = sum(s.rows for s in shards)
        with_them = f"{with_masks} with masks" + (f", {taught} with teacher masks" if taught else "")
        raise DataError(f"{where}: {rows} rows, {with_them}; its shards hold {held}")
    reasons = {key: count(left_out, key, f"{where}: left_out") for key in left_out}
    return SplitInfo(rows, with_masks, tuple(shards), reasons, taught)


def partial_of(out: Path) -> Path:
    """Where a folder is written before it is renamed: ``OUT.partial``."""
    return out.with_name(out.name + ".partial")


# The checksums are part of the key: a folder may be prepared anew while a process lives.
@lru_cache(maxsize=16)
def _column(
    paths: tuple[Path | Place, ...], shards: tuple[ShardInfo, ...], name: str, num_classes: int
) -> tuple[Any, ...]:
    out: list[Any] = []
    for path, info in zip(paths, shards, strict=True):
        with open_shard(path, rows=info.rows) as shard, reading(path, f"column '{name}' is unreadable"):
            values = shard.read([name], use_threads=False).column(name).to_pylist()
        if len(values) != info.rows:
            raise DataError(f"{line(path)}: {len(values)} values of '{name}'; expected {info.rows}")
        for k, value in enumerate(values):
            if name == "tags":
                values[k] = check_tags(value, num_classes, f"{line(path)}: row {k}")
            elif value is None:
                raise DataError(f"{line(path)}: row {k}: no id; expected a text")
        out += values
    if name == "id" and len(set(out)) < len(out):
        seen: set[str] = set()
        twice = next(id for id in out if id in seen or seen.add(id))  # type: ignore[func-returns-value]
        raise DataError(f"{line(paths[0])}: id {brief(twice)} occurs twice in the split; prepare it again")
    return tuple(out)


@contextmanager
def reading(path: Path | Place, what: str) -> Iterator[None]:
    """Around the Parquet library: whatever it makes of damaged bytes is one line.

    Args:
        path: The shard, as messages name it.
        what: Of it cannot be read, for the message.

    Raises:
        StorageError: A remote storage does not answer.
        DataError: Anything else went wrong.
    """
    try:
        yield
    except UgrlError:
        raise
    except Exception as error:
        words = line(error) or type(error).__name__
        if isinstance(path, Place) and isinstance(error, OSError) and not lasting(error):
            raise StorageError(f"{path}: {what} ({words})") from None
        raise DataError(f"{line(path)}: {what} ({words})") from None


def open_shard(
    path: Path | Place, metadata: pq.FileMetaData | None = None, *, rows: int | None = None
) -> pq.ParquetFile:
    """A shard for reading.

    Args:
        path: The file; a local one is mapped into memory, of a remote one only what is asked for is fetched.
        metadata: Its footer, where it has been read and checked before.
        rows: Number of rows that the manifest promises.

    Raises:
        DataError: Missing, not Parquet, of another schema, or with a footer that makes no sense.
        StorageError: A remote storage does not answer.
    """
    with reading(path, "not a readable shard"):
        if isinstance(path, Place) and path.local is None:
            filesystem, name = path.filesystem()
            shard = pq.ParquetFile(filesystem.open_input_file(name), metadata=metadata, pre_buffer=True)
        else:
            if not Path(path).is_file():
                raise DataError(f"{line(path)}: no such file; expected a shard")
            shard = pq.ParquetFile(Path(path), metadata=metadata, memory_map=True)
        if metadata is None:
            try:
                _check(shard, rows, line(path))
            except BaseException:
                shard.close()
                raise
    return shard


def _check(shard: pq.ParquetFile, rows: int | None, where: str) -> None:
    """Hold a shard's footer against its schema and the file, before it decides what is read and allocated."""
    meta: Any = shard.metadata
    version = (meta.metadata or {}).get(_VERSION_KEY, b"none").decode(errors="replace")
    wanted = next((schema for number, schema in SCHEMAS.items() if version == str(number)), None)
    if wanted is None:
        raise DataError(
            f"{where}: shard of schema version {brief(version)[1:-1]}; expected {_VERSIONS}: prepare it again"
        )
    if rows is not None and meta.num_rows != rows:
        raise DataError(f"{where}: {meta.num_rows} rows; the manifest expects {rows}")
    schema = shard.schema_arrow
    for want in wanted:
        found = [schema.field(k).type for k in schema.get_all_field_indices(want.name)]
        if found != [want.type]:
            has = f"is {line(found[0], 60)}" if len(found) == 1 else "is missing" if not found else "occurs twice"
            raise DataError(f"{where}: column '{want.name}' {has}; expected {want.type}: prepare it again")
    # Of the column chunks nothing is asked here: the library's descriptions of damaged ones end the process.
    groups = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
    if sum(groups) != meta.num_rows or min(groups, default=0) < 0:
        raise DataError(f"{where}: the rows of its groups do not add up to {meta.num_rows}: a damaged footer")


def check_tags(tags: Any, num_classes: int, where: str) -> tuple[int, ...]:
    """Tags as a row has them.

    Raises:
        DataError: They are absent, or not classes 1…F.
    """
    if not isinstance(tags, list | tuple) or not all(isinstance(t, int) and 1 <= t <= num_classes for t in tags):
        raise DataError(f"{where}: tags {brief(tags)}; expected class indices 1…{num_classes}")
    return tuple(tags)


def check_row(row: Row, num_classes: int, where: str) -> Row:
    """The row, if its values are what the columns stand for; the image itself is looked at when it is decoded.

    Raises:
        DataError: Names what is out of range.
    """
    where = f"{where}: row {brief(row.id)}"
    for name, side in (("width", row.width), ("height", row.height)):
        if not 1 <= side <= _MOST_SIDE:
            raise DataError(f"{where}: {name} {side}; expected 1…{_MOST_SIDE}")
    check_tags(row.tags, num_classes, where)
    return row


def to_table(rows: Sequence[Row], version: int = SCHEMA_VERSION) -> pa.Table:
    """Rows as an Arrow table of a schema version."""
    columns = {
        "id": [r.id for r in rows],
        "image": [r.image for r in rows],
        "width": [r.width for r in rows],
        "height": [r.height for r in rows],
        "tags": [list(r.tags) for r in rows],
        "mask": [r.mask for r in rows],
        TEACHER: [r.teacher for r in rows],
    }
    schema = SCHEMAS[version]
    return pa.Table.from_pydict({name: columns[name] for name in schema.names}, schema=schema)


def from_table(table: pa.Table) -> list[Row]:
    """The rows of an Arrow table with the columns of :data:`SCHEMA`, and teacher masks where it has them.

    Raises:
        ValueError: A value is absent that must be there.
    """
    for column in SCHEMA:
        if not column.nullable and table.column(column.name).null_count:
            raise ValueError(f"a row without '{column.name}'")
    names = [*SCHEMA.names, *([TEACHER] if TEACHER in table.column_names else [])]
    columns = [table.column(n).to_pylist() for n in names]
    return [Row(i, image, w, h, tuple(tags), *masks) for i, image, w, h, tags, *masks in zip(*columns, strict=True)]


def write_rows(path: Path, rows: Iterator[Row], version: int = SCHEMA_VERSION) -> tuple[int, int]:
    """Write a shard of a schema version in bounded memory: at most one row group of rows is held.

    Returns:
        Rows written, and how many of them have a mask. With no row, no file is left.
    """
    count = masks = 0
    group: list[Row] = []
    schema = SCHEMAS[version]
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
        for row in rows:
            group.append(row)
            count += 1
            masks += row.mask is not None
            if len(group) == ROW_GROUP:
                writer.write_table(to_table(group, version), row_group_size=ROW_GROUP)
                group = []
        if group:
            writer.write_table(to_table(group, version), row_group_size=ROW_GROUP)
    if count == 0:
        path.unlink()
    return count, masks


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
                raise DataError(f"{line(path)}: checksum {found[:12]}…; the manifest expects {shard.sha256[:12]}…")
            open_shard(path, rows=shard.rows).close()
    return manifest
