"""Masks in and out: scored, taught by, and handed on to other programs."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ugrl
from tests import test_train as two
from tests.own import own_shards
from tests.predictions import trained
from tests.test_data_loader_ray import asked, blocks, ray_data
from tests.tiny import tiny_tree
from tuning.cli import check_data
from tuning.space.options import Objective
from tuning.space.search import Search
from tuning.space.space_file import build_space
from ugrl.cli import main
from ugrl.config import build
from ugrl.data.images import decode_labels, encode_labels
from ugrl.data.mask_folder import MaskFolder, TaughtSource
from ugrl.data.pages import MappedShard
from ugrl.data.prepare import prepare
from ugrl.data.reader import ShardReader
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.data.shards import Manifest, open_shard, verify
from ugrl.data.voc import VocSource
from ugrl.errors import ConfigError, DataError
from ugrl.eval.masks import Masks, comparison
from ugrl.eval.metrics import Confusion
from ugrl.export import labels as exported
from ugrl.method.teacher import agreed_labels, tagged, teacher_labels
from ugrl.method.weighting import modulation_weights
from ugrl.storage import place
from ugrl.train.batches import local_loader
from ugrl.train.flops import step_gflop
from ugrl.train.loop import Trainer
from ugrl.train.restore import restore
from ugrl.types import IGNORE, Batch
from ugrl.view.collect import looks, open_run, open_split

SPEC = ShapesSpec(train=24, val=16, size=48, difficulty=0.5, seed=3)
CPU = torch.device("cpu")


def labels_of(data: bytes | None) -> np.ndarray:
    return np.asarray(decode_labels(data or b"", "a mask"))


def write(folder: Path, id: str, labels_HW: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{id}.png").write_bytes(encode_labels(labels_HW))


def truth(shards: Path, split: str, folder: Path, change: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> Path:
    """A folder of the true masks of a split, changed."""
    reader = ShardReader(shards, split)
    for k, id in enumerate(reader.ids):
        write(folder, id, change(labels_of(reader[k].mask).copy()))
    return folder


def shifted(labels_HW: np.ndarray) -> np.ndarray:
    """What a teacher gets wrong: all is moved, a strip is class 5 in every image, another one is undecided."""
    out = np.roll(labels_HW, 2, axis=1)
    out[:6, :20] = 5
    out[40:, 30:] = IGNORE
    return out


@pytest.fixture(scope="module")
def teacher(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "sam"
    for split in ("train", "tune_val"):
        truth(shards, split, folder, shifted)
    return folder


@pytest.fixture(scope="module")
def taught(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of ``shards``, with teacher masks for those of train."""
    out = tmp_path_factory.mktemp("taught") / "shards"
    prepare(TaughtSource(ShapesSource(SPEC), teacher), out, tune_val=0.17, seed=0)
    return out


@pytest.fixture(scope="module")
def base(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(shards, tmp_path_factory.mktemp("masks") / "base")


def tree(source: str, **method: Any) -> dict[str, Any]:
    made = tiny_tree()
    made["method"] |= {"pseudo": {"source": source}, **method}
    return made


# ---- shards --------------------------------------------------------------------------------------


def test_teacher_masks_are_a_column_that_only_those_read_who_ask(
    shards: Path, taught: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = verify(taught)
    assert (manifest.schema_version, Manifest.load(shards).schema_version) == (2, 1)
    assert {s: (i.with_teachers, i.rows) for s, i in manifest.splits.items()} == {
        "train": (20, 20),
        "tune_val": (4, 4),
        "val": (0, 16),
    }
    assert manifest.options["teacher"] == "sam" and "/" not in json.dumps(manifest.options)
    for split in manifest.splits:
        plain, without, with_it = (
            ShardReader(folder, split, teacher=ask) for folder, ask in ((shards, True), (taught, False), (taught, True))
        )
        assert plain.ids == with_it.ids
        for k, id in enumerate(plain.ids):
            assert without[k] == plain[k] and plain[k].teacher is None
            assert with_it[k] == replace(plain[k], teacher=with_it[k].teacher)
            if split == "val":
                assert with_it[k].teacher is None
            else:
                assert with_it[k].teacher == (teacher / f"{id}.png").read_bytes()

    # By the library, as from a remote storage: one column less.
    read: list[Any] = []
    monkeypatch.setattr(ShardReader, "_map", lambda *_: None)
    real = open_shard(taught / "train-00000.parquet").__class__.read_row_group

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        read.append(options["columns"])
        return real(self, *args, **options)

    monkeypatch.setattr("pyarrow.parquet.ParquetFile.read_row_group", spy)
    for ask in (False, True):
        reader = ShardReader(taught, "train", teacher=ask)
        assert [reader[k].teacher is not None for k in range(3)] == [ask] * 3
    assert read == [["id", "image", "width", "height", "tags", "mask"], None]


def test_the_mapped_reader_knows_the_column_by_name(taught: Path) -> None:
    path = taught / "train-00000.parquet"
    with open_shard(path) as file:
        rows = [MappedShard(path, file, columns).row(9, 1, 8) for columns in (("image", "mask"), ("image",))]
    assert rows[0].mask is not None and rows[0].teacher is None and rows[1].mask is None


def test_prepare_takes_a_folder_of_masks(
    shards: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sam = Path(shutil.copytree(teacher, tmp_path / "sam"))
    write(sam, "stranger", np.zeros((4, 4), np.uint8))
    words = ["prepare", "shapes", "--train", "24", "--val", "16", "--size", "48", "--seed", "3", "--tune-val", "0.17"]
    assert main([*words, "--out", str(tmp_path / "out"), "--teacher", str(sam)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"train.*20.*20.*20", text) and "teacher masks" in text
    assert "1 × teacher mask of no image (such as stranger.png)" in text
    assert "16 × image without a teacher mask (such as val_000000)" in text


def test_the_python_api_takes_a_folder_of_masks_too(tmp_path: Path) -> None:
    own_shards(tmp_path)
    write(tmp_path / "sam", "p0", np.ones((40, 40), np.uint8))
    made = ugrl.prepare(tmp_path / "own", tmp_path / "taught", teacher=tmp_path / "sam", tune_val=0, quiet=True)
    reader = ShardReader(made, "train", teacher=True)
    assert [id for k, id in enumerate(reader.ids) if reader[k].teacher is not None] == ["p0"]


def test_masks_of_two_teachers_are_not_mixed(teacher: Path, tmp_path: Path) -> None:
    """What one folder has begun, another one of the same name does not end; the first one, mended, does."""
    first, second = (Path(shutil.copytree(teacher, tmp_path / name / "sam")) for name in ("one", "two"))
    last = ShapesSource(SPEC).splits()["train"][-1]
    spoiled(first, last, "cut off")
    with pytest.raises(DataError, match=r"5 of 10 shards stay in .*out\.partial"):
        prepare(TaughtSource(ShapesSource(SPEC), first), tmp_path / "out", tune_val=0, shard_rows=4)
    with pytest.raises(DataError, match="begun with teacher '.*one/sam', now '.*two/sam'"):
        prepare(TaughtSource(ShapesSource(SPEC), second), tmp_path / "out", tune_val=0, shard_rows=4)
    with pytest.raises(DataError, match="begun with schema_version 2, now 1"):
        prepare(ShapesSource(SPEC), tmp_path / "out", tune_val=0, shard_rows=4)
    shutil.copy(teacher / f"{last}.png", first)
    made = prepare(TaughtSource(ShapesSource(SPEC), first), tmp_path / "out", tune_val=0, shard_rows=4)
    whole = prepare(TaughtSource(ShapesSource(SPEC), second), tmp_path / "whole", tune_val=0, shard_rows=4)
    assert made.to_json() == whole.to_json() and made.splits["train"].with_teachers == 24


def spoiled(folder: Path, id: str, how: str) -> None:
    path = folder / f"{id}.png"
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-30])
    elif how == "size":
        write(folder, id, np.zeros((48, 40), np.uint8))
    elif how == "label":
        write(folder, id, np.full((48, 48), 7, np.uint8))
    elif how == "colours":
        Image.new("RGB", (48, 48)).save(path)
    elif how == "gone":
        path.unlink()
    elif how == "other names":
        for old in folder.iterdir():
            old.rename(old.with_name(f"x{old.name}"))
    else:
        shutil.rmtree(folder)


WRONG = [
    ("cut off", "{id}.png: truncated image"),
    ("size", "{id}.png: the mask is 40×48; expected 48×48 as the image"),
    ("label", "{id}.png: the mask holds label 7; expected 0…6 or 255"),
    ("colours", "{id}.png: mask of mode RGB; expected class indices (a palette or gray PNG), not colours"),
    ("other names", "PNG files such as x"),
    ("no folder", "sam: no such folder; expected one of masks, ID.png for each image"),
]


@pytest.mark.parametrize(("how", "words"), WRONG)
def test_a_teacher_mask_that_cannot_be_used_is_named(how: str, words: str, teacher: Path, tmp_path: Path) -> None:
    sam = Path(shutil.copytree(teacher, tmp_path / "sam"))
    spoiled(sam, "train_000002", how)
    with pytest.raises(DataError, match=re.escape(words.format(id="train_000002"))) as caught:
        prepare(TaughtSource(ShapesSource(SPEC), sam), tmp_path / "out", tune_val=0)
    assert str(caught.value).isprintable() and not (tmp_path / "out").exists()
    if how in ("cut off", "size", "label", "colours"):  # or the image is left out and counted
        manifest = prepare(TaughtSource(ShapesSource(SPEC), sam), tmp_path / "out", tune_val=0, on_error="skip")
        assert manifest.splits["train"].left_out == {"unusable mask": 1}


# ---- batches -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mirrored(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose teacher masks are the true ones: whatever moves the one must move the other."""
    folder = tmp_path_factory.mktemp("mirrored")
    for split in ("train", "tune_val"):
        truth(shards, split, folder / "same")
    prepare(TaughtSource(ShapesSource(SPEC), folder / "same"), folder / "shards", tune_val=0.17, seed=0)
    return folder / "shards"


def same_batch(a: Batch, b: Batch) -> None:
    assert a.ids == b.ids
    for name in ("images_B3HW", "tags_BF", "boxes_B4", "masks_BHW", "pairs_P2", "teachers_BHW"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None) and (x is None or torch.equal(x, y)), name


@pytest.mark.parametrize("mode", ["none", "normalize", "augment"])
@pytest.mark.parametrize("cache_mb", [0, 1])
def test_augmentation_moves_a_teacher_mask_as_it_moves_the_true_one(mirrored: Path, mode: str, cache_mb: int) -> None:
    """In both loaders, with the images kept and without; and whether the true masks come along or not."""
    spec = asked(mirrored, on_device=mode, cache_mb=cache_mb, masks_every=2, crop=56, teacher=True)
    outside, flipped = 0, 0
    with ray_data.Feeder(spec, blocks(spec, [3, 2, 9, 18], stream=f"{mode}{cache_mb}")) as feeder:
        for k, loaded in zip(range(8), local_loader(replace(spec, data=replace(spec.data, threads=2))), strict=False):
            batch = loaded.to("cpu")
            same_batch(feeder.next().to("cpu"), batch)
            assert batch.teachers_BHW is not None and (batch.masks_BHW is not None) == (k % 2 == 0)
            if batch.masks_BHW is not None:
                assert torch.equal(batch.teachers_BHW, batch.masks_BHW)
                outside += int((batch.teachers_BHW == IGNORE).sum())
                flipped += 1
    assert outside > 0 and flipped == 4


def test_a_kept_image_of_a_run_without_teacher_serves_none_with_it(mirrored: Path) -> None:
    from ugrl.data.cache import PixelCache

    cache, plain = PixelCache(10), asked(mirrored, rank=0, world=1)
    for teacher in (False, True, False):
        batches = local_loader(replace(plain, teacher=teacher), cache)
        for _ in range(6):
            assert (next(batches).to("cpu").teachers_BHW is not None) == teacher


def test_a_row_without_a_teacher_mask_is_named_by_the_loader(taught: Path) -> None:
    batches = local_loader(replace(asked(taught), split="val", teacher=True))
    with pytest.raises(DataError, match=r"val-00000\.parquet: row val_\d+: no teacher mask; method\.pseudo\.source"):
        next(batches)


@pytest.mark.ray
def test_ray_data_carries_teacher_masks(mirrored: Path) -> None:
    """Through the object store of a real cluster, on the second of two ranks."""
    from cluster.connect import start_ray, stop_ray
    from cluster.ray_data import ray_loader

    spec = asked(mirrored, crop=56, teacher=True, total_steps=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        start_ray(cpus=2)
        try:
            batches = [loaded.to("cpu") for loaded in ray_loader(spec)]
        finally:
            stop_ray()
    assert len(batches) == 4
    for batch, local in zip(batches, local_loader(spec), strict=False):
        same_batch(batch, local.to("cpu"))
        assert batch.teachers_BHW is not None


# ---- labels --------------------------------------------------------------------------------------


def scene() -> tuple[Batch, torch.Tensor]:
    """Two images of 4 × 5 px and three classes, with any label of the teacher, and a CAM for each tag."""
    rng = np.random.default_rng(1)
    tags_BF = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    teachers = torch.from_numpy(rng.choice([0, 1, 2, 3, 255], (2, 4, 5)).astype(np.uint8))
    boxes_B4 = torch.tensor([[0, 4, 0, 5]] * 2)
    batch = Batch(("a", "b"), torch.zeros(2, 3, 4, 5), tags_BF, boxes_B4, None, tags_BF.nonzero(), teachers)
    return batch, torch.from_numpy(rng.random((2, 4, 5))).float()


def test_tags_decide_which_classes_of_a_teacher_count() -> None:
    batch, cam_PHW = scene()
    labels_BHW, conf_BHW = teacher_labels(batch, cam_PHW)
    assert batch.teachers_BHW is not None
    cams = {(0, 1): cam_PHW[0], (0, 3): cam_PHW[1]}
    for b, y, x in np.ndindex(2, 4, 5):
        said, got, conf = (int(batch.teachers_BHW[b, y, x]), int(labels_BHW[b, y, x]), float(conf_BHW[b, y, x]))
        most = max((float(c[y, x]) for (i, _), c in cams.items() if i == b), default=0.0)
        if said == 0:
            assert (got, conf) == (0, pytest.approx(1 - most))
        elif (b, said) in cams:
            assert (got, conf) == (said, float(cams[b, said][y, x]))
        else:
            assert (got, conf) == (IGNORE, 0.0)
    with pytest.raises(DataError, match="a, b has no teacher mask"):
        tagged(replace(batch, teachers_BHW=None))


@pytest.mark.parametrize("u_max", [0.0, 1.0, 2.0])
def test_agreement_believes_a_teacher_alone_only_where_u_is_low(u_max: float) -> None:
    """Against a loop over all pixels: both say it, or the CAM is undecided and u of the class is at most the bound."""
    batch, _ = scene()
    assert batch.teachers_BHW is not None
    rng = np.random.default_rng(2)
    cam_BHW = torch.from_numpy(rng.choice([0, 1, 3, 255], (2, 4, 5)))
    conf_BHW = torch.from_numpy(rng.random((2, 4, 5))).masked_fill(cam_BHW == IGNORE, 0)
    u_BC = torch.tensor([[0.4, 0.9, 0.0, 1.7], [2.0, 0, 0, 0]])
    known_BC = torch.tensor([[True, False, False, True], [True, False, False, False]])
    labels_BHW, found_BHW = agreed_labels(batch, cam_BHW, conf_BHW, u_BC, known_BC, u_max=u_max)
    kinds = set()
    for at in np.ndindex(2, 4, 5):
        b, said, cam = at[0], int(batch.teachers_BHW[at]), int(cam_BHW[at])
        said = said if said == 0 or (b == 0 and said in (1, 3)) else IGNORE
        alone = said != IGNORE and cam == IGNORE and bool(known_BC[b, said]) and float(u_BC[b, said]) <= u_max
        want = said if said != IGNORE and (cam == said or alone) else IGNORE
        kinds.add((cam == said, alone))
        assert int(labels_BHW[at]) == want
        assert float(found_BHW[at]) == (float(conf_BHW[at]) if want != IGNORE else 0.0)
    assert (True, False) in kinds and ((False, True) in kinds) == (u_max > 0)


def first_batch(trainer: Trainer) -> Batch:
    batches = trainer.loader(trainer.loader_spec())
    return next(batches).to("cpu", trainer.dtype)


@pytest.mark.parametrize("setting", ["Base", "IV"])
@pytest.mark.parametrize("source", ["teacher", "agree"])
def test_everything_behind_the_labels_uses_the_teacher(source: str, setting: str, taught: Path) -> None:
    """Weights by u, the pool and the pairs of the affinity loss are of the new labels; the losses are finite."""
    trainer = Trainer(build(tree(source, setting=setting)), shards=taught, out=None, quiet=True, device="cpu")
    batch = first_batch(trainer)
    step, schedule = 3, trainer.step_fn.schedule
    assert batch.teachers_BHW is not None and not schedule.warm(step)
    want = tagged(batch)
    trainer.step_fn.targets(batch, 0)  # gives prototypes
    found = trainer.step_fn.targets(batch, step)
    assert found.labels_BHW is not None and found.u_BC is not None and found.w_BC is not None
    decided = found.labels_BHW != IGNORE
    assert bool(decided.any()) and bool(((want == found.labels_BHW) | ~decided).all())
    if source == "teacher":
        assert torch.equal(found.labels_BHW, want)
    n_BC = torch.stack([(want == c).flatten(1).sum(1) for c in range(7)], 1) if source == "teacher" else None
    if setting == "IV":
        assert found.pool_Bhw is not None and found.small_Bhw is not None
        assert bool((found.small_Bhw[found.pool_Bhw] != IGNORE).all()) and bool(found.pool_Bhw.any())
        if n_BC is not None:
            known_BC = found.u_BC > 0
            c = trainer.cfg.method.uncertainty
            weights = modulation_weights(found.u_BC, known_BC, n_BC, strength=c.beta, per_class=True)
            torch.testing.assert_close(found.w_BC, weights)
    assert found.coarse_Bhw is not None and set(found.coarse_Bhw.unique().tolist()) <= set(
        found.labels_BHW.unique().tolist()
    )
    trainer.net.train()
    out = trainer.step_fn(batch, step)
    out.loss.backward()
    assert all(torch.isfinite(value) for value in out.terms.values())


def test_without_a_teacher_nothing_of_it_is_read(taught: Path, shards: Path) -> None:
    """The same run on shards with the column and without."""
    made = [Trainer(build(tiny_tree()), shards=s, out=None, quiet=True, device="cpu") for s in (shards, taught)]
    assert not any(t.loader_spec().teacher for t in made)
    a, b = (first_batch(t) for t in made)
    same_batch(a, b)
    assert a.teachers_BHW is None


def test_the_operations_of_a_taught_step_are_counted() -> None:
    """Without PAR (whose operations are elementwise and not counted) nothing is added or missing."""
    counts = [step_gflop(build(tree(source)), 6) for source in ("cam", "teacher")]
    assert counts[0] == pytest.approx(counts[1], rel=0.02)
    assert step_gflop(build(tree("agree")), 6) <= counts[0] * 1.02


@pytest.mark.parametrize("source", ["teacher", "agree"])
def test_two_ranks_learn_from_a_teacher_as_one_does(source: str, taught: Path, tmp_path: Path) -> None:
    made = tree(source)
    for world in (1, 2):
        two.run(made, taught, tmp_path / f"world{world}", world=world)
    one, both = two.losses(tmp_path / "world1"), two.losses(tmp_path / "world2")
    assert [line["step"] for line in one] == [line["step"] for line in both] and len(one) > 4
    for a, b in zip(one, both, strict=True):
        two.close(a, b, rel=1e-8, floor=1e-12)


def test_a_run_without_its_teacher_is_refused_before_it_begins(
    shards: Path, taught: Path, teacher: Path, tmp_path: Path
) -> None:
    def refused(folder: Path, **changes: Any) -> str:
        made = tree("teacher")
        made["data"] |= changes
        with pytest.raises(DataError) as caught:
            Trainer(build(made), shards=folder, out=tmp_path / "run", quiet=True, device="cpu")
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    first = ShardReader(shards, "train").ids[0]
    told = refused(shards)
    assert f"split 'train': none of 20 images have a teacher mask (the first without one is '{first}')" in told
    assert told.endswith("method.pseudo.source=teacher needs all of them: ugrl prepare … --teacher DIR")
    some = Path(shutil.copytree(teacher, tmp_path / "some"))
    third = ShardReader(shards, "train").ids[2]
    (some / f"{third}.png").unlink()
    prepare(TaughtSource(ShapesSource(SPEC), some), tmp_path / "few", tune_val=0.17, seed=0)
    assert f"19 of 20 images have a teacher mask (the first without one is '{third}')" in refused(tmp_path / "few")


def test_a_search_over_the_source_asks_for_teacher_masks_before_it_begins(
    shards: Path, taught: Path, tmp_path: Path
) -> None:
    made = {"search": {"method.pseudo.source": {"choice": ["cam", "agree"]}}, "trials": 2, "config": "shapes"}
    for folder, words in ((shards, "none of 20 images have a teacher mask"), (taught, "")):
        search = Search(build_space(made), build(tiny_tree()), place(folder), (Objective("auto"),), tmp_path)
        if words:
            with pytest.raises(DataError, match=words):
                check_data(search)
        else:
            assert [o.name for o in check_data(search).objectives] == ["seg_miou"]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            {"cam": {"refine": "par", "propagate": "afa"}},
            "method.cam.propagate is afa, which walks for labels of the CAM",
        ),
        ({"setting": "Full"}, "method.setting Full learns from the true masks; expected cam, or another setting"),
    ],
)
def test_values_that_do_nothing_beside_a_teacher_are_refused(method: dict[str, Any], words: str) -> None:
    for source in ("teacher", "agree"):
        with pytest.raises(ConfigError, match=f"method.pseudo.source is {source}.*{words}"):
            build(tree(source, **method))
    build(tree("cam", **method))


# ---- ugrl eval --masks ---------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", *map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_masks_of_a_run_score_what_the_run_scores(
    base: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own labels, written and read back; perfect ones beside it, as palette, grey, and of 4 bits."""
    words = ["--data", shards, "--split", "val"]
    truth(shards, "val", tmp_path / "perfect")
    for k, path in enumerate(sorted((tmp_path / "perfect").iterdir())):
        image = Image.fromarray(labels_of(path.read_bytes()))
        if k % 3:
            image = image.convert("P") if k % 3 == 1 else image
            image.putpalette([*range(256)] * 3)
            image.save(path, bits=4 if k % 3 == 2 and labels_of(path.read_bytes()).max() < 16 else 8)
    own = told(capsys, base, *words, "--device", "cpu", "--out", tmp_path / "own")
    found = told(
        capsys, base, *words, "--device", "cpu", "--masks", tmp_path / "own/seg", "--masks", tmp_path / "perfect"
    )
    assert {k: found[k] for k in own if k != "masks"} == own
    seg, perfect = found["masks"]
    assert (seg["name"], perfect["name"], perfect["miou"], perfect["left_out"]) == ("seg", "perfect", 1.0, 0.0)
    assert seg["miou"] == pytest.approx(own["metrics"]["seg_miou"]) and seg["iou"] == own["classes"]["seg_iou"]
    # The same without the run.
    alone = told(capsys, "--masks", tmp_path / "own/seg", *words)
    assert (alone["masks"], alone["images"], alone["split"]) == ([seg], 16, "val")
    few = told(capsys, "--masks", tmp_path / "own/seg", *words, "--set", "eval.limit=5")
    assert few["images"] == 5 and few["masks"][0]["miou"] != seg["miou"]
    ids = ShardReader(shards, "val").ids[3:7]
    (tmp_path / "list.txt").write_text("\n".join(ids))
    listed = told(capsys, "--masks", tmp_path / "own/seg", "--data", shards, "--list", tmp_path / "list.txt")
    counts = Confusion(7)
    reader = ShardReader(shards, "val")
    for k in range(3, 7):
        mask = labels_of((tmp_path / "own/seg" / f"{reader.ids[k]}.png").read_bytes())
        counts.add(
            torch.from_numpy(mask.astype(np.int64)), torch.from_numpy(labels_of(reader[k].mask).astype(np.int64))
        )
    assert listed["images"] == 4 and listed["masks"][0]["miou"] == pytest.approx(counts.miou)


def test_pixels_that_a_mask_leaves_out_are_not_counted_and_told(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsure(labels_HW: np.ndarray) -> np.ndarray:
        labels_HW[:12] = IGNORE
        return labels_HW

    folder = truth(shards, "val", tmp_path / "unsure", unsure)
    found = told(capsys, "--masks", folder, "--data", shards)
    assert found["masks"][0]["miou"] == 1.0 and found["masks"][0]["left_out"] == pytest.approx(0.25, abs=0.02)
    assert main(["eval", "--masks", str(folder), "--data", str(shards)]) == 0
    assert re.search(r"pixels left out \(255\)\s+│\s+2\d\.\d", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("how", "words"),
    [*WRONG[:4], ("gone", "{id}.png: missing mask; 1 of 16 images have none; expected one"), *WRONG[4:]],
)
def test_masks_that_cannot_be_scored_are_one_line(
    how: str, words: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = truth(shards, "val", tmp_path / "sam")
    spoiled(folder, "val_000002", how)
    assert main(["eval", "--masks", str(folder), "--data", str(shards)]) == 2
    text = capsys.readouterr().err
    assert words.format(id="val_000002") in text and text.count("error: ") == 1


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "neither a run nor --masks; expected one of the two"),
        (["--masks", "m", "--crf"], "--crf is for a run; expected one before --masks"),
        (["--masks", "m", "--best"], "--best is for a run"),
        (["--masks", "m", "--protocol", "toco"], "--protocol is for a run"),
        (["--masks", "m", "--set", "eval.crf_bi_w=5"], "--set eval.crf_bi_w=5 is for a run; expected eval.limit alone"),
        (["--masks", "m", "--compare"], "--compare of one thing; expected a second run, or --masks beside it"),
        (["a", "b", "c"], "3 runs (c is the third); expected one, or two to compare"),
        (["a", "b", "--out", "o"], "--out and two runs; expected one run, whose labels are written"),
    ],
)
def test_options_that_need_a_run_are_refused_without(
    words: list[str], error: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *words, "--data", str(shards)]) == 2
    assert error in capsys.readouterr().err


def test_a_comparison_marks_the_best_of_each_class(
    base: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = Masks("a", {"background": 0.8, "cat": 0.5, "dog": float("nan")}, 0.65)
    b = Masks("b", {"background": 0.8004, "cat": 0.45, "dog": float("nan")}, 0.6252)

    def cells(differences: bool) -> list[list[str]]:
        table = comparison([a, b], "title", differences=differences)
        return [list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]

    assert cells(False) == [
        ["background", "80.0*", "80.0*"],
        ["cat", "50.0*", "45.0 "],
        ["dog", "- ", "- "],
        ["mean", "65.0*", "62.5 "],
    ]
    assert [row[2] for row in cells(True)] == ["+0.0*", "-5.0 ", "- ", "-2.5 "]
    # Two runs, and masks beside them: the table of the command.
    other = Path(shutil.copytree(base, tmp_path / "other"))
    truth(shards, "val", tmp_path / "sam")
    words = ["eval", str(base), str(other), "--data", str(shards), "--what", "seg", "--device", "cpu"]
    assert main([*words, "--masks", str(tmp_path / "sam"), "--compare"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"mean\s+│\s+\d+\.\d\s+│\s+\+0\.0\s+│\s+\+\d+\.\d\*", text)
    assert "after base seg: the difference to it, in points" in " ".join(text.split())


# ---- ugrl export --to labels ---------------------------------------------------------------------


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
        {marks.id: labels_HW for marks, labels_HW in exported.labelled(replace(got, cfg=cfg), reader)}
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


def test_a_mask_folder_takes_ids_with_folders_and_no_path_out_of_it(tmp_path: Path) -> None:
    write(tmp_path / "x", "a", np.zeros((2, 2), np.uint8))
    masks = MaskFolder(tmp_path)
    assert masks.has("x/a") and not masks.has("x/b")
    with pytest.raises(DataError, match="leads out of"):
        masks.has("../a")
