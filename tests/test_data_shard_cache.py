"""Copies of shards on a node, while other processes use the same folder."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ugrl.config import DataConfig
from ugrl.data.prepare import prepare
from ugrl.data.reader import ShardReader
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.data.shard_cache import ShardCache
from ugrl.data.shards import ShardInfo, sha256
from ugrl.errors import DataError
from ugrl.storage import Place, place

SIZE = 400_000


@pytest.fixture
def files(tmp_path: Path) -> list[tuple[Place, ShardInfo]]:
    made = []
    for k in range(4):
        file = tmp_path / f"s{k}"
        file.write_bytes(bytes([k]) * SIZE)
        made.append((place(file), ShardInfo(file.name, 1, SIZE, sha256(file))))
    return made


def test_a_copy_that_another_process_drops_at_this_moment_is_no_reason_to_stop(
    files: list[tuple[Place, ShardInfo]], tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "gone.parquet").symlink_to(tmp_path / "nowhere")  # listed, and not there once it is asked for its size
    cache = ShardCache(folder, 1)
    for k in (0, 1, 2, 3):
        copy = cache.file(*files[k])
        assert copy is not None and copy.read_bytes()[:1] == bytes([k])


@pytest.mark.parametrize("moment", ["before the fetch", "after the fetch"])
def test_a_folder_that_is_emptied_is_filled_again(
    files: list[tuple[Place, ShardInfo]], tmp_path: Path, moment: str
) -> None:
    class Emptied(ShardCache):
        left = 2

        def _fetch(self, there: Place, info: ShardInfo, copy: Path) -> None:
            if moment == "after the fetch":
                super()._fetch(there, info, copy)
            if self.left:
                self.left -= 1
                shutil.rmtree(self.folder)
            if moment == "before the fetch":
                super()._fetch(there, info, copy)

    cache = Emptied(tmp_path / "cache", 1)
    copy = cache.file(*files[1])
    assert copy is not None and copy.read_bytes()[:1] == b"\x01" and cache.left == 0


def test_many_readers_of_a_small_folder_all_keep_their_copies(
    files: list[tuple[Place, ShardInfo]], tmp_path: Path
) -> None:
    caches = [ShardCache(tmp_path / "cache", 1) for _ in range(6)]  # two of four files fit

    def use(n: int) -> list[bool]:
        order = random.Random(n)
        return [caches[n].file(*files[order.randrange(4)]) is not None for _ in range(15)]

    with ThreadPoolExecutor(6) as pool:
        assert all(kept for got in pool.map(use, range(6)) for kept in got)
    assert all(cache.file(*files[3]) is not None for cache in caches)
    assert list((tmp_path / "cache").glob("*.tmp")) == []


def test_a_place_that_takes_no_copies_is_told_once_and_left_alone(
    files: list[tuple[Place, ShardInfo]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = ShardCache(tmp_path / "file", 1)
    assert cache.file(*files[0]) is None and cache.file(*files[1]) is None
    assert len(caplog.messages) == 1 and "no copies of shards can be kept" in caplog.text


def test_a_copy_that_is_dropped_before_it_is_opened_is_read_from_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(ShapesSource(ShapesSpec(train=5, val=1, size=32)), tmp_path / "out", tune_val=0)
    there = place(f"mock://host/{tmp_path.name}")
    there.filesystem()[0].create_dir(there.filesystem()[1])
    for file in (tmp_path / "out").iterdir():
        (there / file.name).write(file.read_bytes())
    here = ShardReader(tmp_path / "out", "train")
    real = ShardCache.file

    def dropped(self: ShardCache, *args: object) -> Path | None:
        copy = real(self, *args)  # type: ignore[arg-type]
        assert copy is not None
        copy.unlink()
        return copy

    monkeypatch.setattr(ShardCache, "file", dropped)
    reader = ShardReader(there, "train", DataConfig(cache_dir=str(tmp_path / "cache"), cache_disk_mb=10))
    assert reader.rows(range(5)) == here.rows(range(5))
    monkeypatch.setattr(ShardCache, "file", lambda *_: tmp_path / "broken")
    (tmp_path / "broken").write_bytes(b"PAR1")  # one that is there and broken is told
    with pytest.raises(DataError, match="broken: not a readable shard"):
        ShardReader(there, "train", DataConfig(cache_dir=str(tmp_path / "cache"), cache_disk_mb=10))[0]
