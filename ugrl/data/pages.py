"""Single rows of a shard that is mapped into memory, without reading their neighbours.

Parquet libraries read whole row groups: to get one image, a group's other seven are copied as well, five times what the
image itself costs. Shards are uncompressed and plainly encoded, so that the bytes of an image lie in the file as they
are; where they lie follows from the lengths that stand before them. Whatever looks different is left to the library.

Measured with pyarrow 26 (processor time, beside other loads). 400 rows of 100 kB with masks of 8 kB in random order,
rows per second from a file in memory and from one that was dropped from it: this module 26,300 and 10,700; the
library with groups of eight rows 4,400 and 3,100; with groups of one row 6,900 and 4,100. Photographs through the
local loader, crops per second: this module 524, the library 387 with groups of eight rows and 391 with groups of one.
The files have the same size (43.9 and 44.0 MB), but of groups of one row the column of ids takes 402 requests over a
network, of eight 51.

A memory-mapped Arrow file with batches of eight rows is as fast (28,400 and 20,300 rows per second, the same size)
and needs no reader of our own. It is another format of shards, and its column of ids takes 152 requests, one after
another.

The layout is Parquet's own: a column chunk is a sequence of pages, a page is a header (Thrift's compact protocol), the
definition levels where values may be absent (runs and packed bits), and values as length (4 bytes, little-endian) and
bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ugrl.row import Row

SMALL = ["id", "width", "height", "tags"]
LARGE = ("image", "mask")
_UINT = struct.Struct("<I")
_STOP, _INTS, _BINARY, _LIST, _STRUCT = 0, (4, 5, 6), 8, 9, 12
_TRUE, _FALSE = 1, 2
_BYTES = {_TRUE: 1, _FALSE: 1, 3: 1, 7: 8}  # what takes a fixed number of them
_PLAIN = _DATA_PAGE = _UNCOMPRESSED = 0
_DEEPEST = 8
# Of a row's image or masks: not looked up yet; there is none (nothing lies at 0, where a file's mark is).
_UNKNOWN, _NONE = -1, 0


class UnsupportedLayout(ValueError):
    """A page that this module does not read."""


class MappedShard:
    """The rows of one shard on a local disk, from any number of threads.

    Args:
        path: The file of the shard, on a local disk.
        file: The same, opened by the library.
        large: Columns of files that rows are to have: the image, then its masks.
    """

    def __init__(self, path: Path, file: pq.ParquetFile, large: tuple[str, ...] = LARGE) -> None:
        with pa.memory_map(str(path)) as mapped:
            self._bytes = memoryview(mapped.read_buffer()).cast("B")  # keeps the mapping, not the file, open
        small = file.read(SMALL, use_threads=False).combine_chunks()
        self._small = [small.column(name).chunk(0) for name in SMALL]
        if any(column.null_count for column in self._small):
            raise UnsupportedLayout("a row without a value")
        self._columns = [_position(file.metadata, name) for name in large]
        self._groups = row_groups(self._bytes, [k for k, _ in self._columns])
        self._spans_RL2 = np.full((file.metadata.num_rows, len(large), 2), _UNKNOWN, np.int64)

    def row(self, index: int, group: int, first: int) -> Row:
        """A row of a row group that begins with row ``first``.

        Raises:
            UnsupportedLayout: The group is not laid out as this module expects.
        """
        if self._spans_RL2[index, 0, 0] == _UNKNOWN:
            self._look_up(group, first)
        spans = self._spans_RL2[index].tolist()
        if spans[0][0] == _NONE:
            raise UnsupportedLayout("a row without an image")
        id, width, height, tags = (column[index].as_py() for column in self._small)
        image, *masks = (None if start == _NONE else bytes(self._bytes[start:end]) for start, end in spans)
        return Row(id, image or b"", width, height, tuple(tags), *masks)

    def _look_up(self, group: int, first: int) -> None:
        rows, chunks = self._groups[group]
        spans_nL2 = np.empty((rows, len(self._columns), 2), np.int64)
        for k, (chunk, (_, nullable)) in enumerate(zip(chunks, self._columns, strict=True)):
            if not chunk.plain:
                raise UnsupportedLayout("a compressed chunk, or one with a dictionary")
            spans = value_spans(self._bytes[: chunk.end], chunk.start, chunk.values, nullable=nullable)
            if len(spans) != rows:
                raise UnsupportedLayout(f"{len(spans)} values for {rows} rows")
            spans_nL2[:, k] = spans
        # Threads may do this twice; all write the same.
        self._spans_RL2[first : first + rows] = spans_nL2


class Chunk(NamedTuple):
    """A column chunk: its first byte and the one past its last, values, and whether it is plain bytes."""

    start: int
    end: int
    values: int
    plain: bool


def row_groups(data: memoryview, columns: list[int]) -> list[tuple[int, list[Chunk]]]:
    """Rows of each row group, and where some columns of it lie, from the footer.

    The library knows this, too, but ends the process where a damaged footer describes a chunk that cannot be.

    Raises:
        UnsupportedLayout: The bytes are no footer.
    """
    try:
        size = _UINT.unpack_from(data, len(data) - 8)[0]
        footer, _ = _struct(data[:-8], len(data) - 8 - size)
        return [(group[3], [_chunk(group[1][k][3], len(data)) for k in columns]) for group in footer[4]]
    except (IndexError, KeyError, TypeError, struct.error) as error:
        raise UnsupportedLayout(f"a footer that makes no sense ({error})") from None


def _chunk(column: dict[int, Any], size: int) -> Chunk:
    start, end = column[9], column[9] + column[7]
    if not 0 < start <= end <= size:
        raise UnsupportedLayout("a chunk outside of its file")
    return Chunk(start, end, column[5], column[4] == _UNCOMPRESSED and 11 not in column)


def _position(meta: Any, name: str) -> tuple[int, bool]:
    """A column's place among the columns, and whether its values may be absent."""
    for k in range(meta.num_columns):
        column = meta.schema.column(k)
        if column.path == name and column.max_repetition_level == 0 and column.max_definition_level <= 1:
            return k, column.max_definition_level == 1
    raise UnsupportedLayout(f"no plain column '{name}'")


def value_spans(data: memoryview, at: int, count: int, *, nullable: bool) -> list[tuple[int, int]]:
    """Where the byte strings of a column chunk lie.

    Args:
        data: The file, up to the chunk's end.
        at: Where the chunk's first page begins.
        count: Values of the chunk, with absent ones.
        nullable: Whether values may be absent.

    Returns:
        First and one past the last byte of each value; ``(0, 0)`` for an absent one.

    Raises:
        UnsupportedLayout: Another kind of page or encoding, or lengths that do not fit.
    """
    try:
        return _walk(data, at, count, nullable)
    except (IndexError, KeyError, struct.error) as error:
        raise UnsupportedLayout(f"a page that makes no sense ({error})") from None


def _walk(data: memoryview, at: int, count: int, nullable: bool) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    while len(spans) < count:
        header, at = _struct(data, at)
        page = header.get(5)
        if header.get(1) != _DATA_PAGE or not isinstance(page, dict) or page.get(2) != _PLAIN:
            raise UnsupportedLayout("not a data page of plain values")
        if header[2] != header[3] or not 0 < page[1] <= count - len(spans):
            raise UnsupportedLayout("a compressed or empty page, or one with more values than its chunk")
        end, present = at + header[3], [True] * page[1]
        if end > len(data):
            raise UnsupportedLayout("a page that ends after its chunk")
        if nullable:
            size = _UINT.unpack_from(data, at)[0]
            present = _levels(data, at + 4, at + 4 + size, page[1])
            at += 4 + size
        for there in present:
            if not there:
                spans.append((_NONE, _NONE))
                continue
            start = at + 4
            at = start + _UINT.unpack_from(data, at)[0]
            if at > end:
                raise UnsupportedLayout("a value that ends after its page")
            spans.append((start, at))
        if at != end:
            raise UnsupportedLayout("a page with something behind its values")
    return spans


def _levels(data: memoryview, at: int, end: int, count: int) -> list[bool]:
    """Definition levels 0 and 1: runs of one level, and packed bits."""
    out: list[bool] = []
    while len(out) < count:
        if at >= end:
            raise UnsupportedLayout("too few definition levels")
        header, at = _varint(data, at)
        length = header >> 1
        if header & 1:
            for byte in data[at : min(at + length, end)]:
                out += [bool(byte >> bit & 1) for bit in range(8)]
            at += length
        else:
            out += [bool(data[at])] * min(length, count)
            at += 1
    return out[:count]  # packed bits are filled up to eight


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise UnsupportedLayout("a number of more than 64 bits")


def _struct(data: memoryview, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol: values by field number; where it ends."""
    if depth > _DEEPEST:
        raise UnsupportedLayout("a header nested too deep")
    found: dict[int, Any] = {}
    field = 0
    while True:
        byte, at = data[at], at + 1
        kind = byte & 15
        if kind == _STOP:
            return found, at
        if byte >> 4:
            field += byte >> 4
        else:
            number, at = _varint(data, at)
            field = number >> 1 ^ -(number & 1)
        if kind not in (_TRUE, _FALSE):  # which are their own values
            found[field], at = _value(data, at, kind, depth)


def _value(data: memoryview, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """A number, struct or list; texts are stepped over."""
    if kind in _INTS:
        number, at = _varint(data, at)
        return number >> 1 ^ -(number & 1), at
    if kind == _STRUCT:
        return _struct(data, at, depth + 1)
    if kind == _BINARY:
        size, at = _varint(data, at)
        return None, at + size
    if kind in _BYTES:
        return None, at + _BYTES[kind]
    if kind != _LIST:
        raise UnsupportedLayout(f"a header with a field of type {kind}")
    byte, at = data[at], at + 1
    count, kind = byte >> 4, byte & 15
    if count == 15:
        count, at = _varint(data, at)
    if count > len(data) - at:  # each value takes a byte at least
        raise UnsupportedLayout("a list that is longer than its file")
    values = []
    for _ in range(count):
        value, at = _value(data, at, kind, depth)
        values.append(value)
    return values, at
