"""The setting Full: the same network learns from masks, and nothing that makes pseudo-labels is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import cluster.cli
import tuning.cli
from tests.own import Row, own_shards
from tests.reference import classification_loss_loops, segmentation_loss_loops
from tests.tiny import tiny_tree
from ugrl.config import build
from ugrl.data.images import decode_labels
from ugrl.data.order import sample_rng
from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest
from ugrl.errors import DataError
from ugrl.method import targets
from ugrl.train import checkpoint
from ugrl.train.accumulate import run_step
from ugrl.train.flops import step_gflop
from ugrl.train.loop import Trainer
from ugrl.train.step import Step
from ugrl.types import IGNORE, Batch


def tree(**train: Any) -> dict:
    made = tiny_tree(**train)
    made["method"]["setting"] = "Full"
    return made


def trainer_of(made: dict, shards: Path, out: Path | None = None, **options: Any) -> Trainer:
    return Trainer(build(made), shards=shards, out=out, quiet=True, device="cpu", **options)


def first_batch(trainer: Trainer) -> Batch:
    batches = trainer.loader(trainer.loader_spec())
    try:
        return next(batches).to("cpu", trainer.dtype)
    finally:
        batches.close()


@pytest.mark.parametrize("balance", ["none", "fg_bg"])
def test_the_loss_is_that_of_loops_over_the_masks(balance: str, shards: Path) -> None:
    """L_cls + λ1'·L_seg in float64; pixels of 255 and outside the boxes have no say."""
    made = tree()
    made["data"]["crop"] = 64  # larger than some scaled images: there is an outside
    made["method"]["loss"] = {"balance": balance, "lambda1": 0.3, "lambda1_full": 0.7}
    trainer = trainer_of(made, shards, dtype=torch.float64)
    trainer.net.train()
    batch = first_batch(trainer)
    assert batch.masks_BHW is not None and bool((batch.masks_BHW == IGNORE).any())
    batch.masks_BHW[0, 20:30, 20:30] = IGNORE
    heard: list[Any] = []
    trainer.net.register_forward_hook(lambda _, __, out: heard.append(out))
    loss = trainer.step_fn(batch, 0)
    (out,) = heard
    cls = classification_loss_loops(out.logits_BF.detach().numpy(), batch.tags_BF.numpy(), np.ones(batch.tags_BF.shape))
    seg = segmentation_loss_loops(
        out.seg_BChw.detach().numpy(), batch.masks_BHW.numpy(), np.ones((4, 7)), balance=balance
    )
    assert loss.terms["cls"].item() == pytest.approx(cls, rel=1e-10)
    assert loss.terms["seg"].item() == pytest.approx(seg, rel=1e-10)
    assert loss.loss.item() == pytest.approx(cls + 0.7 * seg, rel=1e-10)
    assert loss.terms.keys() == {"cls", "seg", "total"}
    valid = (batch.masks_BHW != IGNORE).double().mean().item()
    assert loss.stats["labelled"].item() == pytest.approx(valid) and loss.stats.keys() == {"labelled"}


def test_nothing_is_computed_that_no_loss_reads(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass of the encoder a step, from the first step on; no CAM, no prototype, no embedding, no affinity."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("is not read by any loss")

    for name in ("multi_scale_cam", "batch_vectors", "pseudo_labels", "refine_labels", "reliable_pool"):
        monkeypatch.setattr(targets, name, never)
    trainer = trainer_of(tree(), shards)
    trainer.net.train()
    passes: list[int] = []
    trainer.net.encoder.register_forward_hook(lambda _, args, __: passes.append(len(args[0])))
    for head in (trainer.net.g_seg, trainer.net.g_cls):
        head.register_forward_pre_hook(never)
    before = {k: v.clone() for k, v in trainer.prototypes.state_dict().items()}
    for step in range(3):
        out = run_step(trainer.step_fn, first_batch(trainer), step, views=True)
        assert out.views.keys() == {"labels", "prediction"}
    assert passes == [4] * 3
    assert all(torch.equal(v, before[k]) for k, v in trainer.prototypes.state_dict().items())
    # Every parameter has a gradient all the same: DDP waits for all of them.
    assert all(p.grad is not None for p in trainer.net.parameters())


def test_its_operations_are_those_of_one_pass(shards: Path) -> None:
    """The CAM's scales and mirror images cost Base passes that Full does without."""
    gflop = {}
    for setting in ("Full", "Base"):
        made = tree()
        made["method"] |= {"setting": setting, "loss": {"lambda3": 0.0}}
        gflop[setting] = step_gflop(build(made), 6)
    assert gflop["Full"] < 0.75 * gflop["Base"]


@pytest.mark.parametrize("on_device", ["none", "normalize", "augment"])
def test_every_form_of_a_batch_has_the_masks_of_its_crops(on_device: str, shards: Path) -> None:
    """At every step and on a rank that draws no picture; cut by nearest neighbour where the image was cut."""
    made = tree(picture_every=100)
    made["data"]["on_device"] = on_device
    trainer = trainer_of(made, shards)
    assert trainer.loader_spec().masks_every == 1
    found, plain = first_batch(trainer), first_batch(trainer_of(tree(), shards))
    assert found.ids == plain.ids and found.masks_BHW is not None and plain.masks_BHW is not None
    assert torch.equal(found.masks_BHW, plain.masks_BHW)
    torch.testing.assert_close(found.images_B3HW, plain.images_B3HW, atol=0.05, rtol=0)

    reader = ShardReader(shards, "train")
    row = reader[reader.ids.index(found.ids[0])]
    labels = np.asarray(decode_labels(row.mask or b"", row.id))
    u_scale, u_mirror, u_y, u_x = sample_rng(trainer.cfg.seed, 0, row.id).random(4)
    side, crop = round(48 * (0.75 + 0.5 * u_scale)), 48
    y, x = int(u_y * (abs(side - crop) + 1)), int(u_x * (abs(side - crop) + 1))
    source = ((np.arange(side) + 0.5) * 48 / side).astype(int)
    wide = labels[source][:, source]
    if side <= crop:
        want = np.full((crop, crop), IGNORE, np.uint8)
        want[y : y + side, x : x + side] = wide
    else:
        want = wide[y : y + crop, x : x + crop]
    want = want[:, ::-1] if u_mirror < 0.5 else want
    assert (found.masks_BHW[0].numpy() == want).mean() > 0.99  # Pillow rounds where a pixel's centre is on an edge


@pytest.mark.parametrize("micro", [1, 3])
def test_parts_change_no_loss_and_no_gradient(micro: int, shards: Path) -> None:
    found = []
    for most in (0, micro):
        trainer = trainer_of(tree(), shards, dtype=torch.float64)
        trainer.net.train()
        out = run_step(trainer.step_fn, first_batch(trainer), 0, micro_batch=most)
        found.append((out.terms, {n: p.grad for n, p in trainer.net.named_parameters()}))
    (whole, g_whole), (parts, g_parts) = found
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=1e-12)
    for name, gradient in g_whole.items():
        torch.testing.assert_close(g_parts[name], gradient, rtol=1e-7, atol=1e-11, msg=name)


def test_a_resumed_run_is_an_uninterrupted_one(shards: Path, tmp_path: Path) -> None:
    made = tree(steps=5, checkpoint_every=2, keep_checkpoints=9)
    trainer_of(made, shards, tmp_path / "whole").fit()
    start = tmp_path / "whole" / "checkpoints" / "step_00000002"
    trainer_of(made, shards, tmp_path / "rest", resume_from=start).fit()
    a, b = (load_file(checkpoint.find(tmp_path / name) / "model.safetensors") for name in ("whole", "rest"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-8)


def test_masks_teach_more_than_chance(shards: Path, tmp_path: Path) -> None:
    """CAM and tags are scored too; what needs prototypes is absent."""
    made = tree(steps=100, global_batch=8, lr=3e-3, eval_every=100)
    made["data"]["val_split"] = "train"  # so few steps from scratch teach little that carries over
    made["method"]["loss"] = {"balance": "fg_bg"}
    made["model"] |= {"drop_path": 0.0, "dropout": 0.0, "decoder_dim": 32}
    found = trainer_of(made, shards, tmp_path / "run").fit()
    assert found["seg_miou"] > found["seg_background_miou"] + 0.1 and found["collapsed"] == 0
    assert 0 < found["cam_miou"] < 1 and 0 < found["tag_map"] <= 1 and "u_auroc" not in found


MASKED: list[Row] = [("train", "cat" if k % 2 else "dog", (40, 40), 1 + k % 2) for k in range(6)]
VAL: list[Row] = [("val", "cat", (40, 40), 1), ("val", "dog", (40, 40), 2)]
BAD: dict[str, tuple[list[Row], str]] = {
    "one": (
        [*MASKED[:4], ("train", "cat", (40, 40), None), MASKED[5], *VAL],
        "split 'train': 5 of 6 have masks (the first without one is 'p4'); method.setting=Full learns from the mask of "
        "every training image",
    ),
    "all": (
        [*(("train", "cat", (40, 40), None) for _ in range(6)), *VAL],
        "split 'train': none of 6 has a mask; method.setting=Full",
    ),
    "ignored": (
        [*(("train", "cat", (40, 40), 255) for _ in range(6)), *VAL],
        "split 'train': every pixel of every mask is 255 (ignored); method.setting=Full",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_training_image_without_a_mask_is_refused_before_anything_starts(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a run and by a search of which only one trial would need the mask: one line, and nothing is written."""
    rows, message = BAD[case]
    shards = own_shards(tmp_path, rows)
    made = tree(steps=2, cls_warmup_iters=1, lr_warmup_iters=1, eval_every=2)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(made))
    made["method"]["setting"] = "Base"
    (tmp_path / "weak.yaml").write_text(yaml.safe_dump(made))
    space = {"config": str(tmp_path / "weak.yaml"), "split": "val", "trials": 2, "scheduler": {"name": "none"}}
    space["search"] = {"method.setting": {"choice": ["Base", "Full"]}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    for main, option, file in (
        (cluster.cli.main, "--config", "base.yaml"),
        (tuning.cli.main, "--space", "space.yaml"),
    ):
        out = tmp_path / "out"
        assert main([option, str(tmp_path / file), "--data", str(shards), "--out", str(out)]) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1 and message in errors[0]
        assert not out.exists()


def test_a_batch_without_masks_is_refused_by_name(shards: Path) -> None:
    """Where a manifest promises masks that its shards lack."""
    trainer = trainer_of(tree(), shards)
    batch = first_batch(trainer)
    bare = Batch(batch.ids, batch.images_B3HW, batch.tags_BF, batch.boxes_B4, None, batch.pairs_P2)
    with pytest.raises(DataError, match=rf"step 4: an image among {batch.ids[0]}, .* has no mask; method.setting=Full"):
        Step.__call__(trainer.step_fn, bare, 3)
    assert Manifest.load(shards).split("train").with_masks == 20
