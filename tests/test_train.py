"""The loop on real shards: two ranks are one rank, and a resumed process is an uninterrupted one."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.tiny import tiny_tree
from ugrl.config import build
from ugrl.data.prepare import prepare
from ugrl.data.reader import ShardReader
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.data.source import open_source
from ugrl.errors import CheckpointError, ConfigError
from ugrl.model.noise import sample_noise
from ugrl.predict.forward import How, segment
from ugrl.train import checkpoint
from ugrl.train.loop import Trainer
from ugrl.train.restore import restore
from ugrl.train.run import plan_run

RANK = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
torch.set_num_threads(1)
from ugrl.config import build
from tests.ranks import leave
from ugrl.train.loop import Trainer
tree, shards, out = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
world = int(os.environ.get("WORLD_SIZE", "1"))
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=int(os.environ["RANK"]), world_size=world)
resume = Path(sys.argv[4]) if len(sys.argv) > 4 else None
dtype = getattr(torch, os.environ.get("DTYPE", "float64"))
Trainer(build(tree), shards=shards, out=out, quiet=True, device="cpu", dtype=dtype, resume_from=resume).fit()
if world > 1:
    leave()
"""


def run(
    tree: dict, shards: Path, out: Path, world: int = 1, resume: Path | None = None, dtype: str = "float64"
) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "DTYPE": dtype}
    argv = [sys.executable, "-c", textwrap.dedent(RANK), json.dumps(tree), str(shards), str(out)]
    argv += [str(resume)] if resume else []
    root = Path(__file__).parents[1]
    ranks = [subprocess.Popen(argv, env={**env, "RANK": str(r)}, cwd=root) for r in range(world)]
    assert [p.wait(timeout=300) for p in ranks] == [0] * world


def losses(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(s) for s in (out / "metrics.jsonl").read_text().splitlines()]
    timing = ("images_per_s", "step_s", "data_wait", "device_memory_mb")
    return [{k: v for k, v in line.items() if k not in timing} for line in lines]


def close(a: dict, b: dict, rel: float, floor: float) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == pytest.approx(b[key], rel=rel, abs=floor), key


@pytest.mark.parametrize("setting, share", [("IV", "exact"), ("IV", "always"), ("Base", "exact"), ("Full", "exact")])
def test_two_ranks_are_one_rank(setting: str, share: str, shards: Path, tmp_path: Path) -> None:
    """Losses, prototypes and weights after several steps, drop-path, dropout and batch norm included."""
    tree = tiny_tree(steps=5)
    tree["method"]["setting"] = setting
    tree["method"]["cam"]["share"] = share
    tree["method"]["contrast"]["scope"] = "batch" if setting == "IV" else "image"
    run(tree, shards, tmp_path / "one")
    run(tree, shards, tmp_path / "two", world=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6  # five steps and the validation at the end
    for a, b in zip(one, two, strict=True):
        close(a, b, rel=1e-8, floor=1e-12)
    if setting == "IV":
        assert {"cls", "seg", "ucl", "aux", "total"} <= one[3].keys()
        assert all(one[3][k] > 0 for k in ("cls", "seg", "ucl", "aux"))
    if setting == "Full":
        assert all(line["seg"] > 0 and "aux" not in line for line in one[:5])
    for part in ("model", "prototypes"):
        a = load_file(checkpoint.find(tmp_path / "one") / f"{part}.safetensors")
        b = load_file(checkpoint.find(tmp_path / "two") / f"{part}.safetensors")
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-8, atol=1e-11)


def test_a_resumed_process_is_an_uninterrupted_one(shards: Path, tmp_path: Path) -> None:
    """Stopped after step 3 of 7: in the middle of an epoch of five steps and after the warm-up."""
    tree = tiny_tree(steps=7, checkpoint_every=3, keep_checkpoints=9)
    run(tree, shards, tmp_path / "whole", dtype="float32")
    start = tmp_path / "whole" / "checkpoints" / "step_00000003"
    run(tree, shards, tmp_path / "rest", resume=start, dtype="float32")
    whole, rest = losses(tmp_path / "whole"), losses(tmp_path / "rest")
    assert [line["step"] for line in rest] == [4, 5, 6, 7, 7]
    for a, b in zip(whole[3:], rest, strict=True):
        close(a, b, rel=1e-6, floor=1e-9)
    a = load_file(tmp_path / "whole/checkpoints/step_00000007/model.safetensors")
    b = load_file(tmp_path / "rest/checkpoints/step_00000007/model.safetensors")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-8)


def test_the_schedule_of_the_losses(shards: Path, tmp_path: Path) -> None:
    """Warm-up: classification alone, while prototypes are collected. Afterwards: what the setting names."""
    tree = tiny_tree(steps=3, cls_warmup_iters=2, lr_warmup_iters=1)
    expected = {"Base": {"cls", "seg", "aux"}, "II": {"cls", "seg", "aux"}, "III": {"cls", "seg", "ucl", "aux"}}
    for setting, terms in expected.items():
        tree["method"]["setting"] = setting
        trainer = Trainer(build(tree), shards=shards, out=tmp_path / setting, quiet=True, device="cpu")
        before = trainer.net.decoder.classify.weight.detach().clone()
        trainer.fit()
        lines = losses(tmp_path / setting)
        names = {"cls", "seg", "ucl", "aux"}
        assert names & lines[0].keys() == names & lines[1].keys() == {"cls"}
        assert names & lines[2].keys() == terms
        assert ("stat/share_cls" in lines[2]) == (setting != "Base")
        assert ("stat/share_seg" in lines[2]) == (setting == "II")
        assert int(trainer.prototypes.counts_C[0]) == 3, "background votes in every step, warm-up included"
        assert not torch.equal(before, trainer.net.decoder.classify.weight)


def test_best_is_kept_and_old_ones_go(shards: Path, tmp_path: Path) -> None:
    tree = tiny_tree(steps=6, eval_every=1, keep_checkpoints=1)
    out = tmp_path / "run"
    metrics = Trainer(build(tree), shards=shards, out=out, quiet=True, device="cpu").fit()
    assert metrics["step"] == 6
    best = json.loads((out / "checkpoints/best.json").read_text())
    values = {line["step"]: line["val/seg_miou"] for line in losses(out) if "val/seg_miou" in line}
    assert best["value"] == max(values.values())
    assert best["objective"] == "seg_miou"
    kept = {p.name for p in (out / "checkpoints").iterdir() if p.is_dir()}
    assert kept == {"step_00000006", best["checkpoint"]}
    got = restore(out, device=torch.device("cpu"))
    assert got.step == 6
    assert restore(out, device=torch.device("cpu"), best=True).step == int(best["checkpoint"][-8:])


def test_plan_refuses_before_anything_starts(shards: Path, tmp_path: Path) -> None:
    cfg = build(tiny_tree())
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "x").touch()
    with pytest.raises(ConfigError, match="run 'taken' exists already"):
        plan_run(cfg, data=shards, out=taken, resume=False)
    with pytest.raises(ConfigError, match=r"expected one of|did you mean"):
        plan_run(
            build({**tiny_tree(), "eval": {"objective": "seg_mio"}}), data=shards, out=tmp_path / "a", resume=False
        )
    with pytest.raises(ConfigError, match="no shards: name a prepared folder"):
        plan_run(cfg, data=None, out=tmp_path / "a", resume=False)
    assert not (tmp_path / "a").exists()
    Trainer(cfg, shards=shards, out=taken, quiet=True, device="cpu").fit()
    with pytest.raises(ConfigError, match=r"was started with train\.lr=0\.0006, not 0\.1"):
        plan_run(build(tiny_tree(lr=0.1)), data=shards, out=taken, resume=True)
    plan = plan_run(build(tiny_tree(log_every=5)), data=shards, out=taken, resume=True)
    assert plan.checkpoint is not None and plan.checkpoint.name == "step_00000006"


def test_broken_checkpoints_are_named(shards: Path, tmp_path: Path) -> None:
    cfg = build(tiny_tree(steps=1, cls_warmup_iters=0, lr_warmup_iters=0))
    Trainer(cfg, shards=shards, out=tmp_path / "run", quiet=True, device="cpu").fit()
    folder = checkpoint.find(tmp_path / "run")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        restore(tmp_path / "run", device=torch.device("cpu"))
    weights.write_bytes(whole)
    wide = tiny_tree(steps=1, cls_warmup_iters=0, lr_warmup_iters=0)
    wide["model"]["decoder_dim"] = 32
    with pytest.raises(CheckpointError, match="has shape"):
        Trainer(build(wide), shards=shards, out=None, resume_from=folder, quiet=True, device="cpu")
    (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json: broken JSON at line 1"):
        restore(folder, device=torch.device("cpu"))
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        restore(tmp_path / "nothing", device=torch.device("cpu"))


def test_tags_without_masks_are_enough(tmp_path: Path) -> None:
    """An engineer with tags and no masks trains, is judged by tags, and is told what the shards cannot supply."""
    root = tmp_path / "own"
    (root / "images").mkdir(parents=True)
    source = ShapesSource(ShapesSpec(train=12, val=6, size=48, seed=5))
    lines = ["file,split,tags"]
    for split, ids in source.splits().items():
        for name in ids:
            row = source.row(split, name)
            (root / "images" / f"{name}.jpg").write_bytes(row.image)
            lines.append(f"{name}.jpg,{split},{';'.join(source.class_names[t - 1] for t in row.tags)}")
    (root / "tags.csv").write_text("\n".join(lines) + "\n")
    shards = tmp_path / "shards"
    prepare(open_source("folder", root), shards, tune_val=0.2, seed=0, progress=False)

    plan = plan_run(build(tiny_tree(steps=3)), data=shards, out=tmp_path / "run", resume=False)
    metrics = Trainer(plan.cfg, shards=plan.shards, out=plan.out, quiet=True, device="cpu").fit()
    assert {"tag_map", "tag_f1"} <= metrics.keys()
    assert not {"seg_miou", "cam_miou"} & metrics.keys()
    assert json.loads((tmp_path / "run/checkpoints/best.json").read_text())["objective"] == "tag_map"
    wanted = build({**tiny_tree(), "eval": {"objective": "seg_miou"}})
    with pytest.raises(ConfigError, match="'seg_miou': split 'val' has no masks; it can supply tag_map, tag_f1"):
        plan_run(wanted, data=shards, out=tmp_path / "other", resume=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(number: signal.Signals, shards: Path, tmp_path: Path) -> None:
    """`ugrl-train` itself, stopped in the middle and started again with --resume."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_tree(steps=30, checkpoint_every=4)))
    words = [sys.executable, "-m", "cluster.cli", "--config", str(config), "--data", str(shards), "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*words, "--out", str(tmp_path / "whole")], check=True, env=env, capture_output=True)

    out = tmp_path / "cut"
    started = subprocess.Popen([*words, "--out", str(out)], env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints/step_00000008").is_dir():
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(number)
    err = started.communicate(timeout=60)[1]
    assert started.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    for word in ("stopping after a checkpoint", "continue with: ugrl-train"):
        assert (word in err) == (number == signal.SIGINT)
    assert losses(out)[-1]["step"] < 30

    again = subprocess.run([*words, "--out", str(out)], env=env, capture_output=True, text=True)
    assert again.returncode == 2
    assert "run 'cut' exists already" in again.stderr
    own = [sys.executable, "-m", "cluster.cli", "--out", str(out), "--resume", "--device", "cpu"]
    subprocess.run(own, check=True, env=env, capture_output=True)  # configuration and shards are the run's own
    whole, cut = losses(tmp_path / "whole"), losses(out)
    assert [line["step"] for line in cut] == [line["step"] for line in whole]
    for a, b in zip(whole, cut, strict=True):
        close(a, b, rel=1e-5, floor=1e-7)


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, config={}, class_names=(), metrics={}, parts={"model": {"x": torch.ones(1)}})
    checkpoint.write_json(tmp_path / "best.json", {"checkpoint": "step_00000002", "value": 1.0})
    checkpoint.prune(tmp_path, keep=1)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"step_00000002", "step_00000004"}


@pytest.mark.parametrize("scales, mirror, encoder_passes", [((1.0,), False, 4), ((0.5, 1.0, 1.5), True, 6)])
def test_validation_counts_what_the_network_predicts(
    scales: tuple[float, ...], mirror: bool, encoder_passes: int, shards: Path
) -> None:
    """mIoU of one pass over a split, against predictions made image by image and counted with NumPy.

    The CAM's passes (scales 1 and 1.5, mirrored) serve the segmentation too: each batch sees no pass twice.
    """
    tree = tiny_tree() | {"eval": {"seg_scales": list(scales), "mirror": mirror}}
    tree["method"]["cam"]["scales"] = [1.0, 1.5]
    trainer = Trainer(build(tree), shards=shards, out=None, quiet=True, device="cpu")
    trainer.net.decoder.classify.weight.data *= 50  # all classes get predicted
    calls: list[torch.Size] = []
    handle = trainer.net.encoder.register_forward_hook(lambda _, args, __: calls.append(args[0].shape))
    got = trainer.validate().metrics["seg_miou"]
    handle.remove()
    reader = ShardReader(shards, "val")
    images = sum(shape[0] for shape in calls)
    assert images == encoder_passes * len(reader)
    counts = np.zeros((7, 7), np.int64)
    trainer.net.eval()
    for i in range(len(reader)):
        row = reader[i]
        image = np.asarray(Image.open(io.BytesIO(row.image)).convert("RGB"))
        labels = np.asarray(Image.open(io.BytesIO(row.mask or b"")))
        predicted = segment(trainer.net, [image], How(scales, mirror), torch.device("cpu"))[0].labels_HW
        np.add.at(counts, (labels[labels != 255], predicted[labels != 255]), 1)
    hit = np.diag(counts)
    iou = hit / (counts.sum(0) + counts.sum(1) - hit).clip(1)
    assert (counts.sum(0) > 0).sum() > 2
    # Batches are computed in another order than single images: a pixel on the edge may fall to the other side.
    assert got == pytest.approx(iou[counts.sum(1) > 0].mean(), abs=1e-4)


@pytest.mark.parametrize("share", ["always", "warmup", "exact"])
def test_sharing_the_plain_pass_changes_nothing_where_nothing_is_dropped(share: str, shards: Path) -> None:
    """``method.cam.share``: the training pass is the plain CAM pass, to the last bit that the order of sums allows."""
    kept = {}
    for mode in ("never", share):
        tree = tiny_tree()
        tree["model"]["drop_path"] = 0.0
        tree["method"]["cam"]["share"] = mode
        if share == "warmup":  # where the mirror image is left out, which the comparison must leave out as well
            tree["method"]["cam"]["mirror"] = False
        trainer = Trainer(build(tree), shards=shards, out=None, quiet=True, device="cpu", dtype=torch.float64)
        calls: list[int] = []
        trainer.net.encoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.net.train()
        batches = trainer.loader(trainer.loader_spec())
        losses = []
        for step in range(5):
            out = trainer.step_fn(next(batches).to("cpu", torch.float64), step)
            out.loss.backward()
            trainer.optimizer.step(step)
            trainer.optimizer.zero_grad()
            losses.append([out.terms[k].item() for k in sorted(out.terms)])
        kept[mode] = losses, trainer.prototypes.prototypes_Cd.clone(), len(calls)
    assert kept[share][2] < kept["never"][2]
    for one, two in zip(kept[share][0], kept["never"][0], strict=True):
        assert one == pytest.approx(two, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(kept[share][1], kept["never"][1], rtol=1e-6, atol=1e-7)


def test_dropped_branches_keep_the_plain_pass_apart(shards: Path) -> None:
    """With drop-path, ``exact`` shares nothing, ``warmup`` shares until the warm-up ends, ``always`` shares."""
    for share, expected in (("exact", [False, False]), ("warmup", [True, False]), ("always", [True, True])):
        tree = tiny_tree()
        tree["method"]["cam"]["share"] = share
        step = Trainer(build(tree), shards=shards, out=None, quiet=True, device="cpu").step_fn
        assert [step.schedule.shares(1), step.schedule.shares(2)] == expected


def test_the_encoder_is_one_graph(shards: Path) -> None:
    """What ``train.compile`` relies on: traced without a break, and the same numbers through autograd's tracer."""
    net = Trainer(build(tiny_tree()), shards=shards, out=None, quiet=True, device="cpu").net
    names = list(net.state_dict())
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    noise = sample_noise(0, 1, ["a", "b"], layers=net.layers, channels=16, device="cpu")
    weight = net.encoder.stages[0].embed.proj.weight

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        features, pairs = net.encoder(x, noise)
        loss = features[3].square().sum() + (pairs[0][0] * pairs[1][1]).sum()
        return loss.detach(), torch.autograd.grad(loss, weight)[0]

    plain = run()
    net.encoder.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(), plain, rtol=1e-5, atol=1e-6)
    assert list(net.state_dict()) == names
