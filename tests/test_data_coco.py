from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as official
from pycocotools.coco import COCO

from ugrl.cli import main
from ugrl.data.coco import CocoSource
from ugrl.data.coco_masks import decode_counts, spans
from ugrl.data.prepare import prepare
from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest
from ugrl.data.source import RowError, open_source
from ugrl.errors import DataError

COCO100 = Path(__file__).parents[2] / "shared" / "data" / "coco100"
needs_coco100 = pytest.mark.skipif(not COCO100.is_dir(), reason="the 100-image COCO excerpt is not beside the checkout")


def painted(segmentation, height, width):
    flat = np.zeros(height * width, np.uint8)
    for start, inside in spans(segmentation, height, width):
        flat[start : start + len(inside)] |= inside
    return flat.reshape(width, height).T


def labels_of(row):
    return np.asarray(Image.open(io.BytesIO(row.mask)))


# ---- masks, pixel for pixel ------------------------------------------------------------------------

STYLES = {
    "anywhere": lambda xy: xy,
    "whole pixels": np.round,
    "half pixels": lambda xy: np.round(2 * xy) / 2,
    "fifths": lambda xy: np.round(5 * xy) / 5 + 0.1,
    "repeated points": lambda xy: np.repeat(xy.reshape(-1, 2), 2, axis=0).ravel(),
    "far outside": lambda xy: (xy - 30) * 40,
    "upright": lambda xy: np.stack([np.repeat(xy[0::2], 2), np.roll(np.repeat(xy[1::2], 2), 1)], 1).ravel(),
}


@pytest.mark.parametrize("style", STYLES)
def test_polygons_equal_the_official_code(style):
    rng = np.random.default_rng(0)
    for _ in range(400):
        height, width = (int(n) for n in rng.integers(1, 60, 2))
        polygons = [
            STYLES[style](rng.uniform(-10, 70, 2 * rng.integers(3, 12))).tolist() for _ in range(rng.integers(1, 4))
        ]
        expected = official.decode(official.merge(official.frPyObjects(polygons, height, width)))
        np.testing.assert_array_equal(painted(polygons, height, width), expected)


def test_both_rle_forms_equal_the_official_code():
    rng = np.random.default_rng(0)
    for share in np.linspace(0, 1, 100):
        height, width = (int(n) for n in rng.integers(1, 50, 2))
        mask = np.asfortranarray((rng.random((height, width)) < share).astype(np.uint8))
        text = official.encode(mask)["counts"].decode()
        for counts in (text, decode_counts(text)):
            np.testing.assert_array_equal(painted({"size": [height, width], "counts": counts}, height, width), mask)


def test_long_runs_survive_compression():
    mask = np.zeros((700, 900), np.uint8, order="F")
    mask[3:650, 200:890] = 1
    text = official.encode(mask)["counts"].decode()
    np.testing.assert_array_equal(painted({"size": [700, 900], "counts": text}, 700, 900), mask)


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ([], "no polygon and no RLE"),
        (None, "no polygon and no RLE"),
        ([[1, 2, 3, 4]], "a polygon of 4 numbers; expected x and y of at least 3 points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "a polygon of 6 numbers"),
        ([["a", "b"]], "a polygon that is no list of numbers"),
        ({"size": [4, 5], "counts": [3, 2]}, r"RLE runs that add up to 5; expected 5×4"),
        ({"size": [5, 4], "counts": [20]}, r"RLE size \[5, 4\]; expected \[4, 5\]"),
        ({"size": [4, 5], "counts": "\x01"}, "character .* in a compressed RLE"),
        ({"size": [4, 5], "counts": "P"}, "a compressed RLE that ends within a number"),
        ({"size": [4, 5], "counts": "1" + "o" * 99}, "endless number|characters for"),
        ({"size": [4, 5], "counts": "o" * 99}, "a compressed RLE with an endless number"),
        ({"size": [4, 5], "counts": "0" * 9999}, "a compressed RLE of 9999 characters for 5×4 pixels"),
        ({"size": [4, 5], "counts": 3}, "RLE counts of type int"),
        ({"size": [4, 5], "counts": [0, None, 20]}, r"RLE counts \[0, None, 20\]; expected whole numbers"),
        ({"size": [4, 5], "counts": [0, {}, 20]}, "expected whole numbers"),
        ({"size": [4, 5], "counts": [-5, 25]}, "RLE runs that add up to 20; expected 5×4, none below zero"),
        ({"size": [4, 5], "counts": [10**400]}, "a number of about 398 digits"),
        ({"size": [[4], 5], "counts": [20]}, r"RLE size \[\[4\], 5\]; expected \[4, 5\]"),
        ([[1, 1, 3, 1, 3, 1e19]], r"a coordinate of 1e\+19 for 5×4 pixels"),
        ([[1, 1, 3, 1, 3, -3e8]], r"a coordinate of 3e\+08 for 5×4 pixels"),
    ],
)
def test_broken_segmentations_say_why(segmentation, words):
    with pytest.raises(ValueError, match=words):
        spans(segmentation, 4, 5)


# ---- a generated data set --------------------------------------------------------------------------

SQUARE = [2, 2, 10, 2, 10, 10, 2, 10]
OVER = [6, 6, 14, 6, 14, 14, 6, 14]


def rect(x0, y0, x1, y1, height=20, width=30):
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[y0:y1, x0:x1] = 1
    text = official.encode(mask)["counts"].decode()
    return {"size": [height, width], "counts": text}


def tree(annotations, images=(1,), year=2017, split="train"):
    prefix = f"COCO_{split}2014_" if year == 2014 else ""
    return {
        "images": [{"id": i, "file_name": f"{prefix}{i:012d}.jpg", "width": 30, "height": 20} for i in images],
        "annotations": [
            {"id": k, "image_id": i, "category_id": c, "iscrowd": crowd, "segmentation": s}
            for k, (i, c, crowd, s) in enumerate(annotations)
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}],
    }


def build(root, train, val=None, year=2017):
    (root / "annotations").mkdir(parents=True)
    for split, content in (("train", train), ("val", val or tree([(7, 1, 0, [SQUARE])], (7,), year, "val"))):
        path = root / "annotations" / f"instances_{split}{year}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        folder = root / f"{split}{year}"
        folder.mkdir()
        if isinstance(content, str):
            continue
        for image in content["images"]:
            noise = np.random.default_rng(image["id"]).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / image["file_name"], quality=90)
    return root


def test_objects_are_painted_in_file_order_and_crowds_only_where_nothing_lies(tmp_path):
    crowd = rect(0, 0, 30, 4)
    source = CocoSource(
        build(
            tmp_path, tree([(1, 13, 1, crowd), (1, 90, 0, [SQUARE]), (1, 1, 0, [OVER]), (1, 13, 1, rect(4, 4, 8, 8))])
        )
    )
    row = source.row("train", "000000000001")
    first, second = (official.decode(official.frPyObjects([p], 20, 30))[..., 0] for p in (SQUARE, OVER))
    expected = np.zeros((20, 30), np.uint8)
    expected[first > 0] = 3  # ids 1, 13, 90 become 1, 2, 3
    expected[second > 0] = 1
    expected[:4][expected[:4] == 0] = 255
    np.testing.assert_array_equal(labels_of(row), expected)
    assert row.tags == (1, 2, 3)  # the crowd's class is among them
    assert source.class_names == ("person", "stop sign", "toothbrush")


def smallest_on_top(annotations, masks, index, shape):
    """Pixel by pixel: of what lies there, the object with the smallest area; of equal ones the first."""
    expected = np.zeros(shape, np.uint8)
    for y in range(shape[0]):
        for x in range(shape[1]):
            there = [k for k, mask in enumerate(masks) if mask[y, x]]
            if there:
                top = min(there, key=lambda k: (annotations[k]["area"], k))
                expected[y, x] = index[annotations[top]["category_id"]]
    return expected


@pytest.mark.parametrize("areas", [True, False])
def test_the_smallest_object_lies_on_top_and_crowds_have_their_class(tmp_path, areas):
    """Polygons and both forms of RLE, with the area that the file gives and without one."""
    runs = rect(2, 2, 9, 9)
    shapes = [
        (13, 1, rect(0, 0, 30, 10)),  # a crowd, the largest
        (90, 0, [SQUARE]),
        (1, 0, [OVER]),
        (90, 0, {"size": [20, 30], "counts": decode_counts(runs["counts"])}),
        (1, 1, rect(3, 3, 10, 10)),  # as large as the one before: that one stays on top
    ]
    content = tree([(1, c, crowd, s) for c, crowd, s in shapes])
    masks = [painted(s, 20, 30) for _, _, s in shapes]
    for annotation, mask in zip(content["annotations"], masks, strict=True):
        annotation["area"] = float(mask.sum())
    annotations = json.loads(json.dumps(content["annotations"]))
    if not areas:
        for annotation in content["annotations"]:
            annotation["area"] = None
    source = CocoSource(build(tmp_path, content), masks="smallest-on-top")
    want = smallest_on_top(annotations, masks, {1: 1, 13: 2, 90: 3}, (20, 30))
    got = labels_of(source.row("train", "000000000001"))
    np.testing.assert_array_equal(got, want)
    assert (got == 2).any() and not (got == 255).any() and len(np.unique(got)) == 4
    other = labels_of(CocoSource(tmp_path).row("train", "000000000001"))
    assert (other != got).any() and (other == 255).any()


def test_how_masks_are_painted_is_written_down_checked_and_part_of_what_is_resumed(tmp_path, capsys):
    root, out = build(tmp_path / "coco", tree([(1, 1, 0, [SQUARE]), (2, 90, 0, [OVER])], (1, 2))), tmp_path / "shards"
    words = ["prepare", "coco", "--root", str(root), "--out", str(out), "--tune-val", "0"]
    with pytest.MonkeyPatch.context() as patch:  # killed after the first shard
        whole, seen = CocoSource.row, []

        def row(self, split, id):
            seen.append(id)
            if len(seen) == 2:
                raise KeyboardInterrupt
            return whole(self, split, id)

        patch.setattr(CocoSource, "row", row)
        assert main([*words, "--masks", "smallest-on-top", "--shard-rows", "1"]) == 130
    assert main([*words, "--shard-rows", "1"]) == 2
    assert "begun with source.masks 'smallest-on-top', now 'file-order'" in capsys.readouterr().err
    assert main([*words, "--masks", "smallest-on-top", "--shard-rows", "1"]) == 0
    assert Manifest.load(out).options["masks"] == "smallest-on-top"
    assert main(["prepare", "--verify", str(out), "--masks", "smallest-on-top"]) == 0
    assert "masks smallest-on-top" in " ".join(capsys.readouterr().out.split())
    assert main(["prepare", "--verify", str(out), "--masks", "file-order"]) == 2
    assert "masks painted by 'smallest-on-top'; expected file-order" in capsys.readouterr().err
    with pytest.raises(DataError, match="masks is 'biggest'; expected file-order or smallest-on-top"):
        CocoSource(root, masks="biggest")


@pytest.mark.parametrize("year", [2014, 2017])
def test_both_layouts_are_found_and_ids_are_file_stems(tmp_path, year):
    source = open_source("coco", build(tmp_path, tree([(1, 1, 0, [SQUARE])], year=year), year=year))
    stem = "COCO_train2014_000000000001" if year == 2014 else "000000000001"
    assert source.splits()["train"] == [stem] and source.options["year"] == year
    path = tmp_path / f"train{year}" / f"{stem}.jpg"
    assert source.row("train", stem).image == path.read_bytes()


def test_two_layouts_in_one_root_need_a_choice(tmp_path):
    build(tmp_path, tree([(1, 1, 0, [SQUARE])]))
    (tmp_path / "annotations" / "instances_train2014.json").write_text("{}")
    with pytest.raises(DataError, match="holds both 2014 and 2017; choose one with --year"):
        CocoSource(tmp_path)
    assert CocoSource(tmp_path, year=2017).options["year"] == 2017


def test_images_without_annotation_are_left_out_and_counted_unless_kept(tmp_path):
    build(tmp_path / "coco", tree([(2, 1, 0, [SQUARE]), (4, 13, 1, rect(0, 0, 5, 5))], images=(1, 2, 3, 4)))
    source = CocoSource(tmp_path / "coco")
    assert source.splits()["train"] == ["000000000002", "000000000004"]
    manifest = prepare(source, tmp_path / "out", tune_val=0)
    assert manifest.splits["train"].left_out == {"unannotated": 2} and manifest.splits["val"].left_out == {}
    kept = CocoSource(tmp_path / "coco", keep_unannotated=True)
    assert len(kept.splits()["train"]) == 4 and kept.left_out == {}
    row = kept.row("train", "000000000001")
    assert row.tags == () and (labels_of(row) == 0).all()


def test_a_missing_image_is_named_and_nothing_is_left(tmp_path):
    build(tmp_path / "coco", tree([(1, 1, 0, [SQUARE]), (2, 1, 0, [SQUARE])], images=(1, 2)))
    (tmp_path / "coco" / "train2017" / "000000000002.jpg").unlink()
    source = CocoSource(tmp_path / "coco")
    with pytest.raises(DataError) as caught:
        prepare(source, tmp_path / "out", tune_val=0)
    message = str(caught.value)
    assert "000000000002.jpg (image id 2): missing image file that instances_train2017.json names" in message
    assert "\n" not in message and not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    manifest = prepare(source, tmp_path / "out", tune_val=0, on_error="skip")
    assert manifest.splits["train"].left_out == {"missing file": 1}


def changed(**changes):
    return {**tree([(1, 1, 0, [SQUARE])]), **changes}


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("[" * 3000, r"instances_train2017\.json: JSON nested too deep"),
        ('{"images": [', r"instances_train2017\.json: broken JSON at line 1, column 13"),
        ("[]", r"instances_train2017\.json: \[\]; expected keys and values"),
        (changed(annotations=None), "annotations: None; expected a list"),
        ({"images": [], "categories": []}, "no key 'annotations' among 'images', 'categories'"),
        (changed(categories=[], annotations=[]), "0 categories; expected 1…254"),
        (changed(categories=[{"id": 1, "name": "person"}]), "its categories differ from those of the train split"),
    ],
)
def test_broken_json_is_named(tmp_path, train, words):
    if isinstance(train, dict) and not train.get("annotations"):
        train = json.dumps(train)
    with pytest.raises(DataError, match=words) as caught:
        CocoSource(build(tmp_path, train))
    assert "\n" not in str(caught.value)


def test_missing_places_are_named(tmp_path):
    with pytest.raises(DataError, match="no such folder; expected the root of a coco data set"):
        CocoSource(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no annotations/instances_train2014.json or …2017.json"):
        CocoSource(tmp_path)
    build(tmp_path / "coco", tree([(1, 1, 0, [SQUARE])]))
    (tmp_path / "coco" / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(DataError, match=r"instances_val2017\.json: missing annotation file"):
        CocoSource(tmp_path / "coco")


def test_a_broken_annotation_and_another_size_are_named_with_their_row(tmp_path):
    content = tree([(1, 1, 0, [[1, 2, 3, 4]]), (2, 1, 0, [SQUARE])], images=(1, 2))
    source = CocoSource(build(tmp_path, content))
    with pytest.raises(RowError, match=r"000000000001\.jpg \(image id 1\): annotation 0 has a polygon of 4 numbers"):
        source.row("train", "000000000001")
    Image.new("RGB", (31, 20)).save(tmp_path / "train2017" / "000000000002.jpg")
    with pytest.raises(RowError, match="image id 2.*31×20; the JSON expects 30×20"):
        source.row("train", "000000000002")


# ---- as other people write them ---------------------------------------------------------------------


def category(id, name):
    return {"id": id, "name": name}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": tree([], images=(1, 1))["images"]}, r"images '0+1\.jpg' and '0+1\.jpg' both have id 1"),
        ({"categories": [category(1, "cat"), category(1, "dog")]}, "categories 'cat' and 'dog' both have id 1"),
        ({"categories": [category(1, "cat"), category("1", "dog")]}, "categories 'cat' and 'dog' both have id 1"),
        ({"categories": [category(1, "cat"), category(2, "cat")]}, "categories 1 and 2 are both called 'cat'"),
        ({"categories": [category("a4-c0", "cat")]}, "category 0: id: 'a4-c0'; expected a whole number"),
        ({"images": [{"id": "6f9-e1", "file_name": "a.jpg"}]}, "image 0: id: '6f9-e1'; expected a whole number"),
        ({"images": [{"id": 10**400}]}, "image 0: id: a number of about 398 digits; expected .* at most 18 digits"),
        ({"images": [{"id": float("inf")}]}, "image 0: id: inf; expected a whole number"),
    ],
)
def test_keys_that_occur_twice_or_are_no_numbers_are_named(tmp_path, changes, words):
    content = {**tree([(1, 1, 0, [SQUARE])]), **changes}
    with pytest.raises(DataError, match=words) as caught:
        CocoSource(build(tmp_path, json.dumps(content)))
    assert str(caught.value).isprintable()


def test_equal_stems_of_one_split_are_named_with_both_files(tmp_path):
    content = tree([(1, 1, 0, [SQUARE]), (2, 1, 0, [SQUARE])], images=(1, 2))
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "a/x.jpg", "b/x.jpg"
    with pytest.raises(DataError, match=r"images 1 \('a/x\.jpg'\) and 2 \('b/x\.jpg'\) share the file stem 'x'"):
        CocoSource(build(tmp_path, json.dumps(content)))


def as_text(content):
    for group, keys in (("images", ["id"]), ("categories", ["id"]), ("annotations", ["image_id", "category_id"])):
        content[group] = [{**e, **{k: str(e[k]) for k in keys}} for e in content[group]]
    return content


def as_dictionary(content):
    content["annotations"] = {str(a["id"]): a for a in content["annotations"]}
    return content


def crowds(*values):
    def change(content):
        content["annotations"] = [{**a, "iscrowd": v} for a, v in zip(content["annotations"], values, strict=True)]
        return content

    return change


def one_polygon(content):
    content["annotations"] = [{**a, "segmentation": a["segmentation"][0]} for a in content["annotations"]]
    return content


@pytest.mark.parametrize(
    "change",
    [as_text, as_dictionary, crowds("0", "false"), crowds(False, None), crowds(" 0 ", 0.0), one_polygon],
    ids=["string ids", "dictionary", "text", "none", "number", "flat"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_is_meant_is_read(tmp_path, change, encoding):
    plain = [(1, 13, 0, [SQUARE]), (1, 90, 0, [OVER])]
    expected = CocoSource(build(tmp_path / "plain", tree(plain))).row("train", "000000000001")
    root = build(tmp_path / "other", tree(plain))
    for split, content in (("train", tree(plain)), ("val", tree([(7, 1, 0, [SQUARE])], (7,), split="val"))):
        if split == "train" or change is as_text:
            text = json.dumps(change(content))
            (root / "annotations" / f"instances_{split}2017.json").write_text(text, encoding=encoding)
    assert CocoSource(root).row("train", "000000000001") == expected
    assert expected.tags == (2, 3) and set(np.unique(labels_of(expected))) == {0, 2, 3}


def test_crowd_as_text_is_a_crowd_and_crowds_alone_are_told(tmp_path, caplog):
    content = crowds("1", "true")(tree([(1, 13, 0, [SQUARE]), (1, 1, 0, [OVER])]))
    row = CocoSource(build(tmp_path, content)).row("train", "000000000001")
    assert set(np.unique(labels_of(row))) == {0, 255} and row.tags == (1, 2)
    assert "train2017.json: every one of its 2 objects is a crowd (iscrowd 1)" in caplog.text
    assert "val2017.json" not in caplog.text


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_without_polygons_give_tags_and_no_mask(tmp_path, caplog, split):
    content = tree(
        [(1, 13, 0, None), (2, 1, 0, []), (2, 90, 0, [SQUARE]), (3, 90, 0, [SQUARE]), (4, 13, 0, [[]])],
        images=(1, 2, 3, 4),
    )
    del content["annotations"][0]["segmentation"]
    other = tree([(7, 1, 0, [SQUARE])], (7,))
    trains = (content, other) if split == "train" else (other, content)
    manifest = prepare(CocoSource(build(tmp_path / "coco", *trains)), tmp_path / "out", tune_val=0)
    rows = ShardReader(manifest, split).rows(range(4))
    assert [row.tags for row in rows] == [(2,), (1, 3), (3,), (2,)]
    # The second has an object that no polygon shows: a mask without it would call it background.
    assert [row.mask is None for row in rows] == [True, True, False, True]
    assert manifest.splits[split].with_masks == 1
    assert (
        f"instances_{split}2017.json: 3 of 4 images have objects without a segmentation: their rows have tags and no "
        "mask (1 of them have other objects with one)" in caplog.text
    )


def spoilt(key, value, group="annotations"):
    """Three images, of which the second is spoilt."""
    content = tree([(k, 1, 0, [SQUARE]) for k in (1, 2, 3)], images=(1, 2, 3))
    entry = content[group][1]
    if value is KeyError:
        del entry[key]
    else:
        entry[key] = value
    return content


@pytest.mark.parametrize(
    ("content", "reason", "words"),
    [
        (spoilt("segmentation", [[1, 1, 9, 1, 9, 1e19]]), "broken annotation", "a coordinate of 1e\\+19 for 30×20"),
        (spoilt("segmentation", [[1, 1, 9, 1, 9, float("nan")]]), "broken annotation", "a polygon of 6 numbers"),
        (spoilt("segmentation", [[1, 1, 9, 1, 9, 10**400]]), "broken annotation", "a polygon that is no list of"),
        (spoilt("segmentation", {"size": [20, 30], "counts": [0, {}]}), "broken annotation", "RLE counts"),
        (spoilt("segmentation", 7), "broken annotation", "annotation 1 has no polygon and no RLE"),
        (spoilt("iscrowd", "yes"), "broken annotation", "annotation id 1: iscrowd 'yes'; expected 0 or 1"),
        (spoilt("iscrowd", [[]]), "broken annotation", "iscrowd"),
        (spoilt("category_id", 12), "broken annotation", "annotation id 1: category_id 12 is not a category"),
        (spoilt("category_id", None), "broken annotation", "category_id: None; expected a whole number"),
        (spoilt("image_id", 12), "annotation of no image", "annotation id 1: image_id 12 is not among the images"),
        (spoilt("image_id", [1]), "annotation of no image", r"image_id: \[1\]; expected a whole number"),
        (spoilt("image_id", KeyError), "annotation of no image", "annotation 1: .*; expected image_id, category_id"),
        (spoilt("width", KeyError, "images"), "broken image entry", "image 2: no key 'width'"),
        (spoilt("height", 10**9, "images"), "broken image entry", "image 2: height: 1000000000; expected"),
        (spoilt("width", "thirty", "images"), "broken image entry", "image 2: width: 'thirty'; expected a whole"),
        (spoilt("file_name", None, "images"), "broken image entry", "image 2: file_name: None; expected a text"),
        (spoilt("file_name", "../a.jpg", "images"), "file outside of its folder", "leads out of"),
        (spoilt("file_name", "n" * 300 + ".jpg", "images"), "missing file", "missing image file"),
    ],
)
def test_one_bad_entry_is_one_counted_row(tmp_path, content, reason, words):
    root = build(tmp_path / "coco", tree([(k, 1, 0, [SQUARE]) for k in (1, 2, 3)], images=(1, 2, 3)))
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    source = CocoSource(root)
    with pytest.raises(DataError, match=words) as caught:
        prepare(source, tmp_path / "out", tune_val=0)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    manifest = prepare(source, tmp_path / "out", tune_val=0, on_error="skip")
    left = dict(manifest.splits["train"].left_out)
    if reason == "annotation of no image":  # its image has no annotation now
        assert left.pop("unannotated") == 1
    assert left == {reason: 1} and manifest.ids("train") == ("000000000001", "000000000003")


# ---- the real thing --------------------------------------------------------------------------------


@needs_coco100
def test_the_excerpt_equals_masks_made_with_the_official_code():
    source = CocoSource(COCO100)
    assert {n: len(i) for n, i in source.splits().items()} == {"train": 73, "val": 25}
    assert source.left_out == {"train": {"unannotated": 2}} and len(source.class_names) == 80
    for split in ("train", "val"):
        api = COCO(str(COCO100 / "annotations" / f"instances_{split}2017.json"))
        index = {c: i + 1 for i, c in enumerate(sorted(api.getCatIds()))}
        for id in source.splits()[split]:
            annotations = api.imgToAnns[int(id)]
            info = api.imgs[int(id)]
            expected = np.zeros((info["height"], info["width"]), np.uint8)
            for a in annotations:
                if not a["iscrowd"]:
                    expected[api.annToMask(a) > 0] = index[a["category_id"]]
            crowd = np.zeros(expected.shape, bool)
            for a in annotations:
                if a["iscrowd"]:
                    crowd |= api.annToMask(a) > 0
            expected[crowd & (expected == 0)] = 255
            row = source.row(split, id)
            np.testing.assert_array_equal(labels_of(row), expected, err_msg=id)
            assert row.tags == tuple(sorted({index[a["category_id"]] for a in annotations}))
            assert row.image == (COCO100 / f"{split}2017" / f"{id}.jpg").read_bytes()
