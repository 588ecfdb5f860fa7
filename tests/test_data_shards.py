from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.loaders import local
from ugrl.data.order import batch_rows, epoch_order, steps_per_epoch
from ugrl.data.prepare import JOURNAL, hold_out, prepare, write_shard
from ugrl.data.reader import ShardReader
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.data.shards import Manifest, ShardInfo, open_shard, verify, write_rows
from ugrl.data.source import RowError, make_row
from ugrl.errors import BusyError, DataError

SPEC = ShapesSpec(train=30, val=9, size=32)


class Broken(ShapesSource):
    """Shapes whose images of some ids end too early."""

    def __init__(self, spec: ShapesSpec, *ids: str) -> None:
        super().__init__(spec)
        self.ids = set(ids)

    def row(self, split, id):
        row = super().row(split, id)
        if id not in self.ids:
            return row
        return make_row(id=id, image=row.image[:-40], tags=row.tags, mask=row.mask, num_classes=6, where=f"{id}.jpg")


@dataclass
class Listed:
    """A source with given ids and nothing behind them."""

    ids: dict
    known: dict | None = None
    name = "listed"
    class_names = ("a", "b")
    root = None
    options = {}
    left_out = {}

    def splits(self):
        return self.ids

    def tags(self, split, id):
        return (self.known or {}).get(id)

    def row(self, split, id):
        raise RowError(f"{id}: nothing")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(ShapesSource(SPEC), out, tune_val=0.2, shard_rows=5)
    return out


def test_the_folder_and_its_manifest(whole):
    manifest = Manifest.load(whole)
    assert {n: s.rows for n, s in manifest.splits.items()} == {"train": 24, "tune_val": 6, "val": 9}
    assert [s.file for s in manifest.splits["val"].shards] == ["val-00000.parquet", "val-00001.parquet"]
    assert manifest.num_classes == 6 and manifest.source == "shapes" and manifest.options["size"] == 32
    assert set(contents(whole)) == {"manifest.json"} | {s.file for i in manifest.splits.values() for s in i.shards}
    assert verify(whole) == manifest
    assert not whole.with_name("out.partial").exists()


def test_a_shard_holds_the_source_rows_bytes_untouched(whole):
    table = pq.read_table(whole / "val-00000.parquet")
    assert table.column_names == ["id", "image", "width", "height", "tags", "mask"]
    source = ShapesSource(SPEC)
    expected = source.row("val", "val_000002")
    row = table.slice(2, 1).to_pylist()[0]
    assert (row["id"], row["image"], row["mask"]) == (expected.id, expected.image, expected.mask)
    assert (row["width"], row["height"], tuple(row["tags"])) == (32, 32, expected.tags)


def test_train_and_tune_val_share_the_source_train_split_and_val_is_untouched(whole):
    manifest = Manifest.load(whole)
    train, held = manifest.ids("train"), manifest.ids("tune_val")
    assert sorted(train + held) == [f"train_{i:06d}" for i in range(30)]
    assert list(train) == sorted(train) and list(held) == sorted(held)
    assert manifest.ids("val") == tuple(f"val_{i:06d}" for i in range(9))


def test_the_held_out_choice_is_stratified_and_seeded():
    ids = [f"i{k}" for k in range(1000)]
    tags = {id: (1, 2) if k < 40 else (1,) if k < 700 else () for k, id in enumerate(ids)}
    held = hold_out(ids, tags.get, 0.1, seed=0)
    assert len(held) == 100
    assert sum(2 in tags[id] for id in held) == pytest.approx(4, abs=1)
    assert sum(not tags[id] for id in held) == pytest.approx(30, abs=1)
    assert held == hold_out(ids[::-1], tags.get, 0.1, seed=0) != hold_out(ids, tags.get, 0.1, seed=1)
    assert len(hold_out(ids, lambda id: None, 7, seed=0)) == 7


@pytest.mark.parametrize("share", [1000, 0.0001, -0.5])
def test_holding_out_all_or_nothing_is_refused(share):
    with pytest.raises(DataError, match="tune_val .* of 30 training rows leaves .* expected both above 0"):
        hold_out([str(i) for i in range(30)], lambda id: None, share, seed=0)


def test_without_tune_val_there_is_no_such_split(tmp_path):
    assert set(prepare(ShapesSource(SPEC), tmp_path / "out", tune_val=0).splits) == {"train", "val"}


# ---- interruptions ---------------------------------------------------------------------------------

CHILD = """
import sys
from ugrl.data.prepare import prepare
from ugrl.data.shapes import ShapesSource, ShapesSpec
import time
class Slow(ShapesSource):
    def row(self, split, id):
        time.sleep(0.05)
        return super().row(split, id)
prepare(Slow(ShapesSpec(train=30, val=9, size=32)), sys.argv[1], tune_val=0.2, shard_rows=5)
"""


def test_killed_from_outside_it_goes_on_and_ends_with_the_same_bytes(whole, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(out)], cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 60
    while not list(partial.glob("train-00001.parquet")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(DataError, match=r"not there yet, but out\.partial is; run 'ugrl prepare' again"):
        Manifest.load(out)
    with pytest.raises(DataError, match="unfinished"):
        Manifest.load(partial)

    read = []

    class Counting(ShapesSource):
        def row(self, split, id):
            read.append(id)
            return super().row(split, id)

    prepare(Counting(SPEC), out, tune_val=0.2, shard_rows=5)
    assert len(read) <= 39 - 5  # finished shards are not read again
    assert contents(out) == contents(whole) and not partial.exists()


@pytest.mark.parametrize("moment", ["replace 1", "replace 2", "replace 3", "replace 5", "last replace", "unlink"])
def test_killed_at_any_rename_it_ends_with_the_same_bytes(whole, tmp_path, moment):
    out = tmp_path / "out"
    pid = os.fork()
    if pid == 0:  # the child dies by SIGKILL at the moment under test, or exits with 1
        try:
            replace_file, unlink, count = os.replace, Path.unlink, 0

            def dying_replace(a, b):
                nonlocal count
                count += 1
                if moment == f"replace {count}" or (moment == "last replace" and Path(b) == out):
                    os.kill(os.getpid(), signal.SIGKILL)
                replace_file(a, b)

            def dying_unlink(self, missing_ok=False):
                if moment == "unlink" and self.name == JOURNAL:
                    os.kill(os.getpid(), signal.SIGKILL)
                unlink(self, missing_ok=missing_ok)

            os.replace, Path.unlink = dying_replace, dying_unlink
            prepare(ShapesSource(SPEC), out, tune_val=0.2, shard_rows=5)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    if moment == "unlink":  # the folder has its name already: it is complete
        Manifest.load(out)
    else:
        assert not out.exists()
        prepare(ShapesSource(SPEC), out, tune_val=0.2, shard_rows=5)
    assert {n: b for n, b in contents(out).items() if n != JOURNAL} == contents(whole)


def begin(tmp_path, **options):
    """Leave an unfinished folder: the second shard's second row is broken."""
    source = Broken(SPEC, "train_000010")
    with pytest.raises(DataError) as caught:
        prepare(source, tmp_path / "out", **{"tune_val": 0, "shard_rows": 5, **options})
    return str(caught.value)


def test_under_raise_a_truncated_image_is_named_and_out_does_not_exist(tmp_path):
    message = begin(tmp_path)
    assert re.match(r"train_000010\.jpg: truncated image \(\d+ bytes\) \(2 of 8 shards stay in ", message)
    assert message.endswith("run again or with --on-error skip to go on from there)") and "\n" not in message
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in (tmp_path / "out.partial").iterdir()) == [
        "journal.json",
        "train-00000.parquet",
        "train-00001.parquet",
    ]


def test_nothing_is_left_where_the_first_shard_fails(tmp_path):
    with pytest.raises(DataError, match="^train_000001.jpg: truncated image"):
        prepare(Broken(SPEC, "train_000001"), tmp_path / "out", tune_val=0)
    assert list(tmp_path.iterdir()) == []


def test_under_skip_it_is_left_out_and_counted(tmp_path):
    source = Broken(SPEC, "train_000010", "val_000000")
    straight = prepare(source, tmp_path / "a", tune_val=0, shard_rows=5, on_error="skip")
    assert straight.splits["train"].left_out == {"unreadable image": 1} == straight.splits["val"].left_out
    assert straight.rows("train") == 29 and "train_000010" not in straight.ids("train")
    with pytest.raises(DataError):
        prepare(source, tmp_path / "b", tune_val=0, shard_rows=5)
    prepare(source, tmp_path / "b", tune_val=0, shard_rows=5, on_error="skip")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shard_rows": 6}, "begun with shard_rows 5, now 6; use the same options"),
        ({"seed": 1}, "begun with seed 0, now 1"),
        ({"tune_val": 0.5}, "begun with tune_val 0, now 0.5"),
    ],
)
def test_going_on_with_other_options_is_refused(tmp_path, options, words):
    begin(tmp_path)
    before = contents(tmp_path / "out.partial")
    with pytest.raises(DataError, match=words):
        prepare(ShapesSource(SPEC), tmp_path / "out", **{"tune_val": 0, "shard_rows": 5, **options})
    assert contents(tmp_path / "out.partial") == before


def test_going_on_with_another_source_is_refused(tmp_path):
    begin(tmp_path)
    with pytest.raises(DataError, match=r"begun with source\.difficulty 0\.5, now 0\.9"):
        prepare(ShapesSource(replace(SPEC, difficulty=0.9)), tmp_path / "out", tune_val=0, shard_rows=5)


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"holds 'thesis\.tex' but no journal"):
        prepare(ShapesSource(SPEC), tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.tex").exists()


def test_an_existing_out_is_refused(whole, tmp_path):
    before = contents(whole)
    with pytest.raises(DataError, match=r"exists already \(a prepared data set\); choose another name"):
        prepare(ShapesSource(SPEC), whole)
    with pytest.raises(DataError, match=r"exists already \(something else\)"):
        prepare(ShapesSource(SPEC), tmp_path)
    assert contents(whole) == before


def test_two_writers_of_one_folder_are_refused(tmp_path):
    class Nested(ShapesSource):
        def row(self, split, id):
            prepare(ShapesSource(SPEC), tmp_path / "out")
            raise AssertionError("the second writer was let in")

    with pytest.raises(DataError, match="another process is writing it"):
        prepare(Nested(SPEC), tmp_path / "out")


def test_a_folder_that_another_process_has_just_made_is_left_as_it_is(tmp_path, monkeypatch):
    from ugrl.data import prepare as module

    made = tmp_path / "out"
    lock = module._locked

    def late(folder):
        monkeypatch.setattr(module, "_locked", lock)
        (tmp_path / "elsewhere").mkdir()
        prepare(ShapesSource(SPEC), tmp_path / "elsewhere" / "out")
        os.replace(tmp_path / "elsewhere" / "out", made)
        return lock(folder)

    monkeypatch.setattr(module, "_locked", late)
    with pytest.raises(BusyError, match="another process has just made it"):
        prepare(ShapesSource(SPEC), made)
    assert len(Manifest.load(made).ids("val")) == 9 and not (tmp_path / "out.partial").exists()


def _generate(root: str) -> None:
    from ugrl.config import load
    from ugrl.train.run import ensure_shards

    os.environ["UGRL_DATA"] = root
    cfg = load("shapes", {"data.shapes.train": 300, "data.shapes.val": 30, "data.shapes.size": 32})
    Manifest.load(ensure_shards(cfg, None))


def test_runs_that_start_together_generate_their_images_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    runs = [context.Process(target=_generate, args=(str(tmp_path),)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0] * 4
    assert len(list(tmp_path.iterdir())) == 1


def test_empty_splits_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"^source 'listed': split 'val' is empty$"):
        prepare(Listed({"train": ["a", "b"], "val": []}), tmp_path / "out")
    with pytest.raises(DataError, match=r"split 'train' is empty: every row was left out \(2 × unreadable image\)"):
        prepare(Listed({"train": ["a", "b"]}), tmp_path / "out", tune_val=0, on_error="skip")
    with pytest.raises(DataError, match="id 'a' appears twice, in 'train' and in 'val'"):
        prepare(Listed({"train": ["a"], "val": ["a"]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_may_be_written_elsewhere_and_in_any_order(whole, tmp_path):
    def backwards(write, source, jobs, folder, on_error):
        assert write is write_shard
        with ThreadPoolExecutor(2) as pool:
            yield from pool.map(lambda job: write(source, job, folder, on_error), reversed(jobs))

    prepare(ShapesSource(SPEC), tmp_path / "out", tune_val=0.2, shard_rows=5, shard_map=backwards)
    assert contents(tmp_path / "out") == contents(whole)


# ---- manifests and readers -------------------------------------------------------------------------


@pytest.fixture
def copy(whole, tmp_path):
    for name, data in contents(whole).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_manifest_of_another_version_is_refused(copy):
    edit(copy, schema_version=3)
    with pytest.raises(DataError, match="manifest.json: schema version 3; expected 1 or 2: run 'ugrl prepare' again"):
        Manifest.load(copy)


def test_a_shard_of_another_version_is_refused(copy):
    path = copy / "train-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"ugrl.schema_version": b"7"}), path)
    with pytest.raises(DataError, match=r"train-00000\.parquet: shard of schema version 7; expected 1 or 2"):
        open_shard(path)
    pq.write_table(table.replace_schema_metadata({}), path)
    with pytest.raises(DataError, match="shard of schema version none; expected 1 or 2"):
        open_shard(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / "val-00001.parquet").unlink(), r"val-00001\.parquet: missing shard of split 'val'.*4 rows"),
        (lambda d: (d / "val-00001.parquet").write_bytes(b"PAR1"), r"val-00001\.parquet: 4 bytes; the manifest"),
        (lambda d: (d / "manifest.json").write_text("{"), r"manifest\.json: broken JSON at line 1"),
        (lambda d: (d / "manifest.json").unlink(), "no manifest.json; expected a folder written by 'ugrl prepare'"),
        (lambda d: edit(d, splits={"train": {}}), "manifest.json: split 'train': no key 'shards'"),
    ],
)
def test_broken_folders_are_named(copy, spoil, words):
    spoil(copy)
    with pytest.raises(DataError, match=words):
        Manifest.load(copy)


def test_verify_finds_a_flipped_bit(copy):
    path = copy / "train-00002.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    Manifest.load(copy)
    with pytest.raises(DataError, match=r"train-00002\.parquet: checksum .*; the manifest expects"):
        verify(copy)


def test_an_unknown_split_names_the_nearest(whole):
    with pytest.raises(DataError, match="no split 'tune'; did you mean 'tune_val'"):
        ShardReader(whole, "tune")


def test_random_access_equals_reading_in_order(tmp_path):
    source = ShapesSource(ShapesSpec(train=45, val=1, size=32))  # several row groups a shard, and a rest
    reader = ShardReader(prepare(source, tmp_path / "out", tune_val=0, shard_rows=20), "train")
    assert len(reader) == 45 and reader.has_masks and len(reader.manifest.paths("train")) == 3
    expected = [source.row("train", id) for id in source.splits()["train"]]
    assert reader.rows(range(45)) == expected and list(reader.ids) == [r.id for r in expected]
    assert reader.manifest.tags("train") == tuple(r.tags for r in expected)
    order = np.random.default_rng(0).permutation(45)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(reader.__getitem__, order)) == [expected[i] for i in order]
    for index in (-1, 45):
        with pytest.raises(IndexError):
            reader[index]


def test_memory_is_bounded_by_a_row_group(tmp_path):
    source = ShapesSource(SPEC)
    alive = peak = 0

    class Token(bytes):
        def __new__(cls, data):
            nonlocal alive, peak
            alive += 1
            peak = max(peak, alive)
            return super().__new__(cls, data)

        def __del__(self):
            nonlocal alive
            alive -= 1

    template = source.row("val", "val_000000")
    write_rows(tmp_path / "s", (replace(template, id=str(i), image=Token(template.image)) for i in range(100)))
    assert pq.ParquetFile(tmp_path / "s").metadata.num_rows == 100
    assert 8 <= peak <= 17


def test_the_manifest_is_the_same_wherever_it_lies(whole, copy):
    assert Manifest.load(whole).to_json() == Manifest.load(copy).to_json()
    assert Manifest.load(whole).fingerprint() == Manifest.load(copy).fingerprint()
    one = Manifest.load(copy)
    split = replace(one.splits["val"], shards=(ShardInfo("val-00000.parquet", 9, 1, "0" * 64),))
    assert replace(one, splits={**one.splits, "val": split}).fingerprint() != one.fingerprint()


# ---- order and loader ------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation_that_changes_with_seed_and_epoch(whole):
    manifest = Manifest.load(whole)
    orders = [epoch_order(s, e, manifest).tolist() for s in (0, 1) for e in (0, 1)]
    assert all(sorted(o) == list(range(24)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4
    assert epoch_order(0, 0, manifest).tolist() == orders[0]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_out_each_global_batch(whole, world):
    manifest = Manifest.load(whole)
    per_epoch = steps_per_epoch(24, 8)
    for step in range(2 * per_epoch):
        parts = [batch_rows(step, seed=5, manifest=manifest, global_batch=8, rank=r, world=world) for r in range(world)]
        epoch, at = divmod(step, per_epoch)
        assert {e for e, _ in parts} == {epoch}
        together = np.concatenate([rows for _, rows in parts])
        np.testing.assert_array_equal(together, epoch_order(5, epoch, manifest)[at * 8 : at * 8 + 8])


def test_batches_that_cannot_be_are_refused(whole):
    manifest = Manifest.load(whole)
    with pytest.raises(DataError, match="global batch 8 does not divide by 3 ranks"):
        batch_rows(0, seed=0, manifest=manifest, global_batch=8, rank=0, world=3)
    with pytest.raises(DataError, match="24 training rows do not fill one global batch of 32"):
        batch_rows(0, seed=0, manifest=manifest, global_batch=32)
    with pytest.raises(DataError, match="24 training rows do not fill one global batch of 25"):
        local(ShardReader(manifest, "train"), 32, 6, seed=0, global_batch=25)


def samples(folder, *, steps=5, start=0, world=1, **options):
    """(step, id) → image, tags, mask and box, over all ranks."""
    out = {}
    for rank in range(world):
        reader = ShardReader(folder, "train")
        with local(
            reader, 40, 6, seed=2, global_batch=6, rank=rank, world=world, start_step=start, **options
        ) as loader:
            for step, batch in zip(range(start, steps), loader, strict=False):
                assert len(batch.ids) == 6 // world
                for b, id in enumerate(batch.ids):
                    parts = (batch.images_B3HW, batch.tags_BF, batch.masks_BHW, batch.boxes_B4)
                    out[step, id] = b"".join(p[b].numpy().tobytes() for p in parts)
    return out


def test_every_loader_sees_the_same_crops(whole):
    expected = samples(whole, threads=0)
    assert len(expected) == 30 and len(set(expected.values())) == 30
    assert samples(whole, threads=2, prefetch=3) == expected
    assert samples(whole, threads=2, prefetch=1, world=2) == expected
    assert samples(whole, threads=0, world=3) == expected


def test_a_start_in_the_middle_of_an_epoch_sees_what_follows(whole):
    expected = {k: v for k, v in samples(whole, threads=0, steps=7).items() if k[0] >= 3}
    assert samples(whole, threads=2, steps=7, start=3) == expected


def test_a_row_that_broke_after_preparation_reaches_the_consumer(tmp_path):
    source = ShapesSource(ShapesSpec(train=8, val=1, size=32))
    manifest = prepare(source, tmp_path / "out", tune_val=0)
    rows = [source.row("train", id) for id in source.splits()["train"]]
    rows[3] = replace(rows[3], image=rows[3].image[:-50])
    write_rows(tmp_path / "out" / "train-00000.parquet", iter(rows))
    for threads in (0, 2):
        reader = ShardReader(manifest, "train")
        with local(reader, 32, 6, seed=0, global_batch=8, threads=threads) as loader:
            words = r"train-00000\.parquet: row train_000003: truncated image \(\d+ bytes\)$"
            with pytest.raises(DataError, match=words):
                next(loader)


def test_shards_without_masks_give_batches_without_masks(tmp_path):
    class Tagged(ShapesSource):
        def row(self, split, id):
            return replace(super().row(split, id), mask=None)

    manifest = prepare(Tagged(SPEC), tmp_path / "out")
    reader = ShardReader(manifest, "train")
    assert not reader.has_masks and manifest.splits["train"].with_masks == 0 and reader[0].mask is None
    with local(reader, 32, 6, seed=0, global_batch=2, threads=0) as loader:
        assert next(loader).masks_BHW is None
