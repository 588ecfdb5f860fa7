from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ugrl.data import cli
from ugrl.data.prepare import prepare
from ugrl.data.shards import Manifest
from ugrl.data.source import RowError, Source, Stray, open_source
from ugrl.data.voc import CLASS_NAMES, VocSource
from ugrl.errors import ConfigError, DataError

PALETTE = [(i * 67 + c * 29) % 256 for i in range(256) for c in range(3)]


def save_image(path: Path, seed: int = 0, size=(30, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=90)


def save_mask(path: Path, labels: np.ndarray, palette: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8))
    if palette:
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette(PALETTE)
    image.save(path)


def save_xml(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = "".join(f"<object><name>{n}</name><part><name>head</name></part></object>" for n in names)
    path.write_text(f"<annotation><folder>VOC2012</folder>{objects}</annotation>")


def square(label: int, size=(30, 20)) -> np.ndarray:
    labels = np.zeros(size[::-1], np.uint8)
    labels[4:12, 5:15] = label
    labels[4, 5:15] = 255
    return labels


@pytest.fixture
def devkit(tmp_path):
    """Train a1 (dog, cat), a2 (person); train_aug adds a3 without palette and a4; val v1 (sheep)."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a1\na2\n")
    (lists / "val.txt").write_text("v1\n\n")
    content = {"a1": ("dog", "cat"), "a2": ("person", "person"), "a3": ("bus",), "a4": ("car",), "v1": ("sheep",)}
    for k, (id, names) in enumerate(content.items()):
        save_image(root / "JPEGImages" / f"{id}.jpg", k)
        save_xml(root / "Annotations" / f"{id}.xml", *names)
        save_mask(root / "SegmentationClass" / f"{id}.png", square(CLASS_NAMES.index(names[0]) + 1))
    return root


def pixels(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    return np.asarray(image)


@pytest.mark.parametrize("up", [0, 1, 2])
def test_the_devkit_is_found_from_any_of_its_folders(devkit, up):
    root = [devkit, *devkit.parents][up]
    source = open_source("voc", root)
    assert isinstance(source, Source)
    assert source.splits() == {"train": ["a1", "a2"], "val": ["v1"]}


def test_xml_tags_and_palette_masks_as_indices(devkit):
    row = VocSource(devkit).row("train", "a1")
    assert row.tags == (CLASS_NAMES.index("cat") + 1, CLASS_NAMES.index("dog") + 1) == (8, 12)
    np.testing.assert_array_equal(pixels(row.mask), square(12))
    assert row.image == (devkit / "JPEGImages" / "a1.jpg").read_bytes()


def test_mask_labels_are_what_the_mask_shows(devkit):
    source = VocSource(devkit, labels="mask")
    assert source.row("train", "a1").tags == (12,) and source.tags("train", "a1") is None


def test_the_augmented_set_is_used_where_it_is_there(devkit):
    assert VocSource(devkit).options == {"labels": "xml", "train_list": "train"}
    lists = devkit / "ImageSets" / "Segmentation"
    lines = [f"/JPEGImages/a{k}.jpg /SegmentationClassAug/a{k}.png" for k in range(1, 5)]
    (lists / "train_aug.txt").write_text("\n".join(lines))
    save_mask(devkit / "SegmentationClassAug" / "a3.png", square(7), palette=False)
    source = VocSource(devkit)
    assert source.splits()["train"] == ["a1", "a2", "a3", "a4"]
    np.testing.assert_array_equal(pixels(source.row("train", "a3").mask), square(7))
    np.testing.assert_array_equal(pixels(source.row("train", "a4").mask), square(7))  # from SegmentationClass
    assert VocSource(devkit, train_list="train").splits()["train"] == ["a1", "a2"]


def test_a_missing_list_names_the_nearest(devkit):
    with pytest.raises(DataError, match=r"trian\.txt: missing split list; did you mean 'train'"):
        VocSource(devkit, train_list="trian")


def test_no_devkit_and_unknown_labels(devkit, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no ImageSets/Segmentation in it, in VOC2012 or in VOCdevkit/VOC2012"):
        VocSource(tmp_path / "empty")
    with pytest.raises(DataError, match="labels is 'png'; expected xml or mask"):
        VocSource(devkit, labels="png")
    with pytest.raises(DataError, match="source 'voc' needs a root folder"):
        open_source("voc")


def test_a_missing_mask_is_null_only_in_train_with_xml(devkit):
    (devkit / "SegmentationClass" / "a1.png").unlink()
    (devkit / "SegmentationClass" / "v1.png").unlink()
    assert VocSource(devkit).row("train", "a1").mask is None
    with pytest.raises(RowError, match=r"a1\.png: missing mask, and labels come from masks"):
        VocSource(devkit, labels="mask").row("train", "a1")
    with pytest.raises(RowError, match=r"v1\.png: missing mask, and split 'val' is evaluated"):
        VocSource(devkit).row("val", "v1")


def spoil_rgb(devkit):
    Image.new("RGB", (30, 20)).save(devkit / "SegmentationClass" / "a2.png")


def spoil_label(devkit):
    save_mask(devkit / "SegmentationClass" / "a2.png", square(21))


def spoil_size(devkit):
    save_mask(devkit / "SegmentationClass" / "a2.png", square(3, (20, 30)))


def spoil_jpeg(devkit):
    path = devkit / "JPEGImages" / "a2.jpg"
    path.write_bytes(path.read_bytes()[:-30])


def spoil_class(devkit):
    save_xml(devkit / "Annotations" / "a2.xml", "person", "mototbike")


def spoil_xml(devkit):
    (devkit / "Annotations" / "a2.xml").write_text("<annotation><object>")


def spoil_text(devkit):
    (devkit / "JPEGImages" / "a2.jpg").write_text("404 not found")


def spoil_empty(devkit):
    (devkit / "JPEGImages" / "a2.jpg").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "words", "reason"),
    [
        (spoil_rgb, r"a2\.png: mask of mode RGB; expected class indices", "unusable mask"),
        (spoil_label, r"a2\.png: the mask holds label 21; expected 0…20 or 255", "unusable mask"),
        (spoil_size, r"a2\.png: the mask is 20×30; expected 30×20 as the image", "unusable mask"),
        (spoil_jpeg, r"a2\.jpg \(train\.txt line 2\): truncated image \(\d+ bytes\)", "unreadable image"),
        (spoil_class, r"a2\.xml: unknown class 'mototbike'; did you mean 'motorbike'\?", "unknown class"),
        (spoil_xml, r"a2\.xml: broken XML", "broken annotation"),
        (spoil_text, r"a2\.jpg \(train\.txt line 2\): not a JPEG, PNG, WebP", "unreadable image"),
        (spoil_empty, r"a2\.jpg \(train\.txt line 2\): empty file", "unreadable image"),
        (lambda d: (d / "JPEGImages" / "a2.jpg").unlink(), r"a2\.jpg: missing image file", "missing file"),
        (lambda d: (d / "Annotations" / "a2.xml").unlink(), r"a2\.xml: missing annotation file", "missing file"),
    ],
)
def test_bad_rows_are_one_clear_line_and_leave_nothing_or_are_counted(devkit, tmp_path, spoil, words, reason):
    spoil(devkit)
    source = VocSource(devkit)
    with pytest.raises(DataError, match=words) as caught:
        prepare(source, tmp_path / "out", tune_val=0)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))
    manifest = prepare(source, tmp_path / "out", tune_val=0, on_error="skip")
    assert manifest.ids("train") == ("a1",) and manifest.splits["train"].left_out == {reason: 1}


# ---- lists and files as other people have them -----------------------------------------------------


def listed(devkit, text, split="train"):
    data = text if isinstance(text, bytes) else text.encode()
    (devkit / "ImageSets" / "Segmentation" / f"{split}.txt").write_bytes(data)
    return VocSource(devkit)


def add(devkit, id, name, suffix=".jpg", mask_suffix=".png"):
    save_image(devkit / "JPEGImages" / f"{id}{suffix}")
    save_xml(devkit / "Annotations" / f"{id}.xml", name)
    save_mask(devkit / "SegmentationClass" / f"{id}{mask_suffix}", square(CLASS_NAMES.index(name) + 1))


@pytest.mark.parametrize(
    "id", ["IMG_1_jpg.rf.0a1b2c", "north gate 01", "street.left", "a.b c.d", "käfer", "sub/deep 1"]
)
def test_ids_are_what_the_line_says_whatever_its_characters(devkit, id):
    for other in ("street", "north", "IMG_1_jpg", "a", "sub"):
        add(devkit, other, "dog")
    add(devkit, id, "cat")
    forms = (
        *(f"{id}\n", f"\ufeff{id}\r\n\r\n", f"  {id}\t\n", f"{id}.jpg\n"),
        *(f"/JPEGImages/{id}.jpg /SegmentationClassAug/{id}.png\n", f"VOC2012/JPEGImages/{id}.jpg"),
    )
    for text in forms if "/" not in id else forms[:3]:
        source = listed(devkit, text)
        assert source.splits()["train"] == [id] and source.row("train", id).tags == (8,)
    assert listed(devkit, f"{id}\n".encode("utf-16")).splits()["train"] == [id]


def test_an_id_may_end_like_a_file(devkit):
    add(devkit, "b", "cow")
    add(devkit, "b.jpg", "sheep")
    source = listed(devkit, "b.jpg\nb\n")
    assert [source.row("train", id).tags for id in source.splits()["train"]] == [(17,), (10,)]


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".png"])
def test_images_and_masks_with_other_suffixes(devkit, suffix):
    add(devkit, "b", "cow", suffix, ".PNG")
    row = listed(devkit, "b\n").row("train", "b")
    assert row.tags == (10,) and row.image == (devkit / "JPEGImages" / f"b{suffix}").read_bytes()
    np.testing.assert_array_equal(pixels(row.mask), square(10))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a1\na2\n\na1\n", r"train\.txt: line 4: id 'a1' was used before \(train\.txt line 1\); expected unique ids"),
        ("a1\nv1\n", r"val\.txt: line 1: id 'v1' was used before \(train\.txt line 2\)"),
        ("a1\n" + "x" * 2000 + "\n", r"train\.txt: line 2: 2000 characters; expected an id"),
        ("käfer\n".encode("latin-1"), r"train\.txt: line 1: byte 0xe4 is not UTF-8; save the file as UTF-8"),
        ("a1\na\x1b2\n", r"train\.txt: line 2: id 'a\\x1b2'; expected no control characters"),
        (b"a1\0\n", r"train\.txt: line 1: a zero byte"),
    ],
)
def test_unusable_lists_are_one_line(devkit, text, words):
    with pytest.raises(DataError, match=words) as caught:
        listed(devkit, text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("id", ["../../../x", "/etc/passwd", "a1 -1"])
def test_lines_that_name_no_image_are_refused_or_left_out(devkit, tmp_path, id):
    source = listed(devkit, f"a1\n{id}\n")
    with pytest.raises(RowError, match=r"train\.txt line 2: file name .* leads out|a1 -1\.jpg: missing image file"):
        source.row("train", id)
    manifest = prepare(source, tmp_path / "out", tune_val=0, on_error="skip")
    assert manifest.ids("train") == ("a1",) and manifest.splits["train"].left_out == {"missing file": 1}


def test_a_list_outside_of_its_folder_is_refused(devkit):
    with pytest.raises(DataError, match="train_list: file name .* leads out of"):
        VocSource(devkit, train_list="../../../secret")


@pytest.mark.parametrize(
    ("xml", "words"),
    [
        ('<!DOCTYPE a [<!ENTITY x "cat">]><a><object><name>&x;</name></object></a>', "broken XML: a document type"),
        ("<a>" * 100, "broken XML: nested deeper"),
        ('<?xml version="1.0" encoding="none"?><a/>', "broken XML: unknown encoding"),
        ("", "broken XML: no element found"),
    ],
)
def test_annotations_are_parsed_within_bounds(devkit, xml, words):
    (devkit / "Annotations" / "a1.xml").write_text(xml)
    with pytest.raises(RowError, match=rf"a1\.xml: {words}") as caught:
        VocSource(devkit).row("train", "a1")
    assert caught.value.reason == "broken annotation"


def test_masks_of_no_image_and_images_in_no_list_are_counted(devkit):
    save_mask(devkit / "SegmentationClassAug" / "z.png", square(1))
    assert VocSource(devkit).stray == {
        "mask of no image": Stray(1, "SegmentationClassAug/z.png"),
        "image in no list": Stray(2, "JPEGImages/a3.jpg"),
    }


# ---- command line ----------------------------------------------------------------------------------


def command(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(w) for w in words]))


def test_prepare_ends_with_a_table_of_splits(devkit, tmp_path, capsys):
    spoil_jpeg(devkit)
    assert command("voc", "--root", devkit, "--out", tmp_path / "out", "--tune-val", 0, "--on-error", "skip") == 0
    out, err = capsys.readouterr()
    assert "1 unreadable image" in out and "train" in out and "val" in out
    assert err == "3/3 rows (100 %)\n"  # no terminal: one plain line
    assert Manifest.load(tmp_path / "out").rows("train") == 1


def test_options_reach_their_source(tmp_path):
    words = ("--train", 5, "--val", 2, "--size", 40, "--difficulty", 0.1, "--seed", 4, "--tune-val", 2)
    assert command("shapes", "--out", tmp_path / "out", *words, "--shard-rows", 2) == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.options == {
        **{"train": 5, "val": 2, "size": 40, "difficulty": 0.1, "seed": 4},
        **{"tune_val": 2, "tune_val_seed": 4},
    }
    assert {n: s.rows for n, s in manifest.splits.items()} == {"train": 3, "tune_val": 2, "val": 2}
    assert len(manifest.splits["train"].shards) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("shapes", "--year", 2014), "--year belongs to source coco; expected none of it for shapes"),
        (("voc", "--keep-unannotated"), "--keep-unannotated belongs to source coco"),
        (("coco", "--train-list", "train"), "--train-list belongs to source voc"),
        (("voc", "--size", 64), "--size belongs to source shapes"),
        (("shapes", "--root", "x"), "--root x with source shapes, which is generated; expected none"),
        ((), "no SOURCE; expected one of shapes, coco, voc, folder"),
    ],
)
def test_options_of_another_source_are_refused(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        command(*words, "--out", tmp_path / "out")


def test_an_unknown_source_names_the_nearest(tmp_path):
    with pytest.raises(DataError, match="unknown source 'coc'; did you mean 'coco'"):
        command("coc", "--root", tmp_path / "a", "--out", tmp_path / "out")
    with pytest.raises(ConfigError, match="no --out; expected the folder to write"):
        command("shapes")


def test_verify_from_the_command_line(tmp_path, capsys):
    command("shapes", "--train", 4, "--val", 1, "--size", 32, "--out", tmp_path / "out", "--tune-val", 1)
    assert command("--verify", tmp_path / "out") == 0
    path = tmp_path / "out" / "val-00000.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 255
    path.write_bytes(data)
    with pytest.raises(DataError, match="checksum"):
        command("--verify", tmp_path / "out")
    with pytest.raises(ConfigError, match="--verify stands alone"):
        command("shapes", "--verify", tmp_path / "out")
