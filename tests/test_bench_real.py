"""``make real`` in small: a devkit of coloured squares, arms that are killed and go on, and numbers computed again."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from bench import real
from bench.real_measure import LabelScores
from bench.real_table import as_markdown, parts, summary
from tests.reference_metrics import ref_auroc
from tests.test_data_voc import save_mask, save_xml
from ugrl import config as configs
from ugrl.config import Config
from ugrl.data.reader import ShardReader
from ugrl.data.voc import CLASS_NAMES
from ugrl.eval.evaluate import evaluate
from ugrl.eval.metrics import Confusion, weighted_auroc
from ugrl.eval.passes import shape_batches
from ugrl.method.cam import multi_scale_cam
from ugrl.method.class_vectors import batch_vectors
from ugrl.method.refine import refine_labels
from ugrl.method.schedule import Schedule
from ugrl.train.build import build_par
from ugrl.train.restore import restore
from ugrl.types import IGNORE

STEPS = 16
SHOWN = ("cat", "dog", "sheep")
TREE = {
    "data": {"crop": 48, "scale_min": 0.8, "scale_max": 1.2, "threads": 0},
    "model": {"backbone": "tiny", "decoder_dim": 16},
    "method": {
        "cam": {"scales": [1.0, 0.5], "par_iterations": 2, "par_dilations": [1, 2], "low": 0.3, "high": 0.5},
        "uncertainty": {"d_cls": 32, "radius": 3},
        "contrast": {"d_seg": 16},
    },
    "train": {
        "steps": STEPS,
        "global_batch": 4,
        "lr": 2e-3,
        "head_lr_ratio": 1.0,
        "norm_lr_mult": 1.0,
        "lr_warmup_iters": 2,
        "cls_warmup_iters": 4,
        "log_every": 1,
        "eval_every": STEPS,
        "picture_every": 100,
        "checkpoint_every": 2,
        "keep_best": 0,
    },
    "eval": {"mirror": True, "tag_prior": 1.0},
}


def devkit_of(folder: Path) -> Path:
    """Twelve training and six validation photographs of two sizes with one or two coloured squares."""
    root, rng = folder / "VOCdevkit" / "VOC2012", np.random.default_rng(0)
    names: dict[str, list[str]] = {"train": [], "val": []}
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    for k in range(18):
        split, id = "train" if k < 12 else "val", f"p{k:02d}"
        width, height = (64, 48) if k % 3 else (48, 56)
        pixels = rng.integers(60, 120, (height, width, 3), dtype=np.uint8)
        labels = np.zeros((height, width), np.uint8)
        found = [SHOWN[k % 3], *([SHOWN[(k + 1) % 3]] if k % 2 else [])]
        for i, name in enumerate(found):
            part = slice(6, 30), slice(4 + 24 * i, 22 + 24 * i)
            pixels[part] = pixels[part] // 3
            pixels[(*part, SHOWN.index(name))] += 150
            labels[part] = CLASS_NAMES.index(name) + 1
        labels[30] = IGNORE
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{id}.jpg", quality=95)
        save_mask(root / "SegmentationClass" / f"{id}.png", labels)
        save_xml(root / "Annotations" / f"{id}.xml", *found)
        names[split].append(id)
    for split, ids in names.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return folder / "VOCdevkit"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options of every command here, but for ``--out``."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "small.yaml").write_text(yaml.safe_dump(TREE))
    return ["--voc", str(devkit_of(folder)), "--config", str(folder / "small.yaml"), "--settings", "Base", "Full"]


def begin(words: list[str], out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.real", *words, "--out", str(out), "--jobs", "1", "--device", "cpu"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps_done(run: Path) -> int:
    try:
        return len((run / "metrics.jsonl").read_text().splitlines())
    except OSError:
        return 0


def when(condition: Any, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 400
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an undisturbed benchmark, and what it said."""
    out = tmp_path_factory.mktemp("whole") / "out"
    process = begin(words, out)
    said = process.communicate(timeout=580)[0]
    assert process.returncode == 0, said
    return out, said


def results(out: Path) -> dict[str, Any]:
    return {name: json.loads((out / "results" / f"{name}.json").read_text()) for name in ("Base-0", "Full-0")}


def test_it_trains_measures_and_prints_the_table(whole: tuple[Path, str], words: list[str]) -> None:
    out, said = whole
    assert "Base-0: begins" in said and "Full-0: done" in said and "2 of 2 arms" in said
    tree, text = json.loads((out / "real.json").read_text()), (out / "real.md").read_text()
    assert list(tree["settings"]) == ["Base", "Full"] and list(tree["minus_base"]) == ["Full"]
    base, full = tree["settings"]["Base"], tree["settings"]["Full"]
    assert full["weak_full"]["mean"] == 1.0
    assert base["weak_full"]["mean"] == pytest.approx(base["seg_val"]["mean"] / full["seg_val"]["mean"])
    assert "u_auroc_train" in base and "u_auroc_train" not in full and "p_auroc_train" in full
    assert f"| Base | 1 | {100 * base['tag_map']['mean']:.1f} |" in text and "– |" in text
    # Nothing is left: the table again, from the results alone.
    (out / "real.json").unlink()
    assert real.main([*words, "--out", str(out)]) == 0
    assert json.loads((out / "real.json").read_text()) == tree


def test_arms_of_a_seed_see_the_same_images(whole: tuple[Path, str]) -> None:
    cfgs = [configs.load(whole[0] / "runs" / name / "config.yaml") for name in ("Base-0", "Full-0")]
    assert [c.seed for c in cfgs] == [0, 0] and [c.method.setting for c in cfgs] == ["Base", "Full"]
    assert replace(cfgs[0], name="", method=cfgs[1].method) == replace(cfgs[1], name="")


def test_stopped_and_killed_it_goes_on_to_the_same_numbers(
    whole: tuple[Path, str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    base, full = out / "runs" / "Base-0", out / "runs" / "Full-0"
    process = begin(words, out)
    when(lambda: steps_done(base) >= 3, process)
    # Started twice at once: the second one refuses.
    assert real.main([*words, "--out", str(out)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and "another driver is running it" in errors[0]
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 130 and "continue with the same command" in said and "Traceback" not in said
    assert "stopping; arms that train write a checkpoint first" in said

    process = begin(words, out)
    when(lambda: steps_done(full) >= 3, process)
    process.kill()  # its arm is told by the system, and writes a checkpoint
    process.wait()
    process = begin(words, out)
    said = process.communicate(timeout=580)[0]
    assert process.returncode == 0, said
    assert "Full-0: " in said and "Base-0: " not in said  # which was finished before
    for name, found in results(out).items():
        for key, value in results(whole[0])[name]["scores"].items():
            same = found["scores"][key]
            assert same == value or same == pytest.approx(value, abs=1e-6), (name, key)


def test_bad_input_is_one_line(
    words: list[str], whole: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    cases = {
        "--seeds is 0; expected at least 1": [*words, *out, "--seeds", "0"],
        "no 'Ful'; did you mean 'Full'?": [*words[:4], *out, "--settings", "Ful"],
        "no such folder; name a VOC devkit": [*words[2:], *out, "--voc", str(tmp_path / "none")],
        "seed=3: the benchmark sets it": [*words, *out, "seed=3"],
        "was started with train.lr=": [*words, "--out", str(whole[0]), "train.lr=0.5"],
        "were made of another devkit": [*words[2:], "--out", str(whole[0]), "--voc", str(other_devkit(tmp_path))],
    }
    for message, given in cases.items():
        assert real.main(given) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1 and message in errors[0], errors


def other_devkit(folder: Path) -> Path:
    root = devkit_of(folder / "other")
    lists = root / "VOC2012" / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("p00\np01\np02\np03\n")
    return root


ARMS = """
Base: {method.setting: Base}
IV-all:
  like: Base
  method.setting: IV
  method.uncertainty.kind: margin
  method.uncertainty.against: shown
  method.uncertainty.level: pixel
  method.uncertainty.votes: position
  method.uncertainty.background_prototypes: 2
  method.pseudo.source: cam+prototypes
"""


def miou_of(counts: dict[str, list[list[int]]]) -> float:
    """Mean IoU of the counts of images, over the classes of the ground truth."""
    total: dict[int, list[int]] = {}
    for rows in counts.values():
        for c, *numbers in rows:
            total[c] = [a + b for a, b in zip(total.get(c, [0, 0, 0]), numbers, strict=True)]
    ious = [right / (predicted + true - right) for right, predicted, true in total.values() if true]
    return math.fsum(ious) / len(ious)


def check_checkpoints(out: Path, given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Both checkpoints of an arm are measured, the earlier one not again."""
    early, late = (out / "results" / name for name in ("IV-all@4-0.json", "IV-all-0.json"))
    found = [json.loads(file.read_text()) for file in (early, late)]
    assert [tree["step"] for tree in found] == [4, 8] and found[0]["scores"] != found[1]["scores"]
    late.unlink()
    early.write_text(json.dumps({**found[0], "kept": True}))
    assert real.main(given) == 0, capsys.readouterr()
    assert json.loads(early.read_text())["kept"] and json.loads(late.read_text()) == found[1]


def test_arms_of_a_file(
    whole: tuple[Path, str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "arms.yaml").write_text(ARMS)
    shards = whole[0] / "shards"
    given = [
        "--shards",
        str(shards),
        *words[2:4],
        "--arms",
        str(tmp_path / "arms.yaml"),
        "--out",
        str(tmp_path / "out"),
    ]
    given += [
        "--device",
        "cpu",
        "--steps",
        "8",
        "--checkpoints",
        "train.checkpoint_every=4",
        "train.keep_checkpoints=2",
    ]
    assert real.main(given) == 0, capsys.readouterr()
    check_checkpoints(tmp_path / "out", given, capsys)
    tree = json.loads((tmp_path / "out" / "real.json").read_text())
    assert list(tree["settings"]) == ["Base", "IV-all"] and list(tree["minus_base"]) == ["IV-all"]
    got, readers = again(tmp_path / "out", "IV-all-0", shards)[1:]
    assert got.cfg.method.pseudo.source == "cam+prototypes" and got.prototypes.extra_Ed.shape[0] == 1
    for name in ("Base-0", "IV-all-0"):
        result = json.loads((tmp_path / "out" / "results" / f"{name}.json").read_text())
        scores, pairs = result["scores"], result["pairs"]
        for key in ("seg_val", "pseudo_train"):
            assert miou_of(result["images"][key]) == pytest.approx(scores[key], abs=1e-9)
            split = key.rpartition("_")[2]
            assert sorted(result["images"][key]) == sorted(readers[split].manifest.ids(split))
        for split in ("train", "val"):
            rows = [r for r in zip(*(pairs[split][k] for k in ("margin_shown", "p", "iou", "u")), strict=True)]
            known = [(m, p, iou) for m, p, iou, u in rows if None not in (m, p, iou, u)]
            bad = [iou < float(np.median([iou for *_, iou in known])) for *_, iou in known]
            for k, name_ in ((0, "margin_shown"), (1, "p")):
                score = [row[k] if k == 0 else -row[k] for row in known]
                assert scores[f"{name_}_auroc_{split}"] == pytest.approx(ref_auroc(score, bad), abs=1e-3)
        assert (scores["maps_train"] == scores["cam_train"]) == (name == "Base-0")
        own = "margin_shown" if name == "IV-all-0" else "distance"
        assert pairs["val"]["u"] == pairs["val"][own]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A: {method.setting: IV, like: B}", "A: like: no arm 'B' above it"),
        ("A: {method.setting: IV, like: 'ladder.yaml:V'}", "A: like: no arm 'V' in ladder.yaml; did you mean 'IV'?"),
        ("A: {method.setting: IV, like: 'lader.yaml:IV'}", "lader.yaml: missing configuration"),
        ("A: {method.setting: IV, like: 'arms.yaml:A'}", "A: like: arms.yaml begins with arms of this file"),
        ("A: {method.setting: IV, like: 'ring.yaml:B'}", "B: like: arms.yaml begins with arms of this file"),
        ("A: {method.setting: IV, method.lamda: 1}", "A: no key 'method.lamda'"),
        ("A: {seed: 1}", "A: no key 'seed'"),
        ("a/b: {method.setting: IV}", "a/b: expected a name"),
        ("A: {}", "A: expected a name of letters, digits, + - _, with the keys"),
        ("{}", "no arm"),
        ("A: {method.setting: V}", "arm A: config key 'method.setting' is 'V'"),
    ],
)
def test_a_file_of_arms_that_cannot_be(
    text: str, message: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "arms.yaml").write_text(text)
    (tmp_path / "ladder.yaml").write_text("IV: {method.setting: IV}")
    (tmp_path / "ring.yaml").write_text("B: {like: 'arms.yaml:A', method.setting: IV}")
    given = [*words[:4], "--arms", str(tmp_path / "arms.yaml"), "--out", str(tmp_path / "out")]
    assert real.main(given) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and message in errors[0], errors


# -- the numbers, computed again ---------------------------------------------------------------


def again(out: Path, name: str, shards: Path | None = None) -> tuple[Config, Any, dict[str, ShardReader]]:
    got = restore(out / "runs" / name, device=torch.device("cpu"))
    readers = {split: ShardReader(shards or out / "shards", split, got.cfg.data) for split in ("train", "val")}
    return got.cfg, got, readers


@pytest.mark.parametrize("name", ["Base-0", "Full-0"])
def test_scores_are_those_of_validations_at_each_threshold(name: str, whole: tuple[Path, str]) -> None:
    cfg, got, readers = again(whole[0], name)
    scores = results(whole[0])[name]["scores"]
    local = Schedule.of(cfg).affinity_trained(got.step)

    def validated(split: str, **changes: Any) -> dict[str, float]:
        judged = replace(cfg, eval=replace(cfg.eval, **changes))
        known = {"prototypes": got.prototypes, "affinity_trained": local, "par": build_par(cfg)}
        return evaluate(got.net, readers[split], judged, device=torch.device("cpu"), **known).metrics

    chosen = scores["cam_threshold"]
    at = {t: validated("train", cam_background=t) for t in (chosen, *(k / 100 for k in range(5, 96, 15)))}
    assert scores["cam_train"] == pytest.approx(at[chosen]["cam_miou"], abs=1e-9)
    assert max(found["cam_miou"] for found in at.values()) <= scores["cam_train"] + 1e-12
    refined = {
        t: validated("train", cam_background=t, refined_cam=True)["refined_miou"] for t in (0.25, 0.3, 0.5, 0.55)
    }
    assert scores["refined_train"] >= max(refined.values()) - 1e-9
    if (t := scores["refined_threshold"]) in refined:
        assert scores["refined_train"] == pytest.approx(refined[t], abs=1e-9)
    val = validated("val", cam_background=chosen, tag_prior=0.0)
    plain = validated("val", cam_background=chosen, tag_prior=0.0, mirror=False)
    prior = validated("val", cam_background=chosen)
    assert scores["seg_val_prior"] == pytest.approx(prior["seg_miou"])
    assert scores["tag_map"] == pytest.approx(val["tag_map"]) and scores["cam_val"] == pytest.approx(val["cam_miou"])
    assert scores["seg_val"] == pytest.approx(val["seg_miou"])
    assert scores["seg_val_plain"] == pytest.approx(plain["seg_miou"])
    if name == "Base-0":
        for split, metrics in (("train", at[chosen]), ("val", val)):
            for kind in ("u", "p"):
                assert scores[f"{kind}_auroc_{split}"] == pytest.approx(metrics[f"{kind}_auroc"], abs=1e-9)
    else:
        assert scores["u_auroc_train"] is None and scores["pixel_u_fg"] is None


def test_pseudo_labels_and_what_tells_wrong_ones_are_those_of_loops(whole: tuple[Path, str]) -> None:
    cfg, got, readers = again(whole[0], "Base-0")
    scores, c = results(whole[0])["Base-0"]["scores"], cfg.method.cam
    par, found = build_par(cfg), Confusion(21)
    pixels: dict[str, list[tuple[bool, float, float]]] = {"fg": [], "bg": []}
    real_pixels = labelled = 0
    local = Schedule.of(cfg).affinity_trained(got.step)
    for batch in shape_batches(readers["train"], list(range(12)), 0, got.net.min_size):
        assert batch.masks_BHW is not None and par is not None
        with torch.no_grad():
            cam = multi_scale_cam(
                lambda x, view: got.net.cam(x, affinity=view.plain and local),
                batch.images_B3HW,
                batch.pairs_P2,
                batch.boxes_B4,
                scales=c.scales,
                mirror=c.mirror,
                least=got.net.min_size,
            )
            r_BCD, present_BC = batch_vectors(batch, cam, radius=3, local=local)
            u_BC, known_BC = got.prototypes.uncertainty(r_BCD, present_BC)
        more = {"batch": len(batch.ids), "par": par, "high": c.high, "low": c.low}
        labels, conf = refine_labels(cam.cam_PHW, batch.pairs_P2, batch.boxes_B4, batch.images_B3HW, **more)
        truth = batch.masks_BHW.long()
        real_pixels += int((truth != IGNORE).sum())
        for b, y, x in (truth != IGNORE).nonzero().tolist():
            label = int(labels[b, y, x])
            if label == IGNORE:
                continue
            labelled += 1
            if known_BC[b, label]:
                wrong = label != int(truth[b, y, x])
                pixels["fg" if label else "bg"].append((wrong, float(u_BC[b, label]), float(conf[b, y, x])))
        found.add(labels.where(labels != IGNORE, 0), truth.where(labels != IGNORE, IGNORE))
    assert scores["pseudo_train"] == pytest.approx(found.miou, abs=1e-9)
    assert scores["labelled_train"] == pytest.approx(labelled / real_pixels)
    rng = np.random.default_rng(0)
    for kind, rows in pixels.items():
        few = [rows[k] for k in rng.permutation(len(rows))[:1500]]
        for name, score in (("u", [u for _, u, _ in few]), ("conf", [-v for *_, v in few])):
            wrong = [w for w, *_ in few]
            if any(wrong) and not all(wrong):  # of a part of the pixels: loops over all pairs
                assert scores[f"pixel_{name}_{kind}"] == pytest.approx(ref_auroc(score, wrong), abs=0.06)


def test_areas_of_counts_are_those_of_rows() -> None:
    g = torch.Generator().manual_seed(0)
    score = torch.randint(0, 6, (9,), generator=g).double()
    positive, negative = (torch.randint(0, 4, (9,), generator=g) for _ in range(2))
    rows = [(s, True) for s, n in zip(score.tolist(), positive.tolist(), strict=True) for _ in range(n)]
    rows += [(s, False) for s, n in zip(score.tolist(), negative.tolist(), strict=True) for _ in range(n)]
    want = ref_auroc([s for s, _ in rows], [p for _, p in rows])
    assert weighted_auroc(score, positive, negative) == pytest.approx(want, abs=1e-12)
    assert math.isnan(weighted_auroc(score, positive, torch.zeros(9)))


class _Judged:
    """A u for each class and, as the margin of each pixel, one that tells every wrong label."""

    def __init__(self, u_BC: torch.Tensor, known_BC: torch.Tensor) -> None:
        self.pairs = {"u": (u_BC, known_BC)}

    def pixels(self, labels_BHW: torch.Tensor, conf_BHW: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"margin_shown": torch.tensor([[[0.2, 1.9, 0.4, 1.0, 0.0]]])}


def test_u_and_confidence_judge_the_same_pixels() -> None:
    labels = torch.tensor([[[1, 1, 0, 0, IGNORE]]])
    truth = torch.tensor([[[1, 0, 0, 1, 1]]])
    conf, u = torch.tensor([[[0.1, 0.9, 0.5, 0.2, 0.0]]]), torch.tensor([[0.3, 0.7]])
    for known, foreground in ((torch.tensor([[True, True]]), 0.0), (torch.tensor([[True, False]]), math.nan)):
        scores = LabelScores(2, has_u=True)
        scores.add(labels, conf, truth, _Judged(u, known))
        found = scores.scores()
        assert found["labelled_train"] == 0.8 and found["pixel_conf_bg"] == 1.0 and found["pixel_u_bg"] == 0.5
        assert found["pixel_margin_shown_bg"] == 1.0
        assert found["pixel_conf_fg"] == foreground or math.isnan(foreground) and math.isnan(found["pixel_conf_fg"])
    bare = LabelScores(2, has_u=False)
    bare.add(labels, conf, truth, _Judged(u, torch.tensor([[False, False]])))
    assert bare.scores()["pixel_conf_fg"] == 0.0 and math.isnan(bare.scores()["pixel_u_fg"])


def test_the_table_is_paired_by_seed() -> None:
    results = {
        ("Base", 0): {"seg_val": 0.30, "cam_val": 0.2, "u_auroc_val": None},
        ("Base", 1): {"seg_val": 0.34, "cam_val": 0.3},
        ("IV", 0): {"seg_val": 0.33, "cam_val": 0.25},
        ("IV", 1): {"seg_val": 0.35, "cam_val": 0.29},
        ("IV", 2): {"seg_val": 0.9, "cam_val": 0.9},
        ("Full", 0): {"seg_val": 0.60},
        ("Full", 1): {"seg_val": 0.50},
    }
    found = summary(results)
    assert list(found["settings"]) == ["Base", "IV", "Full"]
    gap = found["minus_base"]["IV"]["seg_val"]
    assert list(gap["seeds"]) == ["0", "1"] and gap["mean"] == pytest.approx(0.02)
    assert gap["sd"] == pytest.approx(0.02 / math.sqrt(2))
    ratio = found["settings"]["IV"]["weak_full"]
    assert list(ratio["seeds"]) == ["0", "1"] and ratio["mean"] == pytest.approx((0.33 / 0.6 + 0.35 / 0.5) / 2)
    assert found["settings"]["IV"]["seg_val"]["mean"] == pytest.approx((0.33 + 0.35 + 0.9) / 3)
    titles = [title for title, *_ in parts(found)]
    assert titles == ["Scores", "Scores − Base, paired by seed", "What tells bad labels", "Chosen on train"]
    assert "| IV | 2 | – | – | – | – | – | +2.0 ± 4.2 |" in as_markdown(found, ["a|b"]).replace("− ", "−")
    assert "a\\|b" in as_markdown(found, ["a|b"])
