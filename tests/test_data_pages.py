"""Rows taken straight out of a mapped shard are those that the Parquet library reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ugrl.data.pages import MappedShard, UnsupportedLayout, value_spans
from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest, ShardInfo, SplitInfo, from_table, open_shard, sha256, to_table, write_rows
from ugrl.types import Row

MASKS: dict[str, Callable[[int], bytes | None]] = {
    "all": lambda k: bytes([k]) * k,
    "none": lambda k: None,
    "some": lambda k: b"m" * k if k % 3 else None,
    "runs": lambda k: b"" if 20 <= k < 60 else None,
}


def rows(count: int, size: int, mask: Callable[[int], bytes | None]) -> list[Row]:
    rng = np.random.default_rng(size)
    made = []
    for k in range(count):
        image = rng.integers(0, 256, int(rng.integers(0, size)), dtype=np.uint8).tobytes()
        made.append(Row(f"rów-{k}" * (k % 3), image, k + 1, 2 * k + 1, tuple(range(1, k % 5 + 1)), mask(k)))
    return made


def reader_of(path: Path, count: int) -> ShardReader:
    shard = ShardInfo(path.name, count, path.stat().st_size, sha256(path))
    manifest = Manifest(path.parent, "folder", {}, ("a", "b", "c", "d"), {"train": SplitInfo(count, 0, (shard,))})
    return ShardReader(manifest, "train")


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, row groups are not to be read."""

    def read_row_group(*_: object, **__: object) -> None:
        raise AssertionError("a whole row group was read")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", [2, 3_000, 700_000])  # the last: pages of a megabyte end within a group
def test_every_row_is_the_librarys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: str, size: int) -> None:
    count = 21 if size > 10_000 else 101
    expected = rows(count, size, MASKS[mask])
    path = tmp_path / "train-00000.parquet"
    write_rows(path, iter(expected))
    with open_shard(path) as file:
        assert from_table(file.read()) == expected
    reader = reader_of(path, count)
    refuse(monkeypatch)
    order = np.random.default_rng(0).permutation(count)
    assert {int(k): reader[int(k)] for k in order} == dict(enumerate(expected))
    assert [reader[k] for k in range(count)] == expected


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"use_dictionary": True},
        {"data_page_version": "2.0"},
        {"column_encoding": {"image": "DELTA_LENGTH_BYTE_ARRAY"}},
    ],
    ids=lambda o: next(iter(o)),
)
def test_what_is_stored_otherwise_is_left_to_the_library(tmp_path: Path, options: dict) -> None:
    expected = rows(40, 300, MASKS["some"])
    path = tmp_path / "train-00000.parquet"
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(to_table(expected), path, row_group_size=8, **{**plain, **options})
    with open_shard(path) as file:
        shard = MappedShard(path, file)
    with pytest.raises(UnsupportedLayout):
        shard.row(3, 0, 0)
    assert reader_of(path, 40).rows(range(40)) == expected


def test_statistics_and_checksums_in_page_headers_are_stepped_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rows(40, 300, MASKS["some"])
    path = tmp_path / "train-00000.parquet"
    pq.write_table(
        to_table(expected),
        path,
        row_group_size=8,
        compression="none",
        use_dictionary=False,
        write_statistics=True,
        write_page_checksum=True,
    )
    reader = reader_of(path, 40)
    refuse(monkeypatch)
    assert reader.rows(range(40)) == expected


@pytest.mark.parametrize("column", ["image", "mask"])
def test_a_damaged_page_is_never_read_as_something_else(tmp_path: Path, column: str) -> None:
    """Any byte of the headers and the first lengths, changed to anything: refused, or nothing beyond the page."""
    path = tmp_path / "train-00000.parquet"
    write_rows(path, iter(rows(8, 40, MASKS["some"])))
    meta = pq.read_metadata(path)
    place = next(c for c in (meta.row_group(0).column(k) for k in range(6)) if c.path_in_schema == column)
    start, size, good = place.data_page_offset, place.total_compressed_size, path.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for at in range(start, start + min(size, 60)):
        for value in (0, 255, *rng.integers(0, 256, 3).tolist()):
            data = bytearray(good)
            data[at] = value
            try:
                spans = value_spans(memoryview(data), start, 8, nullable=column == "mask")
            except UnsupportedLayout:
                refused += 1
                continue
            assert all(0 <= a <= b <= len(data) for a, b in spans)
    assert refused > 20


def test_the_mapping_outlives_the_file(tmp_path: Path) -> None:
    expected = rows(9, 50, MASKS["all"])
    path = tmp_path / "train-00000.parquet"
    write_rows(path, iter(expected))
    with open_shard(path) as file:
        shard = MappedShard(path, file)
    assert shard.row(0, 0, 0) == expected[0]
    path.unlink()
    assert shard.row(8, 1, 8) == expected[8]
