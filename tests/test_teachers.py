"""Learning from the masks of another method: shards, batches, labels, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ugrl
from tests import test_train as two
from tests.own import own_shards
from tests.raycluster import CLOSE
from tests.teachers import SPEC, WRONG, spoiled, tree, truth, write
from tests.test_data_loader_ray import asked, blocks, ray_data
from tests.tiny import tiny_tree
from tuning.cli import check_data
from tuning.space.options import Objective
from tuning.space.search import Search
from tuning.space.space_file import build_space
from ugrl.cli import main
from ugrl.config import build, override
from ugrl.data.mask_folder import MaskFolder, TaughtSource
from ugrl.data.pages import MappedShard
from ugrl.data.prepare import prepare
from ugrl.data.reader import ShardReader
from ugrl.data.shapes import ShapesSource
from ugrl.data.shards import Manifest, open_shard, verify
from ugrl.errors import ConfigError, DataError
from ugrl.method.teacher import agreed_labels, tagged, teacher_labels
from ugrl.method.weighting import modulation_weights
from ugrl.storage import place
from ugrl.train.batches import local_loader
from ugrl.train.flops import step_gflop
from ugrl.train.loop import Trainer
from ugrl.types import IGNORE, Batch

CPU = torch.device("cpu")


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


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A private one."""
    from cluster.connect import start_ray, stop_ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        start_ray(cpus=2)
        yield
        stop_ray()


@pytest.mark.ray
def test_ray_data_carries_teacher_masks(mirrored: Path, cluster: None) -> None:
    """Through the object store of a real cluster, on the second of two ranks."""
    from cluster.ray_data import ray_loader

    spec = asked(mirrored, crop=56, teacher=True, total_steps=5)
    batches = [loaded.to("cpu") for loaded in ray_loader(spec)]
    assert len(batches) == 4
    for batch, local in zip(batches, local_loader(spec), strict=False):
        same_batch(batch, local.to("cpu"))
        assert batch.teachers_BHW is not None


@pytest.mark.ray
def test_two_workers_of_ray_train_learn_from_a_teacher_as_one_process_does(
    taught: Path, cluster: None, tmp_path: Path
) -> None:
    """The same global batches, and so the same losses, counts and scores in every line of the log."""
    from cluster.launch import launch

    room = {"cluster.cpus_per_worker": 0.5, "cluster.data_cpus": 0, "cluster.start_timeout_s": 300}
    cfg = build(override(tree("agree"), {"train.dtype": "float64", **room}))
    Trainer(cfg, shards=taught, out=tmp_path / "one", quiet=True, device="cpu").fit()
    launch(cfg, shards=taught, out=tmp_path / "both", workers=2)
    one, both = two.losses(tmp_path / "one"), two.losses(tmp_path / "both")
    assert [line["step"] for line in one] == [line["step"] for line in both] == [1, 2, 3, 4, 5, 6, 6]
    assert all(line["seg"] > 0 and line["stat/labelled"] > 0 for line in both[2:6])  # past the warm-up
    for a, b in zip(one, both, strict=True):
        two.close(a, b, rel=CLOSE, floor=1e-9)


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


@pytest.mark.parametrize("source", ["teacher", "agree"])
def test_prototypes_have_no_say_beside_a_teacher(source: str, taught: Path) -> None:
    found = []
    for weight in (0.0, 3.0):
        changed = tree(source)
        changed["method"]["pseudo"]["prototype_weight"] = weight
        trainer = Trainer(build(changed), shards=taught, out=None, quiet=True, dtype=torch.float64, device="cpu")
        batch = first_batch(trainer)
        trainer.step_fn.targets(batch, 0)  # prototypes begin
        found.append(trainer.step_fn.targets(batch, 3))
    for a, b in ((found[0].labels_BHW, found[1].labels_BHW), (found[0].pool_Bhw, found[1].pool_Bhw)):
        assert a is not None and b is not None and torch.equal(a, b)


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


def test_a_mask_folder_takes_ids_with_folders_and_no_path_out_of_it(tmp_path: Path) -> None:
    write(tmp_path / "x", "a", np.zeros((2, 2), np.uint8))
    masks = MaskFolder(tmp_path)
    assert masks.has("x/a") and not masks.has("x/b")
    with pytest.raises(DataError, match="leads out of"):
        masks.has("../a")
