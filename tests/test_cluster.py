"""The trainer on Ray Train fed by Ray Data, with real worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster import cli
from cluster.capacity import Capacity
from cluster.launch import launch
from tests.raycluster import check_same, training_workers, when_saved
from ugrl import config as configs
from ugrl.command import shipped
from ugrl.config import DataConfig
from ugrl.data.spec import LoaderSpec
from ugrl.errors import ConfigError
from ugrl.train import checkpoint
from ugrl.train.batches import local_loader
from ugrl.train.run import ensure_shards

TINY = {
    "data.crop": 32,
    "data.shapes.train": 40,
    "data.shapes.val": 6,
    "data.shapes.size": 32,
    "data.threads": 1,
    "train.steps": 24,
    "train.global_batch": 4,
    "train.lr_warmup_iters": 2,
    "train.cls_warmup_iters": 6,
    "train.eval_every": 24,
    "train.checkpoint_every": 6,
    "train.picture_every": 1000,
    "train.log_every": 4,
    "method.uncertainty.d_cls": 64,
    "method.contrast.d_seg": 32,
}


@pytest.fixture(scope="module")
def cfg() -> configs.Config:
    return configs.load("shapes", TINY)


@pytest.fixture(scope="module")
def shards(cfg: configs.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UGRL_DATA", str(tmp_path_factory.mktemp("data")))
        yield ensure_shards(cfg, None)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Capacity]:
    """A private cluster."""
    from cluster.connect import start_ray, stop_ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        yield start_ray(cpus=2)
        stop_ray()


def spec(cfg: configs.Config, shards: Path, rank: int, start: int) -> LoaderSpec:
    return LoaderSpec(
        shards=shards,
        split="train",
        num_classes=6,
        data=DataConfig(crop=32, threads=1, prefetch=2),
        seed=3,
        global_batch=6,
        rank=rank,
        world=2,
        start_step=start,
        total_steps=30,  # several epochs
    )


@pytest.mark.ray
def test_batches_of_ray_data_are_those_of_the_local_loader(
    cfg: configs.Config, shards: Path, cluster: Capacity
) -> None:
    from cluster.ray_data import ray_loader

    for rank, start in ((0, 0), (1, 13)):
        asked = spec(cfg, shards, rank, start)
        local = local_loader(asked)
        steps = 0
        for ray_batch in ray_loader(asked):
            batch = next(local)
            assert ray_batch.ids == batch.ids
            for name in ("images_B3HW", "tags_BF", "boxes_B4", "masks_BHW", "pairs_P2"):
                assert torch.equal(getattr(ray_batch, name), getattr(batch, name)), name
            steps += 1
        assert steps == 30 - start


@pytest.mark.ray
def test_what_the_workers_of_a_killed_run_hold_is_given_back(cluster: Capacity, tmp_path: Path) -> None:
    import ray
    from ray.util.placement_group import placement_group, placement_group_table

    from cluster.placement_groups import PLACEMENT, free_placement

    group = placement_group([{"CPU": 0.5}] * 2)
    ray.get(group.ready())
    (tmp_path / PLACEMENT).write_text(group.id.hex())
    free_placement(tmp_path)
    deadline = time.monotonic() + 300
    while placement_group_table(group)["state"] != "REMOVED" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert placement_group_table(group)["state"] == "REMOVED"
    free_placement(tmp_path)  # a run that gave everything back itself


@pytest.mark.ray
def test_two_workers_of_which_one_is_killed_train_like_one_process(
    small: configs.Config, small_shards: Path, alone: Path, cluster: Capacity, tmp_path: Path
) -> None:
    out, killed = tmp_path / "run", []
    halves = replace(
        small,
        cluster=replace(small.cluster, cpus_per_worker=0.5, start_timeout_s=300),
        train=replace(small.train, checkpoint_every=1),  # gives the killer its time
    )

    def kill() -> None:
        os.kill(training_workers()[-1], signal.SIGKILL)
        killed.append(True)

    killer = when_saved(out, 1, kill)
    metrics = launch(halves, shards=small_shards, out=out, workers=2)
    killer.join()
    assert killed and metrics["step"] == 20
    check_same(out, alone)
    with pytest.raises(ConfigError, match=r"train.global_batch is 6; expected a multiple of the 4 workers"):
        launch(small, shards=small_shards, out=tmp_path / "refused", workers=4)


def test_one_process_never_imports_ray(shards: Path, tmp_path: Path) -> None:
    words = [f"{k}={v}" for k, v in (TINY | {"train.steps": 7, "train.eval_every": 7}).items()]
    code = (
        "import sys; from cluster.cli import main; code = main(sys.argv[1:]);"
        "assert not any(m == 'ray' or m.startswith('ray.') for m in sys.modules); sys.exit(code)"
    )
    args = ["--config", "shapes", "--data", str(shards), "--out", str(tmp_path / "run"), "--quiet", *words]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert checkpoint.read_state(checkpoint.find(tmp_path / "run")).step == 7
    assert f"run: {tmp_path / 'run'}" in done.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--config", "shaeps"], "did you mean 'shapes'?"),
        (["train.stpes=3"], "unknown config key 'train.stpes'; did you mean 'train.steps'?"),
        (["method.contrast.keep=1.5"], "config key 'method.contrast.keep' is 1.5; expected > 0 and ≤ 1"),
        (["--workers", "0"], "--workers is 0; expected at least 1"),
        (["--workers", "2", "--config", "voc"], "no shards"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert cli.main(["--workers", "2", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_bare_command_names_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Shipped configurations: {', '.join(shipped('ugrl.configs'))}." in shown and "own, own-gpu" in shown
