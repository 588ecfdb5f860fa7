"""Tags and masks held against each other: by prepare, in the manifest, and by ``ugrl check``."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ugrl.cli import main
from ugrl.data.census import Census, Inventory
from ugrl.data.folder import FolderSource
from ugrl.data.images import encode_labels
from ugrl.data.prepare import JOURNAL, inventory_of, prepare
from ugrl.data.shards import Manifest, partial_of
from ugrl.data.source import Stray, make_row
from ugrl.errors import DataError


def image(turn: int = 1) -> bytes:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turn
    Image.new("RGB", (8, 8), (9, 99, 9)).save(out, "JPEG", exif=exif)
    return out.getvalue()


def row(id, tags=(), labels=None, turn=1):
    mask = None if labels is None else encode_labels(np.array([labels] + [labels if all(labels) else [0] * 8] * 7))
    return make_row(id=id, image=image(turn), tags=tags, mask=mask, num_classes=3, where=id)


def census(*rows) -> Census:
    made = Census(3)
    for one in rows:
        made.add(one)
    return made


NAMES = ("cat", "dog", "cow")
MIXED = (
    row("a", [1], [1, 1, 0, 0, 0, 0, 0, 0]),
    row("b", [1, 2], [2, 3, 3, 255, 0, 0, 0, 0]),
    row("c"),
    row("d", [2], [255, 0, 0, 0, 0, 0, 0, 0], turn=3),
)


def test_every_count_is_what_the_rows_hold():
    got = census(*MIXED)
    assert (got.images, got.masks, got.untagged, got.binary, got.turned) == (4, 3, 1, 1, 1)
    assert (got.tagged, got.shown, got.unshown, got.untold) == ([2, 2, 0], [1, 1, 1], [1, 1, 0], [0, 0, 1])
    assert (got.pixels, got.background, got.ignored) == ([2, 1, 2], 3 * 64 - 7, 2)
    assert got.examples == {
        **{"untagged": "c", "binary": "d", "turned": "d"},
        **{"unshown 1": "b", "unshown 2": "d", "untold 3": "b"},
    }


def test_parts_add_up_and_survive_json():
    rows = (*MIXED, row("e"), row("f", [2], [3, 255, 0, 0, 0, 0, 0, 0], turn=6))
    whole, first, second = census(*rows), census(*rows[:3]), census(*rows[3:])
    first.merge(second)
    assert first == whole
    assert Census.from_tree(json.loads(json.dumps(whole.to_tree())), "x") == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": -1}, "-1; expected a whole number from 0"),
        ({"tagged": ["many"]}, "'many'; expected a whole number"),
        ({"tagged": [1] * 9}, "a list of 9; expected at most 3"),
        ({"classes": 2, "tagged": [], "shown": [], "unshown": [], "untold": [], "pixels": []}, "from 3 to 3"),
        ({"examples": None}, "None; expected keys and values"),
    ],
)
def test_a_damaged_census_is_one_line(change, words):
    tree = {"splits": {"train": {**census(*MIXED).to_tree(), **change}}, "stray": {}}
    with pytest.raises(DataError, match=words):
        Inventory.from_tree(tree, NAMES, "manifest.json")


def warnings(train=(), val=(), names=NAMES, stray=None) -> list[str]:
    splits = {name: census(*rows) for name, rows in (("train", train), ("val", val)) if rows}
    return Inventory(names, splits, stray or {}).warnings()


SOUND = (row("a", [1], [1, 0, 0, 0, 0, 0, 0, 0]), row("b", [2, 3], [2, 3, 0, 0, 0, 0, 0, 0]), row("c"))


def test_a_sound_data_set_is_no_reason_for_words():
    assert warnings(SOUND, SOUND[:2]) == []
    covered = row("d", [1, 2], [1, 0, 0, 0, 0, 0, 0, 0])  # the dog lies behind the cat: no fault of anybody
    assert warnings((*SOUND, covered)) == []


ONE = [1] + [0] * 7


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"val": (row("v", [3], [0] * 8), row("w", [1], ONE))},
            "class 'cow' is tagged in 1 images with a mask and has no pixel in any (such as v)",
        ),
        (
            {"val": (row("v", [3], [3, 1] + [0] * 6),)},
            "show classes that are not among their images' tags, 1 times, most often 'cat' (such as v)",
        ),
        (
            {"val": (row("v", [1], [255] + [0] * 7),)},
            "masks of val: 1 of 1 hold only 0 and 255 (such as v); 255 is ignored, a class is a number from 1 to 3",
        ),
        ({"val": (row("v", [1], [1] * 8), row("w", [1], [0] * 8))}, None),
        ({"val": (row("v", [1], [1] * 8),)}, "masks of val: 'cat' covers every labelled pixel"),
        ({"val": (row("v", [], [0] * 8),)}, "masks of val: 'background' covers every labelled pixel"),
        ({"val": (row("v", [1], ONE, turn=6),)}, "val: 1 belong to images that are stored turned (EXIF) (such as v)"),
        ({"train": SOUND[::2], "val": SOUND[1:2]}, "class 'dog' is tagged in no image of train, but is in val"),
        ({"train": SOUND[::2]}, "class 'cow' owns nothing: no image is tagged with it, no mask shows it"),
        ({"train": (row("a", [1]), row("b", [1]))}, "class 'cat' is tagged in all 2 images of train"),
        ({"train": (row("a", [1]), row("b"))}, "class 'cat' has all tags of train; the other 2 have none"),
        ({"names": ("cat", "Cat.", "cow")}, "classes 'cat' and 'Cat.' differ in little; one class or two?"),
        ({"names": ("cat", "cat, dog", "cow")}, "class 'cat, dog' looks like several joined, beside class 'cat'"),
        ({"names": ("traffic light", "traffic_light", "cow")}, "classes 'traffic light' and 'traffic_light' differ"),
        ({"stray": {"mask of no image": Stray(7, "masks/z.png")}}, "7 mask files belong to no image and are not used"),
    ],
)
def test_each_thing_that_looks_wrong_has_its_line(change, expected):
    found = warnings(**{"train": SOUND, **change})
    assert all(w.isprintable() and len(w) < 400 for w in found)
    if expected is None:
        assert found == []
    else:
        assert any(expected in w for w in found), found


# ---- prepare and check -----------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path) -> Path:
    root = tmp_path / "own"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    table = ["file,split,tags"]
    for k in range(6):
        (root / "images" / f"t{k}.jpg").write_bytes(image())
        table.append(f"t{k}.jpg,{'val' if k > 3 else 'train'},{('cat', 'dog')[k % 2]}")
        label = 1 + k % 2 if k else 2  # the first one's mask shows a dog, its tag says cat
        (root / "masks" / f"t{k}.png").write_bytes(encode_labels(np.full((8, 8), label)))
    (root / "masks" / "z.png").write_bytes(encode_labels(np.zeros((8, 8))))
    (root / "tags.csv").write_text("\n".join(table))
    return root


TOLD = (
    "warning: masks of train show classes that are not among their images' tags, 1 times, most often 'dog' (such as t0)"
)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_prepare_shows_it_stores_it_and_check_repeats_it(own, tmp_path, capsys):
    out = tmp_path / "s"
    assert (
        main(["prepare", "folder", "--root", str(own), "--out", str(out), "--tune-val", "0", "--shard-rows", "2"]) == 0
    )
    out_text = capsys.readouterr().out
    said = flat(out_text)
    assert TOLD in out_text  # a warning is one line, however narrow the terminal
    assert "cat │ 2 / 1 / 1 │ 1 / 1 / 0" in said and "dog │ 2 / 3 / 1 │ 1 / 1 / 0" in said
    assert "1 × mask of no image (such as masks/z.png)" in said
    manifest = Manifest.load(out)
    assert manifest.census["splits"]["train"]["untold"] == [0, 1]

    assert main(["check", str(out)]) == 0
    assert flat(capsys.readouterr().out) == said

    path = out / "manifest.json"
    tree = json.loads(path.read_text())
    del tree["census"]  # as older versions wrote it: counted again
    path.write_text(json.dumps(tree))
    assert inventory_of(Manifest.load(out)) == replace(
        Inventory.from_tree(manifest.census, manifest.class_names, ""), stray={}
    )
    assert main(["check", str(out)]) == 0
    assert TOLD in flat(capsys.readouterr().out)


def test_check_of_a_source_reads_its_layout_and_counts_what_cannot_be_used(own, capsys):
    (own / "images" / "t5.jpg").write_bytes(b"text")
    assert main(["check", str(own)]) == 0
    said = flat(capsys.readouterr().out)
    assert TOLD in said and "1 × mask of no image" in said
    assert "val: 1 images cannot be used, the first:" in said and "t5.jpg (tags.csv line 7): not a JPEG" in said
    assert not [p.name for p in own.iterdir() if p.name not in ("images", "masks", "tags.csv")]


def test_check_of_something_else_is_one_line(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert "neither prepared shards (manifest.json) nor the root of a data set" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_an_interrupted_prepare_counts_what_a_whole_one_does(own, tmp_path):
    whole = prepare(FolderSource(own), tmp_path / "whole", tune_val=0, shard_rows=1)

    class Stops(FolderSource):
        def row(self, split, id):
            if id == "t2":
                raise KeyboardInterrupt
            return super().row(split, id)

    with pytest.raises(KeyboardInterrupt):
        prepare(Stops(own), tmp_path / "out", tune_val=0, shard_rows=1)
    journal = partial_of(tmp_path / "out") / JOURNAL
    tree = json.loads(journal.read_text())
    assert [len(s["census"]) > 0 for s in tree["shards"]] == [True, True]
    del tree["shards"][1]["census"]  # noted by a version that did not count
    journal.write_text(json.dumps(tree))
    assert prepare(FolderSource(own), tmp_path / "out", tune_val=0, shard_rows=1).census == whole.census

    def backwards(write, source, jobs, folder, on_error):
        yield from [write(source, job, folder, on_error) for job in reversed(jobs)]

    there = prepare(FolderSource(own), tmp_path / "far", tune_val=0, shard_rows=1, shard_map=backwards)
    assert there.census == whole.census


@pytest.mark.parametrize(
    "spoil", ["[]", '{"options": {}, "shards": [{"file": 3}]}', '{"options": [], "shards": []}', "{"]
)
def test_a_damaged_journal_is_one_line(own, tmp_path, spoil):
    partial = partial_of(tmp_path / "out")
    partial.mkdir()
    (partial / JOURNAL).write_text(spoil)
    with pytest.raises(DataError, match=r"broken journal; remove .*out\.partial") as caught:
        prepare(FolderSource(own), tmp_path / "out", tune_val=0)
    assert str(caught.value).isprintable() and (partial / JOURNAL).exists()


@pytest.mark.parametrize("name", ["notes.txt", "folder/notes.txt"])
def test_what_others_left_in_an_unfinished_folder_ends_nothing_and_is_kept(own, tmp_path, monkeypatch, name):
    from ugrl.data import prepare as module

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(FolderSource(own), tmp_path / "out", tune_val=0)
    monkeypatch.undo()
    left = partial_of(tmp_path / "out") / name
    left.parent.mkdir(exist_ok=True)
    left.write_text("mine")
    assert prepare(FolderSource(own), tmp_path / "out", tune_val=0).splits["train"].rows > 0
    assert (tmp_path / "out" / name).read_text() == "mine"
    assert Manifest.load(tmp_path / "out").splits["train"].rows > 0


@pytest.mark.parametrize("out", ["own", "own/images", "own/images/new", "own/new/new", ".", "link/new"])
def test_prepare_writes_into_none_of_its_inputs(own, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(own / "images")
    before = sorted(p for p in tmp_path.rglob("*"))
    assert main(["prepare", "folder", "--root", "own", "--out", out]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("exists already" in said or "lies in the data set's own folder own" in said)
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_directly_in_the_root_is_a_place_like_any_other(own, monkeypatch, capsys):
    monkeypatch.chdir(own)
    for out in ("shards", "shards2"):  # the first one is no part of the data, when it is looked at again
        assert main(["prepare", "folder", "--root", ".", "--out", out, "--tune-val", "0"]) == 0
    assert "not read" not in capsys.readouterr().out
    assert Manifest.load("shards").fingerprint() == Manifest.load("shards2").fingerprint()


def test_nor_beside_them_where_its_unfinished_folder_would_be_one(own, tmp_path, capsys):
    root = own.rename(tmp_path / "s.partial")
    assert main(["prepare", "folder", "--root", str(root), "--out", str(tmp_path / "s")]) == 2
    assert "lies in the data set's own folder" in capsys.readouterr().err
    assert (root / "tags.csv").exists() and (root / "images" / "t0.jpg").exists()


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("dangling", "a link to nowhere"),
        ("own/tags.csv", "is a file"),
        ("own/tags.csv/x", "is a file"),
        ("x" * 250, "characters"),
        ("no/..", "expected the name of a new folder"),
    ],
)
def test_a_place_that_cannot_be_made_is_named_before_any_work(own, tmp_path, monkeypatch, capsys, out, words):
    monkeypatch.chdir(tmp_path)
    Path("dangling").symlink_to("/nowhere/disk")
    (own / "tags.csv").write_text("no table")
    assert main(["prepare", "folder", "--root", str(own), "--out", out]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said


def test_names_with_markup_and_escapes_are_shown_as_they_are(own, tmp_path, capsys):
    table = (own / "tags.csv").read_text().replace("cat", "[/b]").replace("dog", "[red]x")
    (own / "tags.csv").write_text(table)
    assert main(["prepare", "folder", "--root", str(own), "--out", str(tmp_path / "s[/i]"), "--tune-val", "0"]) == 0
    said = capsys.readouterr().out
    assert "[/b]" in said and "[red]x" in said and "s[/i]" in flat(said)
