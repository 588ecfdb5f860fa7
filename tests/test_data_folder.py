"""Folders and tables as people have them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ugrl.data.folder import FolderSource
from ugrl.data.images import decode_labels
from ugrl.data.prepare import prepare
from ugrl.data.source import RowError, Source, Stray, open_source
from ugrl.errors import DataError

SIZE = (12, 8)


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (90, 120, 30)).save(path)


def save_mask(path: Path, label: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.zeros(SIZE[::-1], np.uint8)
    labels[2:5, 2:5] = label
    Image.fromarray(labels).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for name in ("a.jpg", "deep/b.jpg", "c.jpg", "d.png"):
        save_image(root / "images" / name)
    (root / "tags.csv").write_text(
        "file,split,tags\na.jpg,train,car; person\ndeep/b.jpg,,\nc.jpg,val,person\nd.png,train,car\n"
    )
    return root


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        FolderSource(folder)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 400
    return text


def test_a_folder_of_images_and_a_table(folder, tmp_path):
    save_mask(folder / "masks" / "c.png", 2)
    source = open_source("folder", folder)
    assert isinstance(source, Source)
    assert source.class_names == ("car", "person")
    assert source.splits() == {"train": ["a", "b", "d"], "val": ["c"]}
    manifest = prepare(source, tmp_path / "out", tune_val=0)
    assert manifest.tags("train") == ((1, 2), (), (1,))
    assert (manifest.splits["train"].with_masks, manifest.splits["val"].with_masks) == (0, 1)


def test_classes_txt_decides_order_and_membership(folder):
    (folder / "classes.txt").write_text("person\ncar\ntree\n")
    assert FolderSource(folder).class_names == ("person", "car", "tree")
    assert FolderSource(folder).tags("train", "d") == (2,)
    (folder / "classes.txt").write_text("persons\ncar\n")
    assert "tags.csv: line 2: unknown class 'person'; did you mean 'persons'" in refusal(folder)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (b"car\nbus\ncar\n", "classes.txt: class 'car' appears twice, on lines 1 and 3"),
        ("käfer\n".encode("latin-1"), "classes.txt: line 1: byte 0xe4 is not UTF-8; save the file as UTF-8"),
        (b"background\ncar\nperson\n", "line 1: 'background' is label 0 by itself; remove the line"),
        (b"car\nper\x1b[31mson\n", "line 2: class name 'per\\x1b[31mson'; expected no control characters"),
        (b"car\n" + b"x" * 300, "line 2: a class name of 300 characters"),
        (b"\n".join(b"c%d" % k for k in range(255)) + b"\ncar\nperson\n", "257 classes; expected 1…254"),
        (b"", "line 2: unknown class 'car'"),
    ],
)
def test_unusable_class_lists_are_one_line(folder, names, words):
    (folder / "classes.txt").write_bytes(names)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    "encode",
    [lambda t: ("\ufeff" + t).encode(), lambda t: t.encode("utf-16"), lambda t: t.replace("\n", "\r\n").encode()],
)
def test_encodings_of_editors_and_spreadsheets(folder, encode):
    (folder / "classes.txt").write_bytes(encode("person\nkäfer\ncar\n"))
    (folder / "tags.csv").write_bytes(encode("file,split,tags\na.jpg,train,käfer\nc.jpg,val,car\n"))
    source = FolderSource(folder)
    assert source.class_names == ("person", "käfer", "car") and source.tags("train", "a") == (2,)


# ---- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table",
    [
        "file,tags\na.jpg,cat;dog\nc.jpg,dog\nd.png,\n",
        'file,tags\na.jpg,"cat,dog"\nc.jpg,dog\nd.png,nan\n',
        'Image,Label\na.jpg,"dog, cat"\nc.jpg, dog\nd.png,None\n',
        'filename;classes\na.jpg;"cat;dog"\nc.jpg;dog\nd.png;[]\n',
        "file\ttags\na.jpg\tcat|dog\nc.jpg\tdog\nd.png\t\n",
        "sep=;\nfile_name;Tags\na.jpg;cat|dog\nc.jpg;dog\nd.png;\n",
        "file,tags\na.jpg,\"['cat', 'dog']\"\nc.jpg,['dog']\nd.png,[]\n",
        'file,tags\na.jpg,"[""cat"", ""dog""]"\nc.jpg,"[""dog""]"\nd.png,null\n',
        'file,tags\na.jpg,"[cat, dog]"\nc.jpg,dog\nd.png,[]\n',
        "file,tags\na.jpg,['cat' 'dog']\nc.jpg,{'dog'}\nd.png,\n",
        ",file,split,tags\n0,a.jpg,Training,cat;dog;\n1,c.jpg,nan,dog\n2,d.png,,;\n",
        "image_id,label\na,cat|dog\nc,dog\nd,\n",
        "tags,file\ncat;cat;dog,images/a.jpg\ndog,./c.jpg\n\n,images\\d.png\n",
    ],
)
def test_tables_of_other_people_are_read_where_they_mean_one_thing(folder, table):
    (folder / "tags.csv").write_text(table)
    source = FolderSource(folder)
    assert source.class_names == ("cat", "dog")
    assert {id: source.tags("train", id) for id in source.splits()["train"]} == {"a": (1, 2), "c": (2,), "d": ()}
    assert source.row("train", "a").image == (folder / "images" / "a.jpg").read_bytes()


@pytest.mark.parametrize(
    "tag", ["car, person", "car#person", "car/person", "car person", "car & person", "[person, car]"]
)
def test_known_classes_make_any_joint_unambiguous(folder, tag):
    (folder / "classes.txt").write_text("person\ncar\n")
    (folder / "tags.csv").write_text(f'file,tags\na.jpg,"{tag}"\n')
    assert FolderSource(folder).tags("train", "a") == (1, 2)
    (folder / "classes.txt").write_text(f"person\ncar\n{tag}\n")
    assert FolderSource(folder).tags("train", "a") == (3,)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        (('"car, person"', '"car, person"'), "line 2: tags 'car, person' could be 1 class or 2; join tags by ';'"),
        (("cat#dog", "dog"), "line 2: tag 'cat#dog' looks like 2 classes joined by '#'; join tags by ';'"),
        (("cat#dog", "fish"), "line 2: tag 'cat#dog' looks like 2 classes joined by '#'"),
        (("dog", "cat/dog"), "line 3: tag 'cat/dog' looks like 2 classes joined by '/'"),
        (("cat;dog", "dog cat"), "line 3: tag 'dog cat' looks like 2 classes joined by a space"),
        (("cat;dog", '"dog,fish"'), "line 3: tag 'dog,fish' looks like 2 classes joined by ','"),
        (("cat;dog", "dog|fish"), "line 3: tag 'dog|fish' looks like 2 classes joined by '|'"),
        (("cat", "[cat]"), "line 3: tag '[cat]' looks like a list"),
        (('"[0, 1]"', "cat"), "line 2: tags '[0, 1]' are numbers; expected class names"),
        (("cat\x07", "dog"), "line 2: class name 'cat\\x07'; expected no control characters"),
    ],
)
def test_tags_that_mean_two_things_are_refused(folder, tags, words):
    (folder / "tags.csv").write_text(f"file,tags\na.jpg,{tags[0]}\nc.jpg,{tags[1]}\n")
    assert words in refusal(folder)


@pytest.mark.parametrize(
    "names", [("hot dog", "dog"), ("fish, fresh;cat", "cat"), ("[/b]", "b"), ("t-shirt/top", "shirt")]
)
def test_names_with_odd_characters_stay_names(folder, names):
    (folder / "tags.csv").write_text(f'file,tags\na.jpg,"{names[0]}"\nc.jpg,{names[1]}\n')
    assert FolderSource(folder).class_names == tuple(sorted({*names[0].split(";"), names[1]}))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("name,tags\n", "no column 'file' among name, tags"),
        ("file,cat,dog\n", "no column 'tags' among file, cat, dog; expected one column with the names"),
        ("", "no column 'file' among none"),
        ("file,tags,spilt\n", "unknown column 'spilt'; did you mean 'split'"),
        ("file,image,tags\n", "columns 'file' and 'image'; expected one of them"),
        ("file,split,tags\na.jpg,test,car\n", "line 2: split 'test'; expected one of train, val"),
        (
            "file,tags\na.jpg,car\na.jpg,bus\n",
            "line 3: file 'a.jpg' was used on line 2 ('a.jpg'); expected unique names",
        ),
        ("file,tags\nx/a.jpg,car\nx/a.png,car\n", "line 3: file 'x/a.png' was used on line 2 ('x/a.jpg')"),
        ("file,tags\na.jpg,car\nimages/a.jpg,car\n", "line 3: file 'a.jpg' was used on line 2"),
        ("file,tags\na.jpg,car,person\n", "line 2: more values than columns; tags are joined by semicolons"),
        ("file,tags\n,car\n", "line 2: no file name"),
        ("file,tags\na.jpg,\n", "0 classes; expected 1…254"),
        ("file,tags\n", "0 classes"),
        ('file,tags\na.jpg,"car\nb.jpg,car\n', "not a table (unexpected end of data)"),
        ("file,tags\na.jpg,car\nb.jpg," + "x" * 140_000 + "\n", "line 3: not a table (field larger than field limit"),
        ("file,tags\na\0.jpg,car\n", "line 2: a zero byte"),
        ('file,tags\n"a\n.jpg",car\n', "file name 'a\\n.jpg'; expected no control characters"),
        (b"file,tags\na.jpg,k\xe4fer\n", "tags.csv: line 2: byte 0xe4 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_bad_tables_are_named(folder, table, words):
    (folder / "tags.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    assert words in refusal(folder)


def test_missing_table_and_image(folder):
    source = FolderSource(folder)
    (folder / "images" / "a.jpg").unlink()
    with pytest.raises(RowError, match=r"images/a\.jpg: missing image file"):
        source.row("train", "a")
    (folder / "tags.csv").unlink()
    assert "tags.csv: missing table of columns file, tags" in refusal(folder)


# ---- files -----------------------------------------------------------------------------------------


def test_equal_stems_in_folders_are_told_apart_by_them_and_their_masks_too(folder):
    (folder / "tags.csv").write_text("file,tags\nx/a.jpg,car\ny/a.jpg,bus\na.jpg,bus\ny/b.v2.jpg,car\nleft.side,car\n")
    for k, name in enumerate(("x/a", "y/a", "a", "y/b.v2")):
        save_image(folder / "images" / f"{name}.jpg")
        save_mask(folder / "masks" / f"{name}.png", k % 2 + 1)
    source = FolderSource(folder)
    assert source.splits() == {"train": ["x/a", "y/a", "a", "b.v2", "left.side"]}
    for id, label in (("x/a", 1), ("y/a", 2), ("a", 1), ("b.v2", 2)):
        assert np.asarray(decode_labels(source.row("train", id).mask, ""))[3, 3] == label


@pytest.mark.parametrize("name", ["b.png", "deep/b.png", "b.PNG", "b_mask.png", "deep/b_mask.PNG", "b.jpg.png"])
def test_masks_by_the_names_that_tools_give_them(folder, name):
    save_mask(folder / "masks" / name, 2)
    source = FolderSource(folder)
    assert source.row("train", "b").mask == (folder / "masks" / name).read_bytes()
    kind = "taken as a mask though not named STEM.png"
    assert source.stray == ({kind: Stray(1, f"masks/{name}")} if name != "b.png" else {})
    save_mask(folder / "masks" / ("deep/b.png" if name == "b.png" else "b.png"), 2)
    assert "are both masks of 'deep/b.jpg'; keep one" in refusal(folder)


def test_folders_that_are_links_are_followed_but_not_in_circles(folder, tmp_path):
    save_image(tmp_path / "far" / "e.jpg")
    save_mask(tmp_path / "near" / "e.png", 2)
    (folder / "images" / "far").symlink_to(tmp_path / "far")
    (folder / "images" / "far" / "circle").symlink_to(folder / "images")
    (folder / "masks").mkdir()
    (folder / "masks" / "far").symlink_to(tmp_path / "near")
    (folder / "tags.csv").write_text("file,tags\nfar/e.jpg,car;bus\na.jpg,car\n")
    source = FolderSource(folder)
    assert source.row("train", "e").mask is not None
    assert source.left_out == {"train": {"not in tags.csv": 3}}


def test_a_name_that_ends_in_mask_may_be_an_images_own(folder):
    save_image(folder / "images" / "a_mask.jpg")
    (folder / "tags.csv").write_text("file,tags\na.jpg,car\na_mask.jpg,car\n")
    save_mask(folder / "masks" / "a_mask.png", 1)
    source = FolderSource(folder)
    assert source.row("train", "a").mask is None and source.row("train", "a_mask").mask is not None


def test_what_belongs_to_nothing_is_counted(folder, tmp_path):
    save_image(folder / "images" / "e.jpg")
    for name in ("a", "A", "z_mask", "x/c"):
        save_mask(folder / "masks" / f"{name}.png", 1)
    (folder / "masks" / "b.bmp").write_bytes(b"BM")
    source = FolderSource(folder)
    assert source.stray == {
        "mask of no image": Stray(4, "masks/A.png"),
        "image not in tags.csv": Stray(1, "images/e.jpg"),
    }
    manifest = prepare(source, tmp_path / "out", tune_val=0)
    assert manifest.splits["train"].left_out == {"not in tags.csv": 1}
    assert manifest.census["stray"]["mask of no image"] == {"files": 4, "example": "masks/A.png"}


@pytest.mark.parametrize("file", ["../../outside.jpg", "{root}/images/a.jpg", "x/../../../outside.jpg", "C:\\x.jpg"])
def test_names_that_leave_the_folder_are_refused_and_may_be_left_out(folder, tmp_path, file):
    save_image(tmp_path / "outside.jpg")
    (folder / "tags.csv").write_text(f"file,tags\nc.jpg,car\n{file.format(root=folder)},car\n")
    with pytest.raises(RowError, match=r"tags\.csv: line 3: file name .* leads out of .*; expected one below it"):
        prepare(FolderSource(folder), tmp_path / "out", tune_val=0)
    manifest = prepare(FolderSource(folder), tmp_path / "out", tune_val=0, on_error="skip")
    assert manifest.ids("train") == ("c",) and manifest.splits["train"].left_out["missing file"] == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "a pipe"),
        (lambda p: p.symlink_to("/dev/zero"), "a device; expected a regular file"),
        (lambda p: p.symlink_to("/nowhere"), "missing .* file .*a link to nowhere"),
        (Path.mkdir, "a folder; expected a regular file"),
    ],
)
@pytest.mark.parametrize("which", ["images/a.jpg", "masks/a.png"])
def test_only_regular_files_are_opened(folder, make, words, which):
    save_mask(folder / "masks" / "a.png", 1)
    (folder / which).unlink()
    make(folder / which)
    source = FolderSource(folder)
    if make is Path.mkdir and which.startswith("masks"):
        assert source.row("train", "a").mask is None  # a folder of masks, and empty
        return
    with pytest.raises(RowError, match=words):
        source.row("train", "a")
