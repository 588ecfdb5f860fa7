"""Ray's workers with shards and run on a bucket: no folder that nodes share."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.raycluster import training_workers, when_saved
from tests.s3server import Server, bucket_server
from tests.small import TINY
from ugrl import config as configs
from ugrl.storage import place
from ugrl.train import checkpoint
from ugrl.train.loop import Trainer
from ugrl.train.run import ensure_shards

pytestmark = [pytest.mark.ray, pytest.mark.long]

pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with bucket_server() as made:
        yield made


def test_two_workers_on_a_bucket_of_which_one_is_killed_are_one_process_on_a_disk(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.capacity import capacity
    from cluster.connect import start_ray, stop_ray
    from cluster.launch import launch
    from cluster.preflight import check_store
    from ugrl.data.shards import Manifest

    monkeypatch.setenv("UGRL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("UGRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cfg = configs.load(
        "shapes",
        TINY
        | {"cluster.cpus_per_worker": 0.5, "cluster.data_cpus": 1, "train.steps": 10, "cluster.start_timeout_s": 300},
    )
    cfg = replace(cfg, data=replace(cfg.data, cache_dir=str(tmp_path / "copies"), cache_disk_mb=100))
    shards = ensure_shards(cfg, None)
    Trainer(cfg, shards=shards, out=tmp_path / "alone", quiet=True, device="cpu").fit()

    there = place(server.uri("bucket/job"))
    assert shards.local is not None
    (there / "shards").upload(shards.local, last="manifest.json")
    out = there / "runs" / "voc"
    try:
        start_ray(cpus=2)
        check_store(cfg, Manifest.load(there / "shards"), 2, capacity())
        killed: list[int] = []
        when_saved(out, 1, lambda: (killed.append(training_workers()[-1]), os.kill(killed[0], signal.SIGKILL)))
        metrics = launch(cfg, shards=there / "shards", out=out, workers=2, max_failures=3)
    finally:
        stop_ray()

    def losses(text: str) -> dict[int, float]:
        return {r["step"]: r["total"] for r in map(json.loads, text.splitlines()) if "total" in r}

    alone, pair = (
        losses((tmp_path / "alone" / "metrics.jsonl").read_text()),
        losses((out / "metrics.jsonl").read().decode()),
    )
    assert alone.keys() == pair.keys() and len(pair) == 10
    for step in alone:
        assert pair[step] == pytest.approx(alone[step], rel=1e-7)
    assert metrics["step"] == 10
    assert checkpoint.step_of(checkpoint.latest(out).name) == 10  # type: ignore[union-attr]
    assert killed and (out / "seen").names() == ["rank_00.jsonl", "rank_01.jsonl"]
    for name in (out / "seen").names():  # before the kill and after it, each step once
        records = [json.loads(text) for text in (out / "seen" / name).read().decode().splitlines()]
        assert [r["step"] for r in records if "step" in r] == list(range(1, 11)), name
    assert len(list((tmp_path / "copies").glob("*.parquet"))) >= 1
    left = set(out.names())
    assert left <= {"checkpoints", "config.yaml", "metrics.jsonl", "seen", "tb"}, left
