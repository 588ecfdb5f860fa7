"""Every command of docs/reproduce.md in a short form: a few photographs of VOC-676 and COCO, two steps."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import cluster.cli
import tuning.cli
import ugrl.cli
from tests.test_docs import ROOT, commands
from ugrl.data.shards import Manifest

PAGE = ROOT / "docs" / "reproduce.md"
DATA = ROOT.parent / "shared" / "data"
VOC676, COCO100 = DATA / "voc676" / "VOCdevkit" / "VOC2012", DATA / "coco100"
needs_data = pytest.mark.skipif(
    not (VOC676.is_dir() and COCO100.is_dir()), reason="VOC-676 and the COCO excerpt are not beside the checkout"
)
MAINS = {"ugrl": ugrl.cli.main, "ugrl-train": cluster.cli.main, "ugrl-tune": tuning.cli.main}
# A network of minutes: two steps at 64 px from scratch, measured on one image.
SHORT = [
    *("model.backbone=mit_b0", "model.weights=null", "model.decoder_dim=16", "data.crop=64", "data.threads=0"),
    *("train.steps=2", "train.global_batch=2", "train.lr_warmup_iters=1", "train.cls_warmup_iters=1", "eval.limit=1"),
    *("train.eval_every=2", "train.checkpoint_every=2", "train.picture_every=100", "method.cam.par_iterations=1"),
]
WIDTHS = ["method.uncertainty.d_cls=32", "method.contrast.d_seg=16"]
IDS = {"train": 12, "val": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder as the page assumes it: the first images of VOC-676 as the devkit, the COCO excerpt, one test image."""
    out = tmp_path_factory.mktemp("reproduce")
    devkit = out / "VOCdevkit" / "VOC2012"
    lists = devkit / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    folders = {"JPEGImages": ".jpg", "Annotations": ".xml", "SegmentationClassAug": ".png"}
    for split, most in IDS.items():
        ids = (VOC676 / "ImageSets" / "Segmentation" / f"{split}.txt").read_text().split()[:most]
        (lists / f"{split}.txt").write_text("\n".join(ids) + "\n")
        for folder, suffix in folders.items():
            (devkit / folder).mkdir(exist_ok=True)
            for id in ids:
                shutil.copy(VOC676 / folder / f"{id}{suffix}", devkit / folder)
    shutil.copy(lists / "train.txt", lists / "train_aug.txt")
    (out / "coco").symlink_to(COCO100)
    test_images = out / "VOC2012test" / "JPEGImages"
    test_images.mkdir(parents=True)
    shutil.copy(devkit / "JPEGImages" / f"{ids[0]}.jpg", test_images)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        yield out


def run(words: list[str], *more: str) -> None:
    """A command of the page, with what shortens it."""
    words = [w.replace("2014", "2017") if words[i - 1] == "--year" else w for i, w in enumerate(words)]
    assert MAINS[words[0]]([*words[1:], *more]) == 0, " ".join(words)


def those(*programs: str) -> list[list[str]]:
    found = [words for words in commands(PAGE) if words[0] in programs]
    return [words for words in found if "runs/voc-search/best.yaml" not in words]


@needs_data
@pytest.mark.full
@pytest.mark.timeout(1800)
def test_data_runs_and_scores(place: Path) -> None:
    """What prepares, trains, measures and predicts, in the order of the page."""
    done = [words for words in those("ugrl") if words[1] == "prepare"]
    for words in done:
        run(words)
    assert Manifest.load("shards/voc").rows("train") == 12 and "tune_val" not in Manifest.load("shards/voc").splits
    assert Manifest.load("shards/voc-search").rows("tune_val") == 1
    trained = those("ugrl-train")
    assert {words[words.index("--config") + 1] for words in trained} == {"voc-ugrl", "coco-ugrl", "voc-afa", "coco-afa"}
    for words in trained:
        run(words, *SHORT, *WIDTHS)
    measured = [words for words in those("ugrl") if words not in done]
    assert len(measured) >= 10 and {w for words in measured for w in words} >= {"afa", "toco", "seco", "native", "cam"}
    for words in measured:
        run(words)
    assert len(list(Path("labels/refined").iterdir())) == 1  # of eval.limit
    assert len(list(Path("results/VOC2012/Segmentation/comp6_test_cls").iterdir())) == 1


@needs_data
@pytest.mark.long
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_searches(place: Path) -> None:
    """One trial of each search, and the run that follows from the first."""
    for words in (words for words in those("ugrl") if words[1] == "prepare" and words[2] != "--verify"):
        if not Path(words[words.index("--out") + 1]).exists():
            run(words)
    for words in those("ugrl-tune"):
        widths = [] if "fig7" in words or words[words.index("--space") + 1] == "voc" else WIDTHS
        here = ["cluster.gpus_per_worker=0", "cluster.cpus_per_worker=1", "cluster.data_cpus=0"]
        run(words, "--trials", "1", "--workers", "1", *SHORT, *widths, *here)
        assert (Path(words[words.index("--out") + 1]) / "report.html").is_file()
    (last,) = (words for words in commands(PAGE) if "runs/voc-search/best.yaml" in words)
    run(last, "train.steps=3")
