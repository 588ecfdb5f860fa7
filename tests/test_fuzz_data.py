"""Damaged inputs: whatever the bytes are, a reader answers, or refuses in one short printable line.

Seconds by default and always the same inputs; ``UGRL_FUZZ=20000`` tries that many new ones of each kind.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ugrl.data.census import Census, Inventory
from ugrl.data.folder import FolderSource
from ugrl.data.images import decode_labels, decode_pixels, decode_rgb, image_size, orientation
from ugrl.data.source import RowError, make_row
from ugrl.data.voc import VocSource
from ugrl.errors import DataError
from ugrl.foreign import parse_json

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")
EXAMPLES = int(os.environ.get("UGRL_FUZZ", "0"))
fuzzed = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def refused(action, kind=DataError):
    """Run what may refuse; nothing but a refusal of one short line may escape."""
    try:
        action()
    except kind as error:
        for text in error.problems:
            assert text.isprintable() and 0 < len(text) <= 400, text


@st.composite
def damaged(draw, seeds):
    """One of some sound files with pieces overwritten, taken out, doubled or cut off."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("write", "drop", "insert", "double", "cut")))
        piece = draw(st.one_of(st.binary(max_size=8), st.sampled_from(PIECES)))
        if kind == "write":
            data[at : at + len(piece)] = piece
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[at:at] = piece
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 200))]
        else:
            del data[at:]
    return bytes(data)


PIECES = [
    *(b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\xff\xe1\x00\x02", b"IHDR", b"acTL"),
    *(b'"', b"'", b",", b";", b"\r", b"\n", b"\t", b"[", b"]", b"\x1b[31m", b"../", b"/", b"\\", b"\xef\xbb\xbf"),
    *(b"nan", b"sep=;\n", b"[/b]", b"<a>" * 50, b"<!DOCTYPE a>", b'encoding="utf-7"', b"&amp;", b"&x;", b"a" * 5000),
    *(b"\xc3\xa4", b"\xe2\x80\xa8", b"JPEGImages/", b" /SegmentationClassAug/x.png", b".jpg", b"1e999", b"-1", b"{}"),
    *(b"iCCP", b"\xff\xfe", b"null"),
]  # fmt: skip


def encoded(form: str, array, **options) -> bytes:
    out = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(out, form, **options)
    return out.getvalue()


RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 3, (9, 12), dtype=np.uint8)
TURNED = Image.Exif()
TURNED[0x0112] = 6
PICTURES = [
    encoded("JPEG", RGB, exif=TURNED, icc_profile=b"x" * 200),
    encoded("JPEG", RGB, progressive=True),
    encoded("PNG", RGB, exif=TURNED),
    encoded("PNG", GRAY.astype(np.uint16) * 20000),
    encoded("WEBP", RGB),
    encoded("BMP", RGB),
    encoded("TIFF", RGB),
    encoded("TIFF", GRAY.astype(np.float32)),
    encoded("TIFF", RGB, compression="tiff_lzw"),
]
MASKS = [
    encoded("PNG", GRAY),
    encoded("PNG", GRAY.astype(np.uint16)),
    encoded("PNG", Image.fromarray(GRAY).convert("P"), bits=2),
    encoded("PNG", RGB),
]


@fuzzed
@given(damaged(PICTURES))
def test_images(data):
    for read in (decode_rgb, decode_pixels, image_size):
        refused(lambda read=read: read(data, "row x"))
    refused(lambda: make_row(id="x", image=data, tags=[1], mask=MASKS[0], num_classes=2, where="x"), RowError)
    refused(lambda: orientation(data))


@fuzzed
@given(damaged(MASKS))
def test_masks(data):
    refused(lambda: decode_labels(data, "row x"))
    image = encoded("PNG", RGB)
    refused(lambda: make_row(id="x", image=image, tags=[1], mask=data, num_classes=2, where="x"), RowError)


def walk(source) -> None:
    for split, ids in source.splits().items():
        for id in ids:
            source.tags(split, id)
            refused(lambda split=split, id=id: source.row(split, id), RowError)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("own")
    for place in ("images", "masks"):
        (root / place).mkdir()
    (root / "images" / "a.jpg").write_bytes(PICTURES[1])
    (root / "masks" / "a.png").write_bytes(MASKS[0])
    os.mkfifo(root / "images" / "b.jpg")
    return root


TABLES = [
    b"file,split,tags\na.jpg,train,cat;dog\nb.jpg,val,\n",
    b"sep=;\nImage;Label\na.jpg;\"['cat', 'dog']\"\nb.jpg;nan\n",
    b'file\ttags\na.jpg\t"cat, dog"\nb.jpg\tdog\n',
    "file,tags\nimages\\a.jpg,k\xe4fer|cat\n".encode("utf-16"),
]


@fuzzed
@given(damaged(TABLES), st.one_of(st.none(), damaged([b"cat\ndog\n", "k\xe4fer\r\ncat\n".encode()])))
def test_tables(folder, table, classes):
    (folder / "tags.csv").write_bytes(table)
    (folder / "classes.txt").unlink(missing_ok=True)
    if classes is not None:
        (folder / "classes.txt").write_bytes(classes)
    refused(lambda: walk(FolderSource(folder)))


@pytest.fixture(scope="module")
def devkit(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("voc")
    for place in ("ImageSets/Segmentation", "JPEGImages", "Annotations", "SegmentationClass"):
        (root / place).mkdir(parents=True)
    (root / "JPEGImages" / "a.jpg").write_bytes(PICTURES[1])
    (root / "SegmentationClass" / "a.png").write_bytes(MASKS[0])
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("b\n")
    return root


LISTS = [b"a\nc d\n", b"/JPEGImages/a.jpg /SegmentationClassAug/a.png\r\n", "\ufeffa\n".encode()]
ANNOTATIONS = [
    b"<annotation><object><name>cat</name></object></annotation>",
    b'<?xml version="1.0" encoding="utf-8"?><annotation><object><name>dog</name><part/></object></annotation>',
]


@fuzzed
@given(damaged(LISTS), damaged(ANNOTATIONS))
def test_lists_and_annotations(devkit, text, annotation):
    (devkit / "ImageSets" / "Segmentation" / "train.txt").write_bytes(text)
    (devkit / "Annotations" / "a.xml").write_bytes(annotation)
    refused(lambda: walk(VocSource(devkit)))


def counted() -> bytes:
    import json

    census = Census(2)
    census.add(make_row(id="x", image=PICTURES[0], tags=[1], mask=None, num_classes=2, where="x"))
    return json.dumps(Inventory(("a", "b"), {"train": census}).to_tree()).encode()


@fuzzed
@given(damaged([counted()]))
def test_a_census(data):
    def read() -> None:
        inventory = Inventory.from_tree(parse_json(data, "manifest"), ("a", "b"), "manifest")
        inventory.table(), inventory.notes()
        assert all(w.isprintable() for w in inventory.warnings())

    refused(read)
