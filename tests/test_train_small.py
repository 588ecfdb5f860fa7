"""Images that are small, and runs that cannot work: one rule for training, validation and prediction."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import cluster.cli
import tuning.cli
from tests.own import ROWS, Row, own_shards
from tests.tiny import tiny_tree
from ugrl import config
from ugrl.config import build
from ugrl.data.images import decode_labels, decode_pixels
from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest
from ugrl.errors import ConfigError, UgrlError
from ugrl.eval.evaluate import evaluate
from ugrl.eval.metrics import Confusion
from ugrl.model.specs import SPECS, least_crop
from ugrl.predict.forward import How, segment
from ugrl.train.build import build_net
from ugrl.train.check import check_run
from ugrl.train.loop import Trainer

TRAIN = ROWS[:6]
TREE = tiny_tree(steps=2, cls_warmup_iters=1, lr_warmup_iters=1, eval_every=2)
TREE["data"]["crop"] = 32


def test_small_images_are_evaluated_as_they_are_predicted(tmp_path: Path) -> None:
    """A strip of 12 px, and one of 40 px that the CAM's smallest scale makes too small for the backbone."""
    rows: list[Row] = [*TRAIN, ("val", "cat", (200, 12), 1), ("val", "dog", (40, 90), 2), ("val", "cat", (7, 5), 1)]
    reader = ShardReader(own_shards(tmp_path, rows), "val")
    tree = {"data": {"crop": 64, "threads": 0}, "model": {"backbone": "mit_b0", "decoder_dim": 16}}
    cfg = build(tree | {"eval": {"crf": True, "seg_scales": [1.0, 0.5]}, "method": {"cam": {"scales": [1.0, 0.5]}}})
    net = build_net(cfg, 2)
    result = evaluate(net, reader, cfg, device=torch.device("cpu"))
    want = {"seg_miou": Confusion(3), "crf_miou": Confusion(3)}
    empty = Confusion(3)
    net.eval()
    for row in (reader[i] for i in range(3)):
        labels = torch.from_numpy(np.array(decode_labels(row.mask or b"", row.id)))
        for confusion, crf in zip(want.values(), (False, True), strict=True):
            pixels = decode_pixels(row.image, row.id)
            guess = segment(net, [pixels], How((1.0, 0.5), crf=crf), torch.device("cpu"))[0].labels_HW
            confusion.add(torch.from_numpy(guess), labels)
        empty.add(torch.zeros_like(labels), labels)
    assert result.images == 3 and 0 < result.metrics["cam_miou"] <= 1
    for name, confusion in want.items():
        assert result.metrics[name] == pytest.approx(confusion.miou, abs=1e-12), name
    assert result.metrics["seg_background_miou"] == pytest.approx(empty.miou) and 0 < empty.miou < 1
    assert result.metrics["tag_prevalence"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert result.classes["tag_ap"].keys() == {"cat", "dog"}
    assert result.metrics["collapsed"] == float(bool(result.verdict))

    with torch.no_grad():  # a network that answers background to everything
        net.decoder.classify.weight.zero_()
        net.decoder.classify.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    result = evaluate(net, reader, cfg, device=torch.device("cpu"))
    assert result.metrics["seg_miou"] == result.metrics["seg_background_miou"]
    assert result.metrics["collapsed"] == 1.0 and "predicts background everywhere" in result.verdict


@pytest.mark.parametrize("backbone", ["tiny", "mit_b0"])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5), (1.0, 0.3, 1.5)])
def test_the_least_crop_is_the_smallest_that_every_scale_can_take(backbone: str, scales: tuple[float, ...]) -> None:
    crop = least_crop(backbone, scales)
    least = SPECS[backbone].min_size
    assert min(round(crop * s) for s in scales) >= least > min(round((crop - 1) * s) for s in scales)
    net = build_net(build({"model": {"backbone": backbone, "decoder_dim": 8}}), 2).eval()
    net.encoder(torch.zeros(1, 3, least, least))
    with pytest.raises(UgrlError, match="too small"):
        net.encoder(torch.zeros(1, 3, least, least - 1))


def test_a_crop_that_is_too_small_is_refused_with_the_least_one() -> None:
    tree = tiny_tree()
    tree["model"]["backbone"] = "mit_b1"
    with pytest.raises(ConfigError) as info:
        build(tree)
    assert str(info.value) == (
        "config key data.crop is 48: at 0.5, the smallest of method.cam.scales, it is smaller than the 32 px that "
        "mit_b1 needs; expected data.crop ≥ 63"
    )
    tree["data"]["crop"] = 63
    build(tree)


def labelled(*labels: int | None, tags: tuple[str, ...] = ("cat", "dog")) -> list[Row]:
    return [("val", t, (40, 40), label) for t, label in zip(tags, labels, strict=True)]


BAD: dict[str, tuple[list[Row], dict, str]] = {
    "nothing in val": (
        [*TRAIN, *labelled(None, None, tags=("", ""))],
        {},
        "objective 'auto': split 'val' can score nothing: none of its images has a tag, and none of 2 has a mask",
    ),
    "some masks in val and no tag": (
        [*TRAIN, *labelled(1, None, tags=("", ""))],
        {},
        "can score nothing: none of its images has a tag, and 1 of 2 has a mask",
    ),
    "no tag among the first": (
        [*TRAIN, *labelled(None, None, tags=("", "cat"))],
        {"limit": 1},
        "split 'val' can score nothing",
    ),
    "tags asked for": (
        [*TRAIN, *labelled(1, 2, tags=("", ""))],
        {"objective": "tag_map"},
        "objective 'tag_map': split 'val' has no image with a tag; it can supply seg_miou, cam_miou",
    ),
    "masks asked for": (
        [*TRAIN, *labelled(1, None)],
        {"objective": "seg_miou"},
        "objective 'seg_miou': split 'val' 1 of 2 has a mask; it can supply tag_map, tag_f1",
    ),
    "all ignored": ([*TRAIN, *labelled(255, 255)], {}, "every pixel of every mask is 255 (ignored)"),
    "train without tags": (
        [*(("train", "", (40, 40), None) for _ in range(4)), *labelled(1, 2)],
        {},
        "split 'train': no image has a tag",
    ),
    "too few": ([*TRAIN[:3], *labelled(1, 2)], {}, "3 training rows do not fill one global batch of 4"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_starts(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a run and by a search alike: one line, and nothing is written."""
    rows, evaluation, message = BAD[case]
    shards = own_shards(tmp_path, rows)
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(TREE | {"eval": evaluation}))
    objective = evaluation.get("objective", "auto")
    space = {"config": str(base), "objective": objective, "split": "val", "trials": 2, "scheduler": {"name": "none"}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space | {"search": {"train.lr": {"uniform": [1e-4, 1e-2]}}}))
    for main, option, file in (
        (cluster.cli.main, "--config", base),
        (tuning.cli.main, "--space", tmp_path / "space.yaml"),
    ):
        out = tmp_path / "out"
        assert main([option, str(file), "--data", str(shards), "--out", str(out)]) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1 and message in errors[0]
        assert not out.exists()
    with pytest.raises(UgrlError):
        Trainer(config.load(base), shards=shards, out=None, quiet=True, device="cpu")


def test_weights_that_are_not_there_are_missed_before_anything_starts(tmp_path: Path) -> None:
    cfg = build(TREE | {"model": {**TREE["model"], "weights": str(tmp_path / "none.pth")}})
    manifest = Manifest.load(own_shards(tmp_path))
    assert check_run(cfg, manifest) == "seg_miou"  # a run that is resumed needs none
    with pytest.raises(UgrlError, match="none.pth: no such file"):
        check_run(cfg, manifest, fresh=True)
    assert check_run(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, weights=None)), manifest, fresh=True)
