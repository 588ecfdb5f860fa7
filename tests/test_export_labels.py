"""Pseudo-labels handed on to other programs: ``ugrl export --to labels``."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.predictions import trained
from tests.teachers import labels_of, tree
from tests.tiny import tiny_tree
from ugrl.cli import main
from ugrl.config import build
from ugrl.data.augment import eval_sample
from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest
from ugrl.data.voc import VocSource
from ugrl.errors import DataError
from ugrl.export import labels as exported
from ugrl.method.doubts import at_labels
from ugrl.method.per_position import label_uncertainty
from ugrl.predict.folder import PER_U, UNKNOWN
from ugrl.train.loop import Trainer
from ugrl.train.restore import restore
from ugrl.types import IGNORE, collate
from ugrl.view.collect import looks, open_run, open_split

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(base: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labels") / "voc"
    words = ["export", str(base), "--to", "labels", "--data", str(shards), "--out", str(out), "--device", "cpu"]
    assert main(words) == 0
    return out


def rows_of(folder: Path) -> Iterator[dict[str, str]]:
    yield from csv.DictReader(io.StringIO((folder / "weights.csv").read_text()))


def test_pseudo_labels_come_back_through_prepare_voc(folder: Path, shards: Path, tmp_path: Path) -> None:
    """Images, tags, labels and the true masks of val; and a run of the setting Full learns from them."""
    names = {"Annotations", "ImageSets", "JPEGImages", "SegmentationClass", "labelmap.txt", "weights.csv"}
    assert {p.name for p in folder.iterdir()} == names
    assert main(["prepare", "voc", "--root", str(folder), "--out", str(tmp_path / "back"), "--tune-val", "0"]) == 0
    manifest = Manifest.load(tmp_path / "back")
    assert manifest.class_names == Manifest.load(shards).class_names
    for split in ("train", "val"):
        before, after = ShardReader(shards, split), ShardReader(manifest, split)
        assert before.ids == after.ids and after.has_masks
        for k, id in enumerate(before.ids):
            old, new = before[k], after[k]
            assert (old.image, old.tags, old.width, old.height) == (new.image, new.tags, new.width, new.height)
            written = (folder / "SegmentationClass" / f"{id}.png").read_bytes()
            assert np.array_equal(labels_of(new.mask), labels_of(written))
            if split == "val":
                assert np.array_equal(labels_of(new.mask), labels_of(old.mask))
            else:
                assert set(np.unique(labels_of(new.mask))) <= {0, 255, *old.tags}
    with Image.open(folder / "SegmentationClass" / f"{ShardReader(shards, 'train').ids[0]}.png") as image:
        assert image.mode == "P" and (image.getpalette() or [])[3:6] == [128, 0, 0]
    made = tiny_tree(steps=2, cls_warmup_iters=0, lr_warmup_iters=0)
    made["method"]["setting"] = "Full"
    assert Trainer(build(made), shards=tmp_path / "back", out=None, quiet=True, device="cpu").fit()["seg_miou"] > 0


def test_the_labels_are_those_that_the_run_looks_at(folder: Path, base: Path, shards: Path) -> None:
    reader = open_split(shards, "train")
    run = open_run(base, best=False, device=CPU)
    for batch in looks(run, reader, range(6)):
        for look in batch:
            written = (folder / "SegmentationClass" / f"{look.id}.png").read_bytes()
            assert np.array_equal(labels_of(written), look.pseudo_HW)
            mine = {int(r["label"]): r for r in rows_of(folder) if r["image"] == look.id}
            counts = np.bincount(look.pseudo_HW.ravel(), minlength=256)
            assert {c: int(r["pixels"]) for c, r in mine.items()} == {c: int(counts[c]) for c in range(7) if counts[c]}
            for c, row in mine.items():
                assert (float(row["u"]) if row["u"] else None) == (
                    pytest.approx(look.u[c], abs=1e-5) if c in look.u else None
                )


def test_scales_that_a_cam_is_scored_at_change_no_label(base: Path, shards: Path) -> None:
    got, reader = restore(base, device=CPU), ShardReader(shards, "train")
    scored = replace(got.cfg, eval=replace(got.cfg.eval, cam_scales=(1.0, 2.0), cam_side=64))
    found = [
        {marks.id: labels_HW for marks, labels_HW, _ in exported.labelled(replace(got, cfg=cfg), reader)}
        for cfg in (got.cfg, scored)
    ]
    assert all(np.array_equal(found[0][id], found[1][id]) for id in reader.ids)


def test_weights_are_those_of_the_segmentation_loss(folder: Path) -> None:
    """Eq. 8 over all images: the mean of a class's pixels is 1, lower u weighs more, an unknown u weighs 1."""
    rows = list(rows_of(folder))
    for number in {row["label"] for row in rows}:
        known = [r for r in rows if r["label"] == number and r["u"]]
        pixels, weight, u = (np.array([float(r[key]) for r in known]) for key in ("pixels", "weight", "u"))
        assert (pixels * weight).sum() / pixels.sum() == pytest.approx(1, abs=1e-4)
        assert (np.diff(weight[np.argsort(u)]) <= 1e-6).all()
    assert all(float(r["weight"]) == 1 for r in rows if not r["u"])


def test_a_taught_run_exports_what_it_was_taught(taught: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    Trainer(build(tree("teacher")), shards=taught, out=out, quiet=True, device="cpu").fit()
    words = ["export", str(out), "--to", "labels", "--out", str(tmp_path / "voc"), "--device", "cpu", "--data"]
    assert main([*words, str(taught)]) == 0
    reader = ShardReader(taught, "train", teacher=True)
    for k, id in enumerate(reader.ids):
        row = reader[k]
        said = labels_of(row.teacher)
        want = np.where(np.isin(said, [0, *row.tags]), said, IGNORE)
        assert np.array_equal(labels_of((tmp_path / "voc/SegmentationClass" / f"{id}.png").read_bytes()), want)
    # Where there are no teacher masks, an export is refused; a look falls back on the CAM.
    got = restore(out, device=CPU)
    with pytest.raises(DataError, match="split 'val': none of 16 images have a teacher mask"):
        exported.check_teachers(got.cfg, reader.manifest, "val")
    run = open_run(out, best=False, device=CPU)
    assert sum(len(batch) for batch in looks(run, open_split(taught, "val"), range(3))) == 3


def test_the_snippet_of_the_guide_makes_a_map_of_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[1] / "docs/teachers.md").read_text()
    (block,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    (tmp_path / "labels").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, "teachers.md", "exec"), names)
    row = next(rows_of(folder))
    labels_HW = labels_of((folder / "SegmentationClass" / f"{row['image']}.png").read_bytes())
    weights_HW = names["weights_of"](row["image"])
    assert weights_HW.shape == labels_HW.shape and (weights_HW[labels_HW == IGNORE] == 0).all()
    assert weights_HW[labels_HW == int(row["label"])] == pytest.approx(float(row["weight"]))


@pytest.mark.parametrize("say", [0.0, 0.5])
def test_a_run_that_judges_pixels_exports_their_u(
    say: float, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the scale of `ugrl predict --uncertainty`; asked again for one image at a time, of the labels in the files."""
    keys = {"method.uncertainty.level": "pixel", "method.uncertainty.decoder_weight": say}
    run, out = trained(shards, tmp_path / "run", **keys), tmp_path / "voc"
    words = ["export", str(run), "--to", "labels", "--data", str(shards), "--out", str(out), "--device", "cpu"]
    assert main(words) == 0
    assert "u of each pixel in Uncertainty/ID.png: the value / 127, 255 is unknown" in capsys.readouterr().out
    got, reader, kinds = restore(run, device=CPU), ShardReader(shards, "train"), set()
    assert {p.stem for p in (out / "Uncertainty").iterdir()} == set(reader.ids)
    for k, id in enumerate(reader.ids):
        labels_HW, u_HW = (np.array(Image.open(out / f / f"{id}.png")) for f in ("SegmentationClass", "Uncertainty"))
        batch = collate([eval_sample(reader[k], num_classes=6)])
        with torch.no_grad():
            f4_BDhw = got.net.cam(batch.images_B3HW, affinity=False)[1]
            present_BC = torch.cat([torch.ones(1, 1), batch.tags_BF], 1).bool()
            labels_BHW, probs_BChw = (
                torch.from_numpy(labels_HW)[None].long(),
                got.net.probabilities(got.net.encoder(batch.images_B3HW)[0]),
            )
            judged = label_uncertainty(got.prototypes, f4_BDhw, labels_BHW, batch.pairs_P2, present_BC)
            doubt_BHW = 1 - at_labels(probs_BChw, labels_BHW, batch.pairs_P2)
            mixture, kind_BHW = got.prototypes.calibration.pixels, (labels_BHW > 0).long()
            want_BHW, known_BHW = mixture(*judged, {"decoder": doubt_BHW}, kind_BHW), judged[1]
            assert (say > 0) == (not torch.equal(want_BHW, judged[0]))
        known_HW, want_HW = known_BHW[0].numpy(), want_BHW[0].numpy()
        assert u_HW.shape == labels_HW.shape and (u_HW[~known_HW] == UNKNOWN).all()
        assert np.abs(u_HW / PER_U - want_HW)[known_HW].max(initial=0) <= 0.5 / PER_U + 1e-4
        kinds |= {(bool(known), len(np.unique(u_HW[known_HW])) > 9) for known in np.unique(known_HW)}
    assert (True, True) in kinds and (False, True) in kinds  # u differs within an image
    assert main(["prepare", "voc", "--root", str(out), "--out", str(tmp_path / "back"), "--tune-val", "0"]) == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--to", "labels"], "--to labels without --data; expected the shards whose images are labelled"),
        (["--to", "labels", "--data", "x", "--images", "a.jpg"], "--images are for formats of a network"),
        (["--to", "labels", "--data", "x", "--size", "64", "64"], "--size is for --to onnx and --to torch"),
        (["--to", "onnx", "--split", "train"], "--split is for --to labels"),
        (["--to", "onnx", "--device", "cpu"], "--device is for --to labels"),
    ],
)
def test_options_of_labels_and_of_networks_are_kept_apart(
    words: list[str], error: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(base), *words, "--out", str(tmp_path / "out")]) == 2
    assert error in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_export_replaces_nothing(
    base: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(base), "--to", "labels", "--data", str(shards), "--out", str(tmp_path)]
    assert main(words) == 2
    assert "exists already; choose another folder or remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("aeroplane\n", "begins with 'aeroplane'; expected background"),
        ("# nothing\n", "begins with nothing; expected background"),
        ("background:0,0,0::\ncat:1,2,3::\ncat::\n", "class 'cat'; expected a name on each line, each once"),
        ("background\n", "0 classes; expected 1…254"),
    ],
)
def test_a_label_map_that_cannot_be_used_is_named(text: str, words: str, folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(folder, tmp_path / "voc"))
    (root / "labelmap.txt").write_text(text)
    with pytest.raises(DataError, match=rf"labelmap\.txt: {words}"):
        VocSource(root)
