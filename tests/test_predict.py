"""Masks and what goes with them: from pictures of every kind, in parts, again after a stop, for other programs."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.predictions import noise, photos, predict
from ugrl.cli import main
from ugrl.data.augment import normalize
from ugrl.data.reader import ShardReader
from ugrl.errors import ConfigError, DataError
from ugrl.eval import PALETTES
from ugrl.eval.palettes import OKABE_ITO, least_distance, palette
from ugrl.eval.protocol import PROTOCOLS
from ugrl.method.calibrate import Calibration
from ugrl.method.cam import multi_scale_cam
from ugrl.method.class_vectors import batch_vectors
from ugrl.method.doubts import pair_doubts
from ugrl.model.network import UGRLNet
from ugrl.predict.forward import How, segment
from ugrl.predict.inputs import as_picture, find_images
from ugrl.predict.maps import shown_classes
from ugrl.predict.model import Model
from ugrl.predict.overlay import overlay
from ugrl.predict.prediction import Prediction
from ugrl.predict.tiles import Tiling, weights
from ugrl.types import Sample, collate

CPU = torch.device("cpu")


# -- what is asked for ----------------------------------------------------------------------------


def test_frames_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = photos(tmp_path / "film", "f10 f9 f100 e2", (8, 8))
    (folder / "notes.txt").write_text("no image")
    names = ["e2.png", "f9.png", "f10.png", "f100.png"]
    assert [p.name for p in find_images([folder])] == names
    assert [p.name for p in find_images([tmp_path / "film" / "*"])] == names
    assert [p.name for p in find_images([tmp_path / "**" / "f?.png", folder / "f9.png"])] == ["f9.png"]
    (tmp_path / "[x]").mkdir()
    photos(tmp_path / "[x]", "y", (8, 8))
    assert [p.name for p in find_images([tmp_path / "[x]"])] == ["y.png"]
    for path, words in ((folder / "g*", "no image has a name of this pattern"), (folder / "g.png", "no such image")):
        with pytest.raises(DataError, match=words):
            find_images([path])


def test_an_image_is_the_same_by_path_by_picture_and_by_array(model: Model, tmp_path: Path) -> None:
    pixels = noise(40, 56)
    turned = Image.fromarray(pixels)
    note = Image.Exif()
    note[0x0112] = 6  # the camera was turned: the upright picture is 40 wide
    turned.save(tmp_path / "turned.png", exif=note)
    upright = np.rot90(pixels, -1)
    with Image.open(tmp_path / "turned.png") as image:
        kinds = (tmp_path / "turned.png", str(tmp_path / "turned.png"), image, np.ascontiguousarray(upright))
        found = [model.predict(kind) for kind in kinds]
    for one in found:
        assert (one.image == upright).all() and (one.mask == found[0].mask).all() and one.scores == found[0].scores
    grey = noise(40, 56)[..., 0]
    assert (as_picture(grey).pixels_HW3 == grey[..., None]).all()
    alpha = np.dstack([pixels, np.zeros((40, 56), np.uint8)])
    assert (as_picture(alpha).pixels_HW3 == pixels).all()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 3)), "an array of float64; expected uint8"),
        (np.zeros((3, 4, 5), np.uint8), r"shape \(3, 4, 5\); expected \(height, width, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), "shape"),
        (7, "'int'; expected a path, a Pillow image or a NumPy array"),
        ("nowhere.jpg", "nowhere.jpg: no such image"),
    ],
)
def test_what_is_no_image_is_named(image: object, words: str, model: Model) -> None:
    with pytest.raises(DataError, match=words):
        model.predict(image)
    if not isinstance(image, str):
        with pytest.raises(DataError, match="image 2: "):
            model.predict([noise(40, 40), image])


def test_a_list_gives_a_list_and_a_bad_image_does_not_lose_the_others(model: Model, tmp_path: Path) -> None:
    folder = photos(tmp_path / "in")
    (folder / "b.png").write_text("no image")
    with pytest.raises(DataError, match=r"b\.png: not a"):
        model.predict(folder)
    with pytest.warns(UserWarning, match=r"b\.png: not a") as told:
        found = model.predict(folder, on_error="skip", batch=2)
    assert len(told) == 1 and [None if p is None else p.path.name for p in found] == ["a.png", None, "c.png"]
    assert isinstance(model.predict(folder / "a.png"), Prediction)
    assert len(model.predict(str(folder / "[a]*.png"))) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"scales": (0.0,)}, "scales: 0.0; expected 0.1 … 8"),
        ({"batch": 0}, "batch is 0"),
        ({"tile": 64}, "tile is 64; expected at least 128"),
        ({"tile": 256, "overlap": 200}, "overlap is 200; expected 0 … 128"),
        ({"overlap": 32}, "without a tile"),
        ({"protocol": "dupl"}, "protocol is 'dupl'; expected native, afa, toco, seco"),
        ({"tag_prior": -1.0}, "config key 'eval.tag_prior' is -1.0; expected"),
        ({"protocol": "seco", "tile": 128}, "tile is 128, and eval.resize is square"),
        ({"palette": "vco"}, "did you mean 'voc'"),
        ({"on_error": "ignore"}, "expected 'raise' or 'skip'"),
    ],
)
def test_options_out_of_range_are_refused(more: dict, words: str, model: Model) -> None:
    with pytest.raises(ConfigError, match=words):
        model.predict(noise(40, 40), **more)


def test_a_batch_changes_nothing(model: Model) -> None:
    images = [noise(40, 56, 1), noise(48, 40, 2), noise(40, 56, 3), noise(40, 56, 4)]
    for one, many in zip([model.predict(i) for i in images], model.predict(images, batch=3), strict=True):
        assert (one.mask == many.mask).all()
        assert list(one.scores.values()) == pytest.approx(list(many.scores.values()), abs=1e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_mask_is_the_one_that_an_evaluation_scores(protocol: str, base: Path, shards: Path, tmp_path: Path) -> None:
    reader = ShardReader(shards, "val")
    (tmp_path / "in").mkdir()
    for row in (reader[0], reader[1]):
        (tmp_path / "in" / f"{row.id}.png").write_bytes(row.image)
    words = ["eval", str(base), "--data", str(shards), "--what", "seg", "--out", str(tmp_path / "scored")]
    assert main([*words, "--protocol", protocol, "--set", "eval.limit=2", "--device", "cpu"]) == 0
    assert predict(base, tmp_path / "in", "--out", tmp_path / "masks", "--protocol", protocol) == 0
    scored = tmp_path / "scored" / ("seg" if protocol == "native" else "crf")
    assert len(list(scored.iterdir())) == 2
    for path in scored.iterdir():
        one, other = (np.asarray(Image.open(p)) for p in (path, tmp_path / "masks" / path.name))
        assert (one == other).mean() > 0.999  # but for ties that rounding decides


def test_a_tag_prior_weighs_masks_as_an_evaluation_does(base: Path, shards: Path, tmp_path: Path) -> None:
    words = ["eval", str(base), "--data", str(shards), "--what", "seg", "--out", str(tmp_path), "--device", "cpu"]
    assert main([*words, "--set", "eval.limit=4", "eval.cam=false", "--tag-prior", "2"]) == 0
    reader, model = ShardReader(shards, "val"), Model(base, device="cpu")
    images = [np.asarray(Image.open(io.BytesIO(reader[k].image)).convert("RGB")) for k in range(4)]
    plain, large = model.predict(images), noise(200, 300)
    parts = model.predict(large, tile=128).mask
    weighed = model.predict(images, tag_prior=2.0)
    model.config = replace(model.config, eval=replace(model.config.eval, tag_prior=2.0))
    for k, found in enumerate(weighed):
        scored = np.asarray(Image.open(tmp_path / "seg" / f"{reader[k].id}.png"))
        assert (scored == found.mask).mean() > 0.999  # but for ties that rounding decides
        assert found.scores == plain[k].scores and (model.predict(images[k]).mask == found.mask).mean() > 0.999
    changed = sum(int((a.mask != b.mask).sum()) for a, b in zip(weighed, plain, strict=True))
    assert changed > 0
    assert (model.predict(large, tile=128).mask != parts).any()  # of each part, by what it shows


def test_masks_and_maps_follow_the_section_eval_of_the_run(base: Path) -> None:
    model = Model(base, device="cpu")
    image = noise(40, 56)
    own, plain = model.predict(image).cam, model.fingerprint
    eval_ = replace(model.config.eval, resize="square", side=64, cam_scales=(1.0, 2.0))
    model.config = replace(model.config, eval=eval_)
    assert model.how().eval.resize == "square" and model.how(protocol="native").eval.resize == "native"
    del model.fingerprint
    assert model.fingerprint != plain
    assert any((own[name] != cam).any() for name, cam in model.predict(image, protocol="native").cam.items())


# -- in parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [100, 128, 129, 160, 224, 300, 1000])
@pytest.mark.parametrize("tiling", [Tiling(128, 32), Tiling(128, 64), Tiling(256, 0), Tiling(192, 96)])
def test_parts_cover_an_axis_once(tiling: Tiling, length: int) -> None:
    spans = tiling.spans(length)
    total, core = np.zeros(length), np.zeros(length, int)
    for i, span in enumerate(spans):
        assert span.start % 32 == 0 and span.length <= tiling.size
        total[span.start : span.stop] += weights(spans, i)
        core[span.core[0] : span.core[1]] += 1
        assert span.start <= span.core[0] < span.core[1] <= span.stop
    assert abs(total - 1).max() < 1e-6 and (core == 1).all()


@pytest.fixture(scope="module")
def convolutional() -> UGRLNet:
    """A network whose logits depend on what is nearer than 192 pixels alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UGRLNet(num_classes=3, backbone="timm/test_resnet", decoder_dim=16, d_seg=8).eval()
    net.decoder.classify.weight.data *= 20
    return net


def test_parts_of_a_convolutional_network_are_exact_away_from_the_seams(convolutional: UGRLNet) -> None:
    image, tiling = noise(576, 448), Tiling.of(384, 192)
    (whole,) = segment(convolutional, [image], How(), CPU)
    (parts,) = segment(convolutional, [image], How(tiling=tiling, batch=2), CPU)
    assert len(np.unique(whole.labels_HW)) > 1
    rows = [(0, 192), (384, 576)]  # in one part alone
    for (top, bottom), (left, right) in ((row, column) for row in rows for column in [(0, 64), (384, 448)]):
        same = whole.labels_HW[top:bottom, left:right] == parts.labels_HW[top:bottom, left:right]
        assert same.mean() > 0.9995  # but for ties that rounding decides
    assert (whole.labels_HW == parts.labels_HW).mean() > 0.97
    assert whole.scores_F == pytest.approx(parts.scores_F, abs=0.02)


def test_parts_that_hold_the_whole_image_change_nothing(convolutional: UGRLNet) -> None:
    image = noise(200, 160)
    found = [segment(convolutional, [image], How(tiling=t), CPU)[0] for t in (None, Tiling.of(224))]
    assert (found[0].labels_HW == found[1].labels_HW).all() and (found[0].scores_F == found[1].scores_F).all()


def test_scales_mirror_and_crf_work_in_parts(convolutional: UGRLNet) -> None:
    how = How((1.0, 0.5), mirror=True, crf=True, tiling=Tiling.of(128, 32))
    (found,) = segment(convolutional, [noise(150, 170)], how, CPU)
    assert found.labels_HW.shape == (150, 170) and found.labels_HW.max() <= 3


def test_an_image_too_large_is_told_about_parts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ugrl.predict.forward.MOST_PIXELS", 200 * 300 - 1)
    with pytest.raises(DataError, match="image 1: 300 × 200 pixels; expected at most .* --tile 1024"):
        model.predict(noise(200, 300))
    found = model.predict(noise(200, 300), tile=128)
    assert found.mask.shape == (200, 300) and found.uncertainty.shape == (200, 300)


# -- CAM and uncertainty --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "say"), [((48, 64), 0.0), ((45, 70), 0.0), ((12, 50), 0.0), ((48, 64), 0.3), ((12, 50), 0.3)]
)
def test_cam_and_uncertainty_are_those_of_a_validation_with_the_shown_classes_as_tags(
    size: tuple[int, int], say: float, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"classifier": say, "decoder": say} if say else {}
    calibration = Calibration(len(model.names) + 1, eta=0.99, weights=weights, within_class=False)
    if say:
        calibration.pairs.moments_GK4.copy_(torch.tensor([0.5, 0.5, 1.0, 3.0]).expand(1, 2, 4))
        calibration.pairs.seen_GK.fill_(9)
    monkeypatch.setitem(model.prototypes._modules, "calibration", calibration)
    found = model.predict(noise(*size, seed=5))
    shown = shown_classes(found.mask, np.array(list(found.scores.values())))
    assert shown and [model.names.index(name) + 1 for name in found.cam] == list(shown)
    tags = np.isin(np.arange(len(model.names)) + 1, shown).astype(np.float32)
    extra = [(0, max(0, model.net.min_size - side)) for side in size]
    padded = np.pad(normalize(found.image), [(0, 0), *extra], "edge")
    batch = collate([Sample("x", padded, tags, None, np.array([0, size[0], 0, size[1]]))])
    c = model.config.method
    assert model._affinity
    with torch.no_grad():
        cam = multi_scale_cam(
            lambda x, view: model.net.cam(x, affinity=view.plain),
            batch.images_B3HW,
            batch.pairs_P2,
            batch.boxes_B4,
            scales=c.cam.scales,
            mirror=c.cam.mirror,
            least=model.net.min_size,
        )
        r, present = batch_vectors(batch, cam, radius=c.uncertainty.radius, local=True)
        heads = SimpleNamespace(
            scores=model.net.scores,
            probabilities=lambda: model.net.probabilities(model.net.encoder(batch.images_B3HW)[0]),
        )
        said = replace(c.uncertainty, classifier_weight=say, decoder_weight=say)
        u, known = model.prototypes.uncertainty(r, present, pair_doubts(said, heads, cam, batch))
    for k, cam_HW in enumerate(found.cam.values()):
        assert cam_HW == pytest.approx(cam.cam_PHW[k, : size[0], : size[1]].numpy(), abs=2e-4)
    want = torch.where(known, u, torch.nan)[0].numpy()
    assert np.isfinite(want).any()
    for label in range(len(want)):
        where = found.uncertainty[found.mask == label]
        assert where == pytest.approx(np.full(where.shape, want[label]), abs=1e-4, nan_ok=True)
    named = {
        name: want[([*model.names].index(name) + 1) if name != "background" else 0] for name in found.class_uncertainty
    }
    assert found.class_uncertainty == pytest.approx(named, abs=1e-4)


def test_cam_and_uncertainty_in_parts_are_near_those_of_the_whole(model: Model) -> None:
    """An attention network sees less in a part: only the frame is the same."""
    whole = model.predict(noise(160, 160))
    parts = model.predict(noise(160, 160), tile=128)
    for found in (whole, parts):
        for cam_HW in found.cam.values():
            assert cam_HW.shape == (160, 160) and 0 <= cam_HW.min() and cam_HW.max() < 1
        assert ((found.uncertainty >= 0) | np.isnan(found.uncertainty)).all()
    assert parts.class_uncertainty["background"] == pytest.approx(whole.class_uncertainty["background"], abs=0.3)


def test_a_prediction_without_a_network_says_so() -> None:
    bare = Prediction(np.zeros((2, 2), np.uint8), {"cat": 0.1}, np.zeros((2, 2, 3), np.uint8), ("cat",))
    assert bare.classes == () and bare.to_coco() == []
    with pytest.raises(DataError, match="no network"):
        _ = bare.cam


# -- pictures -------------------------------------------------------------------------------------


def test_safe_colours_are_told_apart_by_everybody() -> None:
    """ΔE of the nearest two of background and 20 classes, whatever a viewer's sight; VOC's own are 1 apart."""
    assert {name: palette(name).shape for name in PALETTES} == dict.fromkeys(PALETTES, (256, 3))
    for name, least in (("safe", 17), ("tol", 15)):
        colours = palette(name)
        assert colours[0].tolist() == [0, 0, 0] and colours[255].tolist() == [224, 224, 192]
        assert least_distance(colours[:21]) > least and least_distance(colours[:81]) > 6
    assert least_distance(palette("voc")[:21]) < 2
    assert [bytes(c).hex().upper() for c in palette("safe")[1:8]] == list(OKABE_ITO)


def test_an_overlay_shows_the_image_the_colours_and_the_names() -> None:
    image, mask = np.full((64, 64, 3), 100, np.uint8), np.zeros((64, 64), np.uint8)
    mask[:32, :32], mask[40:44, 40:44] = 2, 1
    colours = palette("safe")
    picture = overlay(image, mask, ("cat", "dog"), colours, alpha=0.5, legend=False)
    assert picture.size == (320, 320)  # enlarged five times
    small = np.asarray(picture)[2::5, 2::5]
    assert (small[mask == 0] == 100).all()
    assert small[10, 10].tolist() == pytest.approx(((100 + colours[2].astype(int)) / 2).tolist(), abs=1)
    assert small[31, 10].tolist() == colours[2].tolist()  # the outline
    below = np.asarray(overlay(image, mask, ("cat", "dog"), colours))[320:]
    for label in (1, 2):
        assert (below == colours[label]).all(-1).sum() > 50
    assert (below == 255).all(-1).mean() > 0.5
    long = overlay(image, np.full((64, 64), 1, np.uint8), ("x" * 300,), colours)
    assert long.width == 320
    empty = np.asarray(overlay(image, np.zeros_like(mask), ("cat", "dog"), colours))
    assert empty.shape[0] > 320  # which says: background


def test_a_mask_is_saved_as_png_and_never_over_its_image(model: Model, tmp_path: Path) -> None:
    path = photos(tmp_path, "a") / "a.png"
    before = path.read_bytes()
    found = model.predict(path, palette="tol")
    for name, words in ((path, "is the image itself"), (tmp_path / "m.jpg", "written as .png")):
        with pytest.raises(DataError, match=words):
            found.save(name)
    assert path.read_bytes() == before
    with Image.open(found.save(tmp_path / "new" / "m.png")) as mask:
        assert (np.asarray(mask) == found.mask).all() and mask.getpalette()[3:6] == palette("tol")[1].tolist()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        found.save(tmp_path / "file" / "m.png")
