"""What bytes become which pixels and labels, for training, evaluation and prediction alike."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from ugrl.data import images
from ugrl.data.augment import Augment, eval_sample
from ugrl.data.images import decode_labels, decode_pixels, decode_rgb, encode_labels, image_size, orientation
from ugrl.data.source import RowError, make_row
from ugrl.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(array, form="PNG", **options) -> bytes:
    out = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(out, form, **options)
    return out.getvalue()


def turned(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def png(values, bits: int, kind: int = 0, chunks=()) -> bytes:
    """A PNG of raw samples, as no conversion of Pillow would write it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in values]
    else:
        rows = [
            np.packbits(np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]).tobytes() for row in values
        ]
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in body)


# ---- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_by_their_full_range(form):
    values = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    for decode in (decode_rgb, decode_pixels):
        got = decode(encoded(values, form), "x")
        np.testing.assert_array_equal(got, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))
        assert got.flags.writeable and (got.min(), got.max()) == (0, 255)


def test_sixteen_bits_of_colour_are_those_of_gray():
    values = RNG.integers(0, 65536, (4, 10), dtype=np.uint16)
    colours = np.repeat(values, 3, axis=1)  # three samples a pixel
    header = png(colours, 16, 2)
    header = header.replace(struct.pack(">II", 30, 4), struct.pack(">II", 10, 4), 1)
    header = header[:29] + struct.pack(">I", zlib.crc32(header[12:29])) + header[33:]
    np.testing.assert_array_equal(decode_rgb(header, "x"), decode_rgb(encoded(values), "x"))


@pytest.mark.parametrize("array", [np.ones((4, 5), np.float32), np.ones((4, 5), np.int32)])
def test_samples_of_32_bits_are_refused(array):
    for decode in (decode_rgb, decode_pixels):
        with pytest.raises(DataError, match=r"^x\.tif: samples of 32 bits; expected 8 or 16 bits a sample$"):
            decode(encoded(array, "TIFF"), "x.tif")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gray_images_of_few_bits_keep_black_and_white(bits):
    values = np.arange(40).reshape(5, 8) % (2**bits)
    got = decode_rgb(png(values, bits), "x")
    np.testing.assert_array_equal(got[..., 1], values * (255 // (2**bits - 1)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "1"])
def test_other_modes_have_the_pixels_of_pillow(mode):
    image = Image.fromarray(PICTURE).convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG", **({"transparency": 3} if mode == "P" else {}))
    np.testing.assert_array_equal(decode_pixels(data, "x"), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_stand_upright_by_either_decoder(number, form):
    data = encoded(PICTURE, form, exif=turned(number))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    for decode in (decode_rgb, decode_pixels):
        got = decode(data, "x")
        np.testing.assert_array_equal(got, expected)
        assert got.flags.writeable and got.flags.c_contiguous
    assert image_size(data, "x") == expected.shape[1::-1]


@pytest.mark.parametrize("exif", [turned(0), turned(9), b"Exif\0\0broken", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_notes_that_say_nothing_turn_nothing(exif):
    data = encoded(PICTURE, "JPEG", exif=exif)
    assert orientation(data) == 1 and decode_pixels(data, "x").shape == decode_rgb(data, "x").shape == (20, 30, 3)


def test_pillow_is_not_asked_where_a_jpeg_can_have_no_note(monkeypatch):
    plain, noted = encoded(PICTURE, "JPEG", icc_profile=b"x" * 70_000), encoded(PICTURE, "JPEG", exif=turned(6))
    asked = []
    monkeypatch.setattr(images, "_orientation", lambda image: asked.append(image) or 1)
    assert orientation(plain) == 1 and not asked
    orientation(noted)
    assert len(asked) == 1


def test_files_of_several_pictures_are_refused_but_a_cameras_second_view():
    two = [Image.fromarray(PICTURE), Image.fromarray(255 - PICTURE)]
    for form in ("PNG", "WEBP", "TIFF"):
        data = encoded(two[0], form, save_all=True, append_images=two[1:])
        with pytest.raises(DataError, match=rf"^x: a file of several pictures \({form}\); expected one$"):
            decode_pixels(data, "x")
    view = encoded(two[0], "MPO", save_all=True, append_images=two[1:], quality=95, subsampling=0)
    np.testing.assert_array_equal(decode_rgb(view, "x"), decode_pixels(view, "x"))
    assert np.abs(decode_rgb(view, "x").astype(int) - PICTURE).mean() < 30


@pytest.mark.parametrize(
    "data",
    [
        png(np.zeros((4, 4)), 8, chunks=[(b"iCCP", b"")]),
        png(np.zeros((4, 4)), 8, chunks=[(b"pHYs", b"\0")]),
        png(np.zeros((4, 4)), 8, chunks=[(b"IHDR", b"")]),
        png(np.zeros((4, 4)), 3),
        b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40,
        b"RIFF\x04\0\0\0WEBPVP8 ",
        b"BM" + b"\xff" * 60,
    ],
    ids=["iCCP", "pHYs", "IHDR", "depth", "tiff", "webp", "bmp"],
)
def test_whatever_pillow_raises_is_one_line(data):
    for read in (decode_rgb, decode_pixels, image_size):
        try:
            read(data, "row 7")
        except DataError as error:
            assert str(error).startswith("row 7: ") and str(error).isprintable()


def test_a_picture_far_too_large_is_refused_by_its_header():
    data = bytearray(encoded(PICTURE))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    for read in (decode_rgb, decode_pixels, image_size):
        with pytest.raises(DataError, match=r"^x: more than 179 million pixels; expected fewer: scale the image down$"):
            read(bytes(data), "x")


# ---- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_masks_are_raw_samples_at_any_depth_and_shards_hold_8_bits(bits):
    values = np.arange(40).reshape(5, 8) % min(2**bits, 21)
    data = png(values, bits)
    np.testing.assert_array_equal(np.asarray(decode_labels(data, "m")), values)
    image = encoded(np.zeros((5, 8, 3), np.uint8))
    row = make_row(id="a", image=image, tags=[1], mask=data, num_classes=20, where="a")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row.mask))), values)
    assert (row.mask == data) == (bits == 8)


@pytest.mark.parametrize(
    ("label", "words"), [(300, "label 300; expected at most 255"), (21, "label 21; expected 0…20")]
)
def test_labels_beyond_the_classes_are_refused(label, words):
    image, mask = encoded(np.zeros((5, 8, 3), np.uint8)), png(np.full((5, 8), label), 16)
    with pytest.raises(RowError, match=f"^m.png: the mask holds {words}") as caught:
        make_row(id="a", image=image, tags=[1], mask=mask, num_classes=20, where="a", mask_where="m.png")
    assert caught.value.reason == "unusable mask"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_masks_of_colours_are_refused(mode):
    with pytest.raises(DataError, match=rf"^m: mask of mode {mode}; expected class indices .* not colours"):
        decode_labels(encoded(Image.fromarray(PICTURE).convert(mode)), "m")


# ---- both ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 6])
def test_a_mask_of_the_upright_picture_lies_where_the_picture_is_bright(number):
    scene = np.full((32, 48, 3), 20, np.uint8)
    scene[2:12, 2:12] = 240
    labels = (scene[..., 0] > 100).astype(np.uint8)
    stored = np.rot90(scene, {3: 2, 6: 1}[number]).copy()
    data = encoded(stored, "JPEG", exif=turned(number), quality=95)
    row = make_row(id="a", image=data, tags=[1], mask=encode_labels(labels), num_classes=1, where="a.jpg")
    assert (row.width, row.height, row.image) == (48, 32, data)
    for sample in (eval_sample(row, 1), Augment(crop=48, num_classes=1)(row, np.random.default_rng(0))):
        inside = sample.mask_HW == 1
        assert (
            inside.any()
            and sample.image_3HW[1][inside].mean() > 1 > 0 > sample.image_3HW[1][sample.mask_HW == 0].mean()
        )


def test_a_mask_of_the_picture_as_it_is_stored_is_refused():
    data = encoded(PICTURE, "JPEG", exif=turned(6))
    words = r"^m\.png: the mask is 30×20, as the image is stored, but a note in it \(EXIF\) turns it to 20×30"
    with pytest.raises(RowError, match=words):
        make_row(
            id="a",
            image=data,
            tags=[1],
            mask=encode_labels(np.zeros((20, 30))),
            num_classes=1,
            where="",
            mask_where="m.png",
        )
