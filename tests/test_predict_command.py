"""`ugrl predict`: what it writes for other programs, again after a stop, and never over the files of others."""

from __future__ import annotations

import csv
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as official
from pycocotools.coco import COCO

from tests.predictions import noise, photos, predict
from ugrl.data.coco_masks import rle_of
from ugrl.data.voc import CLASS_NAMES
from ugrl.eval.palettes import palette
from ugrl.predict import exports
from ugrl.predict.folder import PER_U, UNKNOWN, read_note
from ugrl.predict.model import Model

CPU = torch.device("cpu")


def test_everything_that_can_be_asked_for(base: Path, model: Model, tmp_path: Path) -> None:
    folder, out = photos(tmp_path / "in", "f2 f10 f1"), tmp_path / "out"
    wanted = ["scores.csv", "scores.json", "coco", "voc"]
    words = ["--overlay", "--cam", "--uncertainty", "--palette", "safe", "--export", *wanted]
    assert predict(base, folder, "--out", out, *words) == 0
    found = {p.path.name: p for p in model.predict(folder, palette="safe")}
    assert list(found) == ["f1.png", "f2.png", "f10.png"]
    with open(out / "scores.csv", newline="") as file:
        table = list(csv.DictReader(file))
    rows = json.loads((out / "scores.json").read_text())
    assert [row["image"] for row in table] == [row["image"] for row in rows] == list(found)
    coco = COCO(str(out / "coco.json"))
    assert {c["name"]: c["id"] for c in coco.dataset["categories"]} == {n: k + 1 for k, n in enumerate(model.names)}
    for number, (name, p) in enumerate(found.items(), start=1):
        assert rows[number - 1]["scores"] == pytest.approx(p.scores, abs=1e-6)
        assert {n: float(table[number - 1][n]) for n in model.names} == pytest.approx(p.scores, abs=1e-6)
        assert rows[number - 1]["uncertainty"] == pytest.approx(p.class_uncertainty, abs=1e-6)
        with Image.open(out / name) as mask:
            assert (np.asarray(mask) == p.mask).all()
            assert mask.getpalette()[: 3 * 256] == palette("safe").ravel().tolist()
        with Image.open(out / "overlay" / name.replace(".png", ".jpg")) as picture:
            assert picture.size == p.overlay().size
        u = np.asarray(Image.open(out / "uncertainty" / name))
        known = np.isfinite(p.uncertainty)
        assert (u[~known] == UNKNOWN).all() and abs(u[known] / PER_U - p.uncertainty[known]).max() <= 0.5 / PER_U + 1e-5
        for label, cam_HW in zip(map(model.names.index, p.cam), p.cam.values(), strict=True):
            (file,) = (out / "cam").glob(f"{Path(name).stem}_{label + 1:03d}_*.png")
            assert abs(np.asarray(Image.open(file)) / 255 - cam_HW).max() <= 0.5 / 255 + 1e-6
        assert coco.loadImgs(number)[0]["file_name"] == name
        drawn = np.zeros_like(p.mask)
        for a in coco.loadAnns(coco.getAnnIds(number)):
            drawn[coco.annToMask(a) > 0] = a["category_id"]
            assert (
                a["area"] == official.area(a["segmentation"])
                and a["bbox"] == official.toBbox(a["segmentation"]).tolist()
            )
        assert (drawn == p.mask).all()
    lines = (out / "voc" / "labelmap.txt").read_text().splitlines()
    assert lines[:2] == ["# label:color_rgb:parts:actions", "background:0,0,0::"] and len(lines) == 2 + len(model.names)
    assert (out / "voc/ImageSets/Segmentation/default.txt").read_text().split() == ["f1", "f2", "f10"]
    painted = np.asarray(Image.open(out / "voc/SegmentationClass/f2.png").convert("RGB"))
    rgb = {tuple(map(int, row.split(":")[1].split(","))): k for k, row in enumerate(lines[1:])}
    assert (np.array([[rgb[tuple(c)] for c in row] for row in painted.tolist()]) == found["f2.png"].mask).all()


def test_rle_is_the_official_one() -> None:
    rng = np.random.default_rng(0)
    for k in range(60):
        mask = rng.random(tuple(rng.integers(1, 40, 2))) < rng.random()
        mask = np.kron(mask, np.ones((1 + k % 3 * 9, 1 + k % 2 * 5))) > 0
        want = official.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle_of(mask) == {"size": want["size"], "counts": want["counts"].decode()}


def test_the_archive_for_voc_s_server(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = photos(tmp_path / "in", "a"), tmp_path / "out"
    assert predict(base, folder, "--out", out, "--export", "voc-server") == 2
    assert "expected VOC's twenty in their order" in capsys.readouterr().err and not out.exists()
    assert predict(base, folder, "--out", out, "--palette", "safe") == 0
    made = read_note(out / "a.png")[1]
    assert made is not None
    exports.submission(out, {out / "a.png": made}, CLASS_NAMES)
    with tarfile.open(out / "submission.tar.gz") as archive:
        (member,) = archive.getmembers()
        assert member.name == "results/VOC2012/Segmentation/comp6_test_cls/a.png"
        mask = Image.open(archive.extractfile(member))
        assert mask.mode == "P" and mask.getpalette()[3:6] == [128, 0, 0]
        assert (np.asarray(mask) == np.asarray(Image.open(out / "a.png"))).all()
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "submission.tar.gz"]


def told(text: str) -> dict[str, bool]:
    """Image → whether its line says that it was finished before."""
    return {Path(line.split(": ")[0]).stem: "finished before" in line for line in text.splitlines()}


def test_a_second_run_continues(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = photos(tmp_path / "in"), tmp_path / "out"
    good = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(good[:200])
    words = [base, folder, "--out", out, "--overlay"]
    assert predict(*words, "--on-error", "raise") == 2
    err = capsys.readouterr().err
    assert "b.png: truncated" in err and not (out / "c.png").exists()
    (folder / "b.png").write_bytes(good)
    assert predict(*words) == 0
    assert told(capsys.readouterr().out) == {"a": True, "b": False, "c": False}
    # What is asked for in addition is made, what is missing or of another image is made again.
    assert predict(*words, "--batch", 2, "--uncertainty") == 0
    assert told(capsys.readouterr().out) == {"a": False, "b": False, "c": False}
    (out / "overlay/a.jpg").unlink()
    Image.fromarray(noise(24, 24)).save(folder / "b.png")
    assert predict(*words, "--uncertainty") == 0
    assert told(capsys.readouterr().out) == {"a": False, "b": False, "c": True}
    assert (out / "overlay/a.jpg").exists() and np.asarray(Image.open(out / "b.png")).shape == (24, 24)


def test_other_options_are_never_mixed(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = photos(tmp_path / "in"), tmp_path / "out"
    assert predict(base, folder, "--out", out, "--overlay") == 0
    capsys.readouterr()
    assert predict(base, folder / "a.png", "--out", out, "--mirror") == 2
    text, err = capsys.readouterr()
    assert "b.png: a mask of another checkpoint or of other options" in err and not text and err.count("error: ") == 1
    # All of them anew; what belonged to the old ones goes.
    assert predict(base, folder, "--out", out, "--mirror") == 0
    assert told(capsys.readouterr().out) == {"a": False, "b": False, "c": False}
    assert not list((out / "overlay").iterdir())
    photos(tmp_path / "more", "d")
    assert predict(base, tmp_path / "more", "--out", out, "--mirror") == 0
    assert sorted(p.name for p in out.glob("*.png")) == ["a.png", "b.png", "c.png", "d.png"]


@pytest.mark.parametrize("where", ["overlay/a.jpg", "uncertainty/a.png", "scores.csv", "coco.json", "cam"])
def test_files_of_others_stay(where: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = photos(tmp_path / "in", "a"), tmp_path / "out"
    words = [base, folder, "--out", out, "--overlay", "--uncertainty", "--cam", "--export", "coco", "scores.csv"]
    if where == "cam":
        assert predict(*words) == 0
        (mine,) = list((out / "cam").glob("a_*.png"))[:1]
        for path in out.glob("*.*"):
            path.unlink()
        where = f"cam/{mine.name}"
    theirs = out / where
    theirs.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 3)).save(theirs, format="PNG")
    before = theirs.read_bytes()
    assert predict(*words) == 2
    assert f"{theirs.name}: exists" in capsys.readouterr().err and theirs.read_bytes() == before


def test_an_overlay_is_no_place_for_an_overlay(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert predict(base, photos(tmp_path / "in", "a"), "--out", out, "--overlay") == 0
    before = (out / "overlay/a.jpg").read_bytes()
    assert predict(base, out / "overlay", "--out", out, "--overlay") == 2
    assert "the overlay of" in capsys.readouterr().err and (out / "overlay/a.jpg").read_bytes() == before


def test_a_fingerprint_is_of_the_weights(model: Model, base: Path) -> None:
    again = Model(base, device="cpu")
    assert again.fingerprint == model.fingerprint
    other = Model(base, device="cpu")
    with torch.no_grad():
        other.net.classifier.weight[0, 0] += 1e-3
    assert other.fingerprint != model.fingerprint


def test_a_note_of_any_content_is_read(tmp_path: Path) -> None:
    from ugrl.eval.palette import write_mask

    path = tmp_path / "a.png"
    for text in ("", "[]", "{", '{"fingerprint": 1}', "null"):
        write_mask(path, np.zeros((2, 2), np.uint8), notes={"ugrl": text})
        assert read_note(path) == (True, None)
    os.truncate(path, 20)
    assert read_note(path) == (False, None)
