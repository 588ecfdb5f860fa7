"""A folder of shards as somebody else left it: another schema, damaged pages, a manifest that was edited."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ugrl.data.pages import UnsupportedLayout, value_spans
from ugrl.data.prepare import prepare
from ugrl.data.reader import ShardReader
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.data.shards import SCHEMA, Manifest, open_shard, verify
from ugrl.errors import DataError

SHARD = "val-00000.parquet"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("schema") / "out"
    prepare(ShapesSource(ShapesSpec(train=4, val=11, size=32)), out, tune_val=0)
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def rewrite(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the rows of a shard, and what the manifest says of the file's size."""
    path = folder / SHARD
    pq.write_table(change(pq.read_table(path)), path, compression="none", use_dictionary=False, row_group_size=8)
    edit(folder, lambda m: m["splits"]["val"]["shards"][0].update(bytes=path.stat().st_size))


def replaced(table: pa.Table, name: str, values: list[Any], type: pa.DataType | None = None) -> pa.Table:
    k = table.column_names.index(name)
    kind = type or SCHEMA.field(name).type
    return table.set_column(k, pa.field(name, kind), pa.chunked_array([pa.array(values, kind)]))


def one(table: pa.Table, name: str, row: int, value: Any) -> pa.Table:
    values = table.column(name).to_pylist()
    values[row] = value
    return replaced(table, name, values)


def refusals(folder: Path) -> list[str]:
    """What opening, ids, tags and every row say; an empty text where it was fine."""

    def told(action: Callable[[], Any]) -> str:
        try:
            action()
        except DataError as error:
            assert str(error).isprintable() and len(str(error)) < 400
            return str(error)
        return ""

    manifest = Manifest.load(folder)
    return [
        told(lambda: manifest.ids("val")),
        told(lambda: manifest.tags("val")),
        *(told(partial(ShardReader(manifest, "val").__getitem__, k)) for k in range(11)),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.drop(["tags"]), "column 'tags' is missing; expected list<item: int16>: prepare it again"),
        (lambda t: t.drop(["image"]), "column 'image' is missing; expected large_binary"),
        (lambda t: replaced(t, "image", [7] * 11, pa.int64()), "column 'image' is int64; expected large_binary"),
        (lambda t: replaced(t, "id", list(range(11)), pa.int32()), "column 'id' is int32; expected string"),
        (lambda t: replaced(t, "tags", ["1"] * 11, pa.string()), "column 'tags' is string; expected list"),
        (lambda t: t.append_column("tags", t.column("tags")), "column 'tags' occurs twice"),
        (lambda t: t.slice(0, 9), "9 rows; the manifest expects 11"),
    ],
)
def test_another_schema_is_named_with_what_was_found(copy: Path, change: Any, words: str) -> None:
    rewrite(copy, change)
    assert all(f"{SHARD}: {words}" in told for told in refusals(copy))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("tags", None, "tags None; expected class indices 1…6"),
        ("tags", [1, 7], r"tags .1, 7.; expected class indices 1…6"),
        ("tags", [None], r"tags .None,?.; expected class indices"),
        ("tags", [0], "expected class indices 1…6"),
        ("image", None, "row 9 is unreadable .a row without 'image'"),
        ("width", 0, "width 0; expected 1…65536"),
        ("height", -5, "height -5; expected 1…65536"),
        ("width", None, "a row without 'width'"),
        ("id", None, "no id; expected a text"),
        ("id", "val_000000", "id 'val_000000' occurs twice in the split"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_row(copy: Path, name: str, value: Any, words: str) -> None:
    rewrite(copy, lambda table: one(table, name, 9, value))
    ids, tags, *rows = refusals(copy)
    assert not any(rows[:8])  # the first row group is whole
    assert re.search(words, ids + tags + rows[9])
    assert bool(tags) == (name == "tags") and bool(ids) == (name == "id")
    assert bool(rows[9]) == (value != "val_000000")


def test_a_folder_prepared_anew_in_the_same_process_answers_with_its_own_ids(tmp_path: Path) -> None:
    found = []
    for seed, val in ((1, 3), (2, 3), (1, 4)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        source = ShapesSource(ShapesSpec(train=4, val=val, size=32, seed=seed))
        manifest = prepare(source, tmp_path / "out", tune_val=0)
        assert manifest.ids("val") == tuple(source.splits()["val"])
        assert manifest.tags("val") == tuple(source.row("val", id).tags for id in source.splits()["val"])
        found.append((manifest.fingerprint("train"), manifest.fingerprint("val"), manifest.fingerprint()))
    assert found[0][0] == found[2][0] != found[1][0] and len({v for _, v, _ in found}) == 3
    assert len({f for group in found for f in group}) == 8


# ---- the manifest ----------------------------------------------------------------------------------


def shard(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda m: m["splits"]["val"]["shards"][0].update(changes)


def split(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda m: m["splits"]["val"].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(class_names="cat"), "class_names: 'cat'; expected a list"),
        (lambda m: m.update(class_names=[]), r"class_names \[\]; expected 1…254 different ones"),
        (lambda m: m.update(class_names=["cat", "cat"]), "expected 1…254 different ones"),
        (lambda m: m.update(class_names=[1]), "class_names: 1; expected a text"),
        (lambda m: m.update(splits=[]), r"splits: \[\]; expected keys and values"),
        (lambda m: m.update(schema_version=[2]), r"schema version \[2\]; expected 1 or 2"),
        (lambda m: m.pop("options"), "no key 'options'"),
        (split(rows=12), "12 rows, 11 with masks; its shards hold 11"),
        (split(with_masks=12), "12 with masks"),
        (split(rows="many"), "split 'val': rows: 'many'; expected a whole number"),
        (split(left_out={"x": None}), "split 'val': left_out: x: None; expected a whole number"),
        (split(left_out=[1]), r"left_out: \[1\]; expected keys"),
        (split(shards=[None]), "shard 0: None; expected keys and values"),
        (shard(rows=-1), "shard 0: rows: -1; expected a whole number"),
        (shard(sha256=None), "sha256: None; expected a text"),
        (shard(file="../x.parquet"), "leads out of"),
        (shard(file="/etc/passwd"), "leads out of"),
        (shard(file="a/b.parquet"), "'a/b.parquet'; expected the name of a file in the folder itself"),
        (shard(file=7), "file: 7; expected a text"),
    ],
)
def test_a_manifest_that_was_edited_is_refused_in_one_line(copy: Path, change: Any, words: str) -> None:
    edit(copy, change)
    with pytest.raises(DataError, match=words) as caught:
        Manifest.load(copy)
    assert str(caught.value).startswith(str(copy / "manifest.json")) and str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["[" * 3000, "[]", "null", "\x00", '{"schema_version": 1e999}', '"x"', ""])
def test_what_is_no_manifest_is_refused_in_one_line(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    for action in (Manifest.load, verify):
        with pytest.raises(DataError, match=r"manifest\.json: ") as caught:
            action(copy)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 400


# ---- damaged pages ---------------------------------------------------------------------------------


def chunk(path: Path, column: str) -> Any:
    group = pq.read_metadata(path).row_group(0)
    return next(c for c in (group.column(k) for k in range(6)) if c.path_in_schema.startswith(column))


@pytest.mark.parametrize("column", ["id", "tags"])
def test_a_damaged_page_of_what_is_read_at_the_start_is_one_line(copy: Path, column: str) -> None:
    path = copy / SHARD
    start, good = chunk(path, column).data_page_offset, path.read_bytes()
    refused = 0
    for at in range(start, start + 40, 3):
        for value in (0, 127, 255):
            path.write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
            Manifest.load(copy)
            told = refusals_of_columns(copy)
            assert all(text.startswith(str(path)) for text in told)
            refused += bool(told)
    assert refused > 10


def refusals_of_columns(folder: Path) -> list[str]:
    from ugrl.data.shards import _column

    _column.cache_clear()  # the checksum in the manifest is still that of the whole shard
    told = []
    for read in (Manifest.ids, Manifest.tags):
        try:
            read(Manifest.load(folder), "val")
        except DataError as error:
            assert str(error).isprintable() and len(str(error)) < 400
            told.append(str(error))
    return told


HUGE = b"\x15\x00\x15\x20\x15\x20\x2c\x15\xfe\xff\xff\xff\x0f\x15\x00\x00\x00"  # 2³¹ - 1 values in a page


@pytest.mark.parametrize(
    "header",
    [HUGE, b"\x15" + b"\xff" * 100_000, b"\x1c" * 100_000, b"\x15\x00\x15\xff\xff\xff\xff\x0f"],
    ids=["values", "endless number", "nested", "size"],
)
def test_a_page_header_asks_for_no_more_than_its_chunk_has(header: bytes) -> None:
    with pytest.raises(UnsupportedLayout):
        value_spans(memoryview(header + bytes(64)), 0, 8, nullable=False)


def test_a_codec_that_nobody_knows_does_not_end_the_process(copy: Path) -> None:
    """The library's reader refuses it, its description of the footer aborts."""
    path = copy / SHARD
    good = path.read_bytes()
    at = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    codecs = [k for k in range(at, len(good) - 16) if good[k : k + 2] == b"\x15\x00" and b"image" in good[k - 8 : k]]
    assert codecs
    data = bytearray(good)
    for k in codecs:
        data[k + 1] = 2 * 19
    path.write_bytes(data)
    ids, tags, *rows = refusals(copy)
    assert not ids + tags and all(re.search("val-00000.parquet: row group . is unreadable", text) for text in rows)


def test_a_footer_that_leads_out_of_the_file_is_refused(copy: Path) -> None:
    """Bytes of the footer changed one by one: refused in one line, or the rows are still found."""
    path = copy / SHARD
    good = path.read_bytes()
    length = int.from_bytes(good[-8:-4], "little")
    rng, refused = np.random.default_rng(0), 0
    for at in rng.integers(len(good) - 8 - length, len(good), 300):
        path.write_bytes(good[:at] + bytes([int(rng.integers(0, 256))]) + good[at + 1 :])
        try:
            with open_shard(path, rows=11) as file:
                assert file.metadata.num_rows == 11
        except DataError as error:
            assert str(error).startswith(str(path)) and str(error).isprintable() and len(str(error)) < 400
            refused += 1
    assert refused > 50
