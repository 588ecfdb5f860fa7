"""The protocols of the field against transcriptions of what their code does, and what ``ugrl eval`` makes of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.tiny import tiny_tree
from ugrl import cli
from ugrl.config import EvalConfig, build
from ugrl.data.augment import normalize
from ugrl.data.reader import ShardReader
from ugrl.errors import ConfigError
from ugrl.eval.combine import combined_scores, with_tag_prior
from ugrl.eval.crf import dense_crf, find_backend, sharpen
from ugrl.eval.evaluate import evaluate
from ugrl.eval.passes import BatchPasses, shape_batches
from ugrl.eval.protocol import PROTOCOLS, choose
from ugrl.eval.thresholds import REFINED_GRID, search_thresholds
from ugrl.method.refine import PAR
from ugrl.model.network import UGRLNet
from ugrl.train.build import build_net
from ugrl.train.loop import Trainer

CPU = torch.device("cpu")


def bilinear(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


@pytest.fixture(scope="module")
def net() -> UGRLNet:
    tree = tiny_tree()
    tree["model"] |= {"backbone": "mit_b0"}
    tree["data"] |= {"crop": 64}
    made = build_net(build(tree), 6).eval()
    made.decoder.classify.weight.data *= 40  # so that all classes are seen, and scales disagree
    return made


def both_ways(net: UGRLNet, x: Tensor) -> Tensor:
    """Logits of an image and of its mirror image, as one batch."""
    return net.segment(torch.cat([x, x.flip(-1)]))


# -- what others do, written anew from a description ------------------------------------------------


def as_afa(net: UGRLNet, image: Tensor) -> Tensor:
    """The longer side is brought to 512. At three scales the logits of image and mirror image are averaged on the map
    of scale 1; of the three maps each class keeps its largest value; that is enlarged to the photograph."""
    high, wide = image.shape[-2:]
    factor = 512 / max(high, wide)
    image = bilinear(image, int(high * factor), int(wide * factor))
    maps = []
    for scale in (1, 0.5, 0.75):
        x = image if scale == 1 else F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=False)
        logits = both_ways(net, x)
        if maps:
            logits = bilinear(logits, *maps[0].shape[-2:])
        maps.append(0.5 * (logits[0] + logits[1].flip(-1)))
    largest = maps[0].maximum(maps[1]).maximum(maps[2])
    return bilinear(largest[None], high, wide).softmax(1)


def as_toco(net: UGRLNet, image: Tensor) -> Tensor:
    """Three scales of the photograph, sides cut to whole pixels; logits enlarged to it, image plus mirror image."""
    high, wide = image.shape[-2:]
    maps = []
    for scale in (1.0, 1.5, 1.25):
        logits = bilinear(both_ways(net, bilinear(image, int(high * scale), int(wide * scale))), high, wide)
        maps.append(logits[:1] + logits[1:].flip(-1))
    return torch.stack(maps).amax(0).softmax(1)


def as_seco(net: UGRLNet, image: Tensor) -> Tensor:
    """As ToCo, but each scale is a square of 448 times it, whatever the photograph's shape."""
    high, wide = image.shape[-2:]
    maps = []
    for scale in (1.0, 1.25, 1.5):
        side = int(448 * scale)
        logits = bilinear(both_ways(net, bilinear(image, side, side)), high, wide)
        maps.append(logits[:1] + logits[1:].flip(-1))
    return torch.stack(maps).amax(0).softmax(1)


def as_authors(net: UGRLNet, image: Tensor) -> Tensor:
    """One pass over the photograph; logits enlarged to it."""
    return bilinear(net.segment(image), *image.shape[-2:]).softmax(1)


FIELD: dict[str, Callable[[UGRLNet, Tensor], Tensor]] = {
    "native": as_authors,
    "afa": as_afa,
    "toco": as_toco,
    "seco": as_seco,
}
# Weights and deviations of the two kernels: position, position and colour.
CRFS = {
    "afa": {"pos_w": 3.0, "pos_xy_std": 3.0, "bi_w": 4.0, "bi_xy_std": 64.0, "bi_rgb_std": 5.0},
    "toco": {"pos_w": 1.0, "pos_xy_std": 1.0, "bi_w": 4.0, "bi_xy_std": 121.0, "bi_rgb_std": 5.0},
}
CRFS["seco"] = CRFS["toco"]


def photograph(height: int, width: int) -> np.ndarray:
    """Smooth colours, so that scales differ and edges exist."""
    small = np.random.default_rng(height * width).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@torch.no_grad()
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_what_its_authors_code_does(name: str, net: UGRLNet) -> None:
    """Labels, and the probabilities that a CRF would get."""
    how, told = choose(EvalConfig(seg_scales=(0.5,), combine="max", crf_bi_w=9.0), name, {"crf_backend": "own"})
    assert len(told) == 1 and told[0].startswith(f"protocol {name}: seg_scales=[1")
    pixels = photograph(75, 98)  # of which no scale is a whole number of pixels
    image = torch.from_numpy(normalize(pixels))[None]
    got, want = combined_scores(net, image, how), FIELD[name](net, image)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert len(want.argmax(1).unique()) > 2
    others = [choose(EvalConfig(), other, {})[0] for other in PROTOCOLS if other != name]
    assert all((combined_scores(net, image, other) - want).abs().max() > 1e-3 for other in others)
    assert how.crf == (name in CRFS)
    plain = want[0].numpy()
    labels = sharpen(got[0].numpy(), pixels, how).argmax(0) if how.crf else got[0].argmax(0).numpy()
    final = dense_crf(plain, pixels, iterations=10, **CRFS[name]) if name in CRFS else plain
    assert (labels == final.argmax(0)).mean() > 0.999
    if name in CRFS:
        assert (labels != plain.argmax(0)).any()


@torch.no_grad()
@pytest.mark.parametrize("combine", ["mean", "max"])
@pytest.mark.parametrize("mirror_by", ["mean", "sum"])
@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_each_option_does_what_its_text_says(combine: str, mirror_by: str, of: str, net: UGRLNet) -> None:
    how = build(
        {"eval": {"combine": combine, "mirror_by": mirror_by, "combine_of": of, "mirror": True, "seg_scales": [1, 0.5]}}
    ).eval
    image = torch.from_numpy(normalize(photograph(95, 125)))[None]
    parts = []
    for size in ((95, 125), (48, 62)):  # of 47.5 and 62.5 Python rounds to the even one
        maps = bilinear(both_ways(net, bilinear(image, *size)), 95, 125)
        maps = maps.softmax(1) if of == "probabilities" else maps
        pair = maps[:1] + maps[1:].flip(-1)
        parts.append(pair / 2 if mirror_by == "mean" else pair)
    whole = parts[0].maximum(parts[1]) if combine == "max" else (parts[0] + parts[1]) / 2
    whole = whole / whole.sum(1, keepdim=True) if of == "probabilities" else whole.softmax(1)
    torch.testing.assert_close(combined_scores(net, image, how), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_tag_prior_is_that_of_loops(power: float) -> None:
    rng = np.random.default_rng(0)
    probs, tags = rng.dirichlet(np.ones(4), (2, 3, 5)).transpose(0, 3, 1, 2), rng.random((2, 3))
    tags[0, 1] = 0  # a class that the image cannot show
    got = with_tag_prior(torch.from_numpy(probs), torch.from_numpy(tags), power)
    for b, y, x in np.ndindex(2, 3, 5):
        ground, weighed = probs[b, 0, y, x], [probs[b, c, y, x] * tags[b, c - 1] ** power for c in (1, 2, 3)]
        want = [ground, *(w / sum(weighed) * (1 - ground) for w in weighed)]
        np.testing.assert_allclose(got[b, :, y, x], want, atol=1e-12)
    assert (got[0, 2] == 0).all()
    nothing = with_tag_prior(torch.tensor([0.0, 1.0, 0.0, 0.0])[None, :, None, None], torch.zeros(1, 3), power)
    assert nothing.flatten().tolist() == [1, 0, 0, 0]
    assert with_tag_prior(torch.from_numpy(probs), torch.from_numpy(tags), 0).equal(torch.from_numpy(probs))


def test_an_option_wins_over_the_protocol_and_that_is_said() -> None:
    given = {"seg_scales": (1.0,), "crf_bi_w": 5.0, "mirror": True, "objective": "cam_miou"}
    how, told = choose(EvalConfig(limit=7), "afa", given)
    assert (how.seg_scales, how.crf_bi_w, how.mirror, how.limit) == ((1.0,), 5.0, True, 7)
    assert how.objective == "cam_miou" and how.side == 512
    first, second = told
    assert "resize=long_side" in first and "seg_scales" not in first and "crf_bi_w" not in first
    assert second == (
        "given, so not as in protocol afa: seg_scales=[1] crf_bi_w=5 (instead of seg_scales=[1,0.5,0.75] crf_bi_w=4)"
    )
    assert choose(EvalConfig(), None, {"mirror": True}) == (EvalConfig(mirror=True), [])


def test_the_options_of_every_protocol_are_keys_that_may_have_them() -> None:
    for preset in PROTOCOLS.values():
        tree = {k: list(v) if isinstance(v, tuple) else v for k, v in preset.items()}
        assert replace(EvalConfig(), **preset) == build({"eval": tree}).eval


# -- the CAM at the size of a square ----------------------------------------------------------------


@torch.no_grad()
def test_a_cam_of_squares_is_enlarged_to_the_image(net: UGRLNet, shards: Path) -> None:
    tree = tiny_tree() | {"eval": {"cam_side": 96, "resize": "square", "side": 64}}
    cfg = build(tree)
    (read, *_) = shape_batches(ShardReader(shards, "val"), [0, 1, 2], 0, net.min_size)
    seen = BatchPasses(net, cfg, read, read.images_B3HW, net(read.images_B3HW, affinity=False, embed=False))
    size = read.images_B3HW.shape[-2:]
    square = bilinear(read.images_B3HW, 96, 96)
    total = torch.zeros(len(read.ids), 6, 96, 96)
    for scale in (1.0, 0.5):
        x = square if scale == 1.0 else bilinear(square, 48, 48)
        for_x, for_mirror = (bilinear(net.raw_from(net.encoder(v)[0][3]), 96, 96) for v in (x, x.flip(-1)))
        total += for_x.maximum(for_mirror.flip(-1)).relu()
    for pair, (b, f) in enumerate(read.pairs_P2.tolist()):
        one = total[b, f] - total[b, f].min()
        one = one / (one.max() + 1e-5)
        torch.testing.assert_close(seen.cam.cam_PHW[pair], bilinear(one[None, None], *size)[0, 0], atol=1e-4, rtol=1e-3)
    assert seen.cam.f4_BDhw is seen.plain.features[3]
    torch.testing.assert_close(  # no pass of another size is taken for one of the segmentation
        seen.seg_probs_BCHW, bilinear(net.segment(bilinear(read.images_B3HW, 64, 64)), *size).softmax(1)
    )


@torch.no_grad()
def test_a_cam_that_is_scored_may_have_scales_of_its_own(net: UGRLNet, shards: Path) -> None:
    (read, *_) = shape_batches(ShardReader(shards, "val"), [0, 1, 2], 0, net.min_size)
    plain = net(read.images_B3HW, affinity=False, embed=False)

    def cam(scales: list[float], scored: list[float] | None) -> torch.Tensor:
        tree = tiny_tree()
        tree["method"] = tree.get("method", {}) | {"cam": tree.get("method", {}).get("cam", {}) | {"scales": scales}}
        cfg = build(tree | {"eval": {"cam_scales": scored}})
        return BatchPasses(net, cfg, read, read.images_B3HW, plain).cam.cam_PHW

    torch.testing.assert_close(cam([1.0], [1.0, 1.5]), cam([1.0, 1.5], None), rtol=0, atol=0)
    assert not torch.equal(cam([1.0], [1.0, 1.5]), cam([1.0], None))
    with pytest.raises(ConfigError, match=r"eval.cam_scales is \[0.5\]; expected 1.0 among them, or null"):
        cam([1.0], [0.5])


# -- CRF by another package -------------------------------------------------------------------------


def test_both_ways_to_compute_a_crf_agree() -> None:
    pytest.importorskip("pydensecrf", reason="pip install 'ugrl[crf]': built from source")
    pixels = photograph(60, 80)
    logits = np.random.default_rng(1).normal(0, 1, (4, 8, 10)).astype(np.float32)
    probs = bilinear(torch.from_numpy(logits)[None] * 3, 60, 80)[0].softmax(0).numpy()
    for settings in CRFS.values():
        own = dense_crf(probs, pixels, **settings)
        theirs = dense_crf(probs, pixels, **settings, backend="pydensecrf")
        np.testing.assert_allclose(theirs.sum(0), 1, atol=1e-4)
        assert (own.argmax(0) == theirs.argmax(0)).mean() > 0.98
        assert (own.argmax(0) != probs.argmax(0)).mean() > 0.01
    assert find_backend("auto") == "pydensecrf" and find_backend("own") == "own"


def test_a_package_that_is_not_there_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert find_backend("auto") == "own"
    with pytest.raises(ConfigError, match=r"eval.crf_backend is pydensecrf, .*pip install 'ugrl\[crf\]'"):
        find_backend("pydensecrf")


# -- thresholds -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("protocol") / "run"
    tree = tiny_tree(steps=2, cls_warmup_iters=1, lr_warmup_iters=1, checkpoint_every=2, eval_every=2)
    Trainer(build(tree), shards=shards, out=out, quiet=True, device="cpu").fit()
    return out


def test_a_threshold_is_the_best_of_its_images(net: UGRLNet, shards: Path) -> None:
    """The score at the threshold is the one that a validation finds there, and no other threshold's is higher."""
    cfg, par = build(tiny_tree() | {"eval": {"limit": 6}}), PAR(iterations=2, dilations=(1, 2))
    reader = ShardReader(shards, "train")
    found = search_thresholds(net, reader, cfg, device=CPU, par=par)

    def score(name: str, cam: float, refined: float | None = None) -> float:
        how = replace(cfg.eval, cam_background=cam, refined_background=refined, refined_cam=refined is not None)
        got = evaluate(net, reader, replace(cfg, eval=how), device=CPU, par=par, segment=False)
        assert "seg_miou" not in got.metrics and not got.verdict
        return got.metrics[name]

    cam, refined = found["cam"], found["refined"]
    assert score("cam_miou", cam.value) == pytest.approx(cam.miou, abs=1e-9)
    assert all(score("cam_miou", t) <= cam.miou + 1e-9 for t in (0.1, 0.3, 0.45, 0.6, 0.8))
    assert refined.value in REFINED_GRID
    assert score("refined_miou", 0.45, refined.value) == pytest.approx(refined.miou, abs=1e-9)
    assert all(score("refined_miou", 0.45, t) <= refined.miou + 1e-9 for t in (0.1, 0.45, 0.7))


def measured(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict, str]:
    assert cli.main(["eval", *words, "--device", "cpu", "--json"]) == 0
    text, told = capsys.readouterr()
    return json.loads(text), told


def test_eval_searches_on_train_and_measures_on_val(
    run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run), "--data", str(shards)]
    got, told = measured([*words, "--what", "cam", "refined", "--set", "eval.limit=5"], capsys)
    assert set(got["thresholds"]) == {"searched_on", "cam", "refined"}
    assert got["thresholds"]["searched_on"] == "split 'train'" and got["split"] == "val"
    assert {"cam_miou", "refined_miou"} <= set(got["metrics"]) and "seg_miou" not in got["metrics"]
    assert got["options"]["cam_background"] == got["thresholds"]["cam"]["value"]
    assert got["options"]["refined_background"] == got["thresholds"]["refined"]["value"]
    assert "background threshold of cam: 0." in told and "the best of split 'train'" in told
    fixed, told = measured([*words, "--what", "cam", "--threshold", "0.3", "--set", "eval.limit=5"], capsys)
    assert fixed["options"]["cam_background"] == 0.3 and "thresholds" not in fixed
    only, _ = measured([*words, "--what", "seg", "--protocol", "toco", "--out", str(tmp_path / "m")], capsys)
    assert (only["protocol"], only["crf"]) == ("toco", find_backend("auto"))
    assert {"seg_miou", "crf_miou"} <= set(only["metrics"]) and "cam_miou" not in only["metrics"]
    written = sorted(p.relative_to(tmp_path).as_posix() for p in (tmp_path / "m").rglob("*.png"))
    ids = ShardReader(shards, "val").ids
    assert written == sorted(f"m/{kind}/{id}.png" for kind in ("seg", "crf") for id in ids)
    with Image.open(tmp_path / written[0]) as mask:
        assert mask.mode == "P" and int(np.asarray(mask).max()) <= 6
    os.unlink(tmp_path / written[0])
    Image.new("P", (4, 4)).save(tmp_path / written[0])
    assert cli.main(["eval", *words, "--what", "seg", "--crf", "--out", str(tmp_path / "m"), "--device", "cpu"]) == 2
    assert "exists already, and ugrl has not written it" in capsys.readouterr().err


def test_a_list_names_rows_of_any_split(
    run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows of train and tune_val together are what train was before it was cut."""
    ids = [*ShardReader(shards, "tune_val").ids[:2], *ShardReader(shards, "train").ids[:3]]
    file = tmp_path / "train.txt"
    file.write_text("\n\n".join(ids) + "\n")
    words = [str(run), "--data", str(shards), "--list", str(file)]
    got, told = measured([*words, "--what", "cam", "--threshold-from", str(file), "--out", str(tmp_path / "m")], capsys)
    assert (got["images"], got["split"], got["list"]) == (5, None, str(file))
    assert f"list {file}: 5 images" in told and f"the best of list {file}" in told
    # The images that are measured are those that were searched: the same score.
    assert got["metrics"]["cam_miou"] == pytest.approx(got["thresholds"]["cam"]["miou"])
    assert {p.stem for p in (tmp_path / "m/cam").iterdir()} == set(ids)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--what", "cam", "--threshold-from", "val"], "has images of split 'val', which the score is for"),
        (["--what", "cam", "--split", "tune_val", "--threshold-from", "tune_val"], "split 'tune_val', which the score"),
        (["--what", "cam", "--threshold-from", "trian"], "has no split 'trian', only 'train', 'tune_val', 'val'"),
        (["--what", "cam", "--threshold", "0.4", "--threshold-from", "train"], "expected one of the two"),
        (["--what", "seg", "--threshold", "0.4"], "--threshold is for the CAM, which --what seg leaves out"),
        (
            ["--what", "seg", "--threshold-from", "train"],
            "--threshold-from is for the CAM, which --what seg",
        ),
        (["--what", "cam", "--scales", "1", "2"], "--scales is for the segmentation, which --what cam leaves out"),
        (["--what", "cam", "refined", "--crf"], "--crf is for the segmentation, which --what cam refined leaves out"),
        (["--list", "wrong.txt", "--split", "val"], "--list and --split; expected one of the two"),
        (["--list", "nobody.txt"], "nobody.txt"),
        (["--list", "wrong.txt"], "wrong.txt: line 2: 'no_image' is in no split of"),
        (["--list", "twice.txt"], "was named before; expected each image once"),
        (["--list", "empty.txt"], "names no image"),
        (["--set", "eval.cam_side=8"], "config key eval.cam_side is 8; expected 0 or ≥ 32"),
        (["--set", "train.steps=4"], "--set train.steps: expected a key of the section eval"),
        (["--set", "eval.combine=most"], "config key 'eval.combine' is 'most'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    more: list[str],
    error: str,
    run: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    one = ShardReader(shards, "train").ids[0]
    Path("wrong.txt").write_text(f"{one}\nno_image\nno_other\n")
    Path("twice.txt").write_text(f"{one}\n{one}\n")
    Path("empty.txt").write_text("\n\n")
    assert cli.main(["eval", str(run), "--data", str(shards), "--device", "cpu", *more]) == 2
    told = capsys.readouterr().err
    assert error in told and told.count("error: ") == 1


def test_a_threshold_needs_masks(tmp_path: Path, run: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a train split whose masks were left out, as VOC's is without SegmentationClassAug."""
    bare = tmp_path / "bare"
    strip_masks(shards, bare)
    words = ["eval", str(run), "--data", str(bare), "--what", "cam", "--device", "cpu"]
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert "threshold: split 'train': " in told and "--threshold T, or --threshold-from" in told
    # The labels of images without masks can still be had.
    assert cli.main([*words, "--threshold", "0.4", "--split", "train", "--out", str(tmp_path / "labels")]) == 0
    assert len(list((tmp_path / "labels/cam").iterdir())) == len(ShardReader(bare, "train"))


def strip_masks(shards: Path, out: Path) -> None:
    from ugrl.data.prepare import prepare
    from ugrl.data.shapes import ShapesSource, ShapesSpec
    from ugrl.row import Row

    class Bare(ShapesSource):
        def row(self, split: str, id: str) -> Row:
            row = super().row(split, id)
            return replace(row, mask=None) if split == "train" else row

    prepare(Bare(ShapesSpec(train=24, val=16, size=48, difficulty=0.5, seed=3)), out, tune_val=0.17)
