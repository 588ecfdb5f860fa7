from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ugrl.data import augment as augment_module
from ugrl.data import images, warp
from ugrl.data.augment import IMAGENET_MEAN, IMAGENET_STD, Augment, eval_sample, normalize
from ugrl.data.images import decode_labels, decode_pixels, decode_rgb, encode_labels
from ugrl.data.order import sample_rng
from ugrl.errors import DataError
from ugrl.types import Row


class Draws:
    """A generator that returns what it is told, and counts."""

    def __init__(self, *values):
        self.values = values

    def random(self, n):
        assert n == len(self.values)
        return np.array(self.values)


@pytest.fixture(params=["fast", "pillow"])
def backend(request, monkeypatch):
    """With the optional packages, where they are installed, and without them."""
    if request.param == "pillow":
        monkeypatch.setattr(warp, "opencv", lambda: None)
        monkeypatch.setattr(augment_module, "opencv", lambda: None)
        monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    return request.param


def make(width=60, height=40, seed=0, mask=True, quality=95):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), 3)
    out = io.BytesIO()
    coarse.save(out, "JPEG", quality=quality)
    labels = rng.integers(0, 3, (height, width)).astype(np.uint8)
    return Row("a", out.getvalue(), width, height, (1, 2), encode_labels(labels) if mask else None)


def pixels(row):
    return np.asarray(Image.open(io.BytesIO(row.image)).convert("RGB"))


def denormalize(image_3HW):
    return (image_3HW.transpose(1, 2, 0) * IMAGENET_STD + IMAGENET_MEAN) * 255


def test_normalize_is_the_formula(backend):
    values = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    expected = (values / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(normalize(values), expected.transpose(2, 0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.37, 0.5, 0.8, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("uy,ux", [(0.0, 0.0), (0.31, 0.77), (0.999, 0.999)])
def test_crop_before_resize_equals_resize_then_crop(backend, scale, uy, ux):
    row, crop = make(61, 43), 48
    sample = Augment(crop=crop, num_classes=2, scale_min=scale, scale_max=scale)(row, Draws(0.5, 0.9, uy, ux))
    width, height = round(61 * scale), round(43 * scale)
    whole = np.asarray(Image.fromarray(pixels(row)).resize((width, height), Image.Resampling.BILINEAR), float)
    labels = np.asarray(decode_labels(row.mask, "").resize((width, height), Image.Resampling.NEAREST))
    y0, y1, x0, x1 = sample.box_4
    oy = 0 if height <= crop else int(uy * (height - crop + 1))
    ox = 0 if width <= crop else int(ux * (width - crop + 1))
    assert (y1 - y0, x1 - x0) == (min(crop, height), min(crop, width))
    window = slice(oy, oy + y1 - y0), slice(ox, ox + x1 - x0)
    got = denormalize(sample.image_3HW[:, y0:y1, x0:x1])
    assert np.abs(got - whole[window]).max() <= 1.01  # coefficients and results of each axis are rounded to 8 bits
    assert np.abs(got - whole[window]).mean() < (0.5 if backend == "fast" and scale > 1 else 0.1)
    assert abs((got - whole[window]).mean()) < 0.35  # OpenCV cuts off where Pillow rounds
    assert (sample.mask_HW[y0:y1, x0:x1] == labels[window]).mean() > 0.99


def whole_then_cut(image_HW3, y, x):
    """The definition: Pillow's resize of the whole image, then a slice."""
    whole = Image.fromarray(image_HW3).resize((x.scaled, y.scaled), Image.Resampling.BILINEAR)
    return np.asarray(whole)[y.offset : y.offset + y.size, x.offset : x.offset + x.size].astype(int)


@pytest.mark.parametrize("scale", [0.1, 0.26, 0.49, 0.77, 0.999, 1.0, 1.001, 1.7, 4.0])
@pytest.mark.parametrize(("height", "width"), [(97, 131), (1, 1), (1, 150), (150, 1), (2, 3), (300, 40)])
def test_every_size_and_scale_is_resize_then_cut(backend, height, width, scale):
    rng = np.random.default_rng(height * width)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)  # noise: the hardest content
    for u in (0.0, 0.37, 0.999):
        cut = Augment(64, 1, scale, scale).cut(height, width, Draws(0.0, 0.9, u, 0.999 - u))
        got, expected = warp.resample(image, cut.y, cut.x).astype(int), whole_then_cut(image, cut.y, cut.x)
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= 2 and np.abs(got - expected).mean() < 0.5


def test_a_crop_far_inside_a_large_image_is_not_resampled_in_full(backend, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    large = []
    for owner, name in ((warp.F, "interpolate"), (warp.opencv() or warp, "resize")):
        if hasattr(owner, name):
            monkeypatch.setattr(owner, name, lambda *_, **__: large.append(1))
    for scale in (0.6, 3.0):
        cut = Augment(40, 1, scale, scale).cut(400, 500, Draws(0.0, 0.9, 0.9, 0.9))
        got, expected = warp.resample(image, cut.y, cut.x).astype(int), whole_then_cut(image, cut.y, cut.x)
        assert np.abs(got - expected).max() <= 2 and np.abs(got - expected).mean() < 0.5
    assert not large


def encoded(mode="RGB", **options):
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize((67, 45), 3)
    out = io.BytesIO()
    coarse.convert(mode).save(out, **{"format": "JPEG", "quality": 88, **options})
    return out.getvalue()


KINDS = {
    "420": {"subsampling": 2},
    "422": {"subsampling": 1},
    "444": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 2},
    "coarse": {"quality": 8},
    "rgb": {"keep_rgb": True},
    "gray": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
    "png": {"format": "PNG"},
    "gray png": {"mode": "L", "format": "PNG"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_has_the_pixels_of_pillow(backend, kind):
    data = encoded(**KINDS[kind])
    got = decode_pixels(data, "x")
    np.testing.assert_array_equal(got, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert got.flags.writeable and got.dtype == np.uint8


def test_the_fast_decoder_is_used_for_everyday_images(monkeypatch):
    if images._simplejpeg() is None:
        pytest.skip("without simplejpeg, Pillow alone decodes: there are no two decoders to compare")
    monkeypatch.setattr(images, "decode_rgb", lambda *_: pytest.fail("decoded by Pillow"))
    for kind in ("420", "444", "progressive", "gray"):
        decode_pixels(encoded(**KINDS[kind]), "x")


def test_orientation_notes_are_followed(backend):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode_pixels(encoded(exif=exif), "x").shape == (67, 45, 3)


@pytest.mark.parametrize("kind", ["420", "444", "progressive", "restarts", "gray", "cmyk"])
@pytest.mark.parametrize("keep", [-40, 0.7, 0.55])
def test_no_decoder_takes_a_truncated_image(backend, kind, keep):
    data = encoded(**KINDS[kind])
    part = data[: keep if keep < 0 else int(keep * len(data))]
    for decode in (decode_pixels, decode_rgb):
        with pytest.raises(DataError, match=rf"^row 7: truncated image \({len(part)} bytes\)$"):
            decode(part, "row 7")


@pytest.mark.parametrize("kind", ["420", "422", "444", "progressive", "gray"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_last_bytes_matter_as_they_do_to_pillow(kind, cut):
    """Pillow takes some files without their end mark, where every pixel was there before it."""
    data, outcomes = encoded(**KINDS[kind])[:-cut], []
    for decode in (decode_pixels, decode_rgb):
        try:
            outcomes.append(np.asarray(decode(data, "row 7")).tobytes())
        except DataError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(("data", "words"), [(b"", "empty file"), (b"\xff\xd8\xff", "not a JPEG"), (b"text", "not a")])
def test_what_is_no_image_is_refused(backend, data, words):
    with pytest.raises(DataError, match=f"^row 7: {words}"):
        decode_pixels(data, "row 7")


def test_an_image_of_too_many_pixels_is_refused(backend, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="^row 7: more than 0 million pixels; expected fewer: scale the image down"):
        decode_pixels(encoded(), "row 7")


def test_outside_of_the_box_the_image_is_zero_and_the_mask_ignored():
    sample = Augment(crop=64, num_classes=2, scale_min=0.5, scale_max=0.5)(make(60, 40), Draws(0, 0.9, 0.4, 0.6))
    y0, y1, x0, x1 = sample.box_4
    assert (y1 - y0, x1 - x0) == (20, 30) and y0 == int(0.4 * 45) and x0 == int(0.6 * 35)
    outside = np.ones((64, 64), bool)
    outside[y0:y1, x0:x1] = False
    assert (sample.image_3HW[:, outside] == 0).all() and (sample.mask_HW[outside] == 255).all()
    assert (sample.mask_HW[~outside] != 255).all()
    assert np.abs(sample.image_3HW[:, ~outside]).min(axis=0).max() > 0


@pytest.mark.parametrize("crop", [24, 80])
def test_the_mirror_image_is_the_mirror_image(backend, crop):
    augment = Augment(crop=crop, num_classes=2, scale_min=0.9, scale_max=0.9)
    plain, turned = augment(make(), Draws(0, 0.5, 0.3, 0.2)), augment(make(), Draws(0, 0.49, 0.3, 0.2))
    np.testing.assert_array_equal(turned.image_3HW, plain.image_3HW[:, :, ::-1])
    np.testing.assert_array_equal(turned.mask_HW, plain.mask_HW[:, ::-1])
    y0, y1, x0, x1 = plain.box_4
    assert turned.box_4.tolist() == [y0, y1, crop - x1, crop - x0]
    off = Augment(crop=crop, num_classes=2, scale_min=0.9, scale_max=0.9, mirror=False)
    np.testing.assert_array_equal(off(make(), Draws(0, 0.1, 0.3, 0.2)).image_3HW, plain.image_3HW)


def test_a_sample_is_a_function_of_row_and_state_alone():
    augment, row = Augment(crop=32, num_classes=2), make()
    before = (row.image, row.mask)
    one, two = (augment(row, sample_rng(0, 3, "a")) for _ in range(2))
    np.testing.assert_array_equal(one.image_3HW, two.image_3HW)
    np.testing.assert_array_equal(one.box_4, two.box_4)
    assert (row.image, row.mask) == before
    assert not np.array_equal(one.image_3HW, augment(row, sample_rng(0, 4, "a")).image_3HW)


def test_the_number_of_draws_does_not_depend_on_image_or_options():
    states = set()
    for row, mirror in ((make(20, 90), True), (make(200, 30), False)):
        rng = sample_rng(1, 1, "x")
        Augment(crop=32, num_classes=2, mirror=mirror)(row, rng)
        states.add(rng.random())
    assert len(states) == 1


def test_offsets_and_scales_cover_their_ranges():
    augment, row = Augment(crop=32, num_classes=2, scale_min=0.25, scale_max=2.0), make(64, 64)
    boxes = np.array([augment(row, sample_rng(0, e, "a")).box_4 for e in range(300)])
    sides = boxes[:, 1] - boxes[:, 0]
    assert sides.min() <= 18 and (sides == 32).mean() > 0.6
    small = boxes[sides < 32]
    assert (small[:, 0] == 0).any() and (small[:, 1] == 32).any()


def test_tags_dtypes_and_rows_without_mask():
    sample = Augment(crop=32, num_classes=4)(make(mask=False), sample_rng(0, 0, "a"))
    assert sample.mask_HW is None and sample.tags_F.tolist() == [1, 1, 0, 0]
    assert sample.image_3HW.dtype == np.float32 == sample.tags_F.dtype and sample.box_4.dtype == np.int64


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_images_become_rgb(mode):
    out = io.BytesIO()
    Image.new(mode, (20, 20), 90 if mode == "L" else (10, 20, 30, 40)).save(out, "JPEG")
    sample = eval_sample(Row("g", out.getvalue(), 20, 20, (1,)), 1)
    assert sample.image_3HW.shape == (3, 20, 20)


def test_eval_sample_is_the_whole_image():
    row = make(33, 21)
    sample = eval_sample(row, 2)
    np.testing.assert_array_equal(sample.image_3HW, normalize(pixels(row)))
    np.testing.assert_array_equal(sample.mask_HW, np.asarray(decode_labels(row.mask, "")))
    assert sample.box_4.tolist() == [0, 21, 0, 33]


@pytest.mark.parametrize("cut", [2, 0.5, 0.9])
def test_a_truncated_image_is_refused_with_its_name(backend, cut):
    row = make(200, 150)
    data = row.image[: -int(cut) if cut >= 1 else int(cut * len(row.image))]
    with pytest.raises(DataError, match=rf"^row a: truncated image \({len(data)} bytes\)$"):
        Augment(crop=32, num_classes=2)(Row("a", data, 200, 150, (1,)), sample_rng(0, 0, "a"))


def test_a_mask_of_another_size_is_refused():
    row = make(20, 10)
    with pytest.raises(DataError, match="row a: the mask is 60×40; expected 20×10 as the image"):
        eval_sample(Row("a", row.image, 20, 10, (1,), make().mask), 2)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_masks_are_read_as_indices(bits):
    values = np.arange(40).reshape(5, 8) % (2**bits)
    image = Image.fromarray(values.astype(np.uint8), "L").convert("P")
    image.putdata(values.ravel().tolist())
    image.putpalette([(i * 37) % 256 for i in range(768)])
    out = io.BytesIO()
    image.save(out, "PNG", bits=bits)
    np.testing.assert_array_equal(np.asarray(decode_labels(out.getvalue(), "m")), values)


def test_a_mask_of_colours_is_refused():
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "PNG")
    with pytest.raises(DataError, match=r"^m\.png: mask of mode RGB; expected class indices"):
        decode_labels(out.getvalue(), "m.png")
