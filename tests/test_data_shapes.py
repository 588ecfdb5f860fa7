from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ugrl.data.shapes import CLASS_NAMES, ShapesSource, ShapesSpec, open_shapes
from ugrl.data.source import Source, open_source
from ugrl.errors import DataError


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def rows():
    source = open_shapes(train=120, val=2, size=96, difficulty=0.5)
    return [source.row("train", id) for id in source.splits()["train"]]


def test_is_a_source_of_at_least_six_classes():
    source = open_source("shapes", train=3, val=2)
    assert isinstance(source, Source)
    assert len(source.class_names) == len(set(CLASS_NAMES)) >= 6
    assert source.splits() == {
        "train": ["train_000000", "train_000001", "train_000002"],
        "val": ["val_000000", "val_000001"],
    }


def test_tags_are_what_the_mask_shows_and_are_known_without_painting(rows):
    source = open_shapes(train=120)
    for row in rows:
        shown = set(np.unique(pixels(row.mask)).tolist()) - {0}
        assert shown == set(row.tags) and 1 <= len(row.tags) <= 3
        assert source.tags("train", row.id) == row.tags


@pytest.mark.parametrize("difficulty", [0.0, 1.0])
def test_every_tag_keeps_visible_pixels_at_either_end_of_difficulty(difficulty):
    source = open_shapes(train=80, difficulty=difficulty)
    for id in source.splits()["train"]:
        row = source.row("train", id)
        labels = pixels(row.mask)
        assert all((labels == t).sum() >= 0.01 * labels.size for t in row.tags), id


def test_every_class_appears_about_as_often_as_any_other(rows):
    counts = np.bincount([t for r in rows for t in r.tags], minlength=7)[1:]
    assert counts.min() > 0.5 * counts.mean()


def test_an_image_depends_on_seed_split_and_index_alone():
    small, large = open_shapes(train=2, seed=3), open_shapes(train=9, val=1, seed=3)
    assert small.row("train", "train_000001") == large.row("train", "train_000001")
    other = open_shapes(train=2, seed=4)
    assert small.row("train", "train_000001").image != other.row("train", "train_000001").image
    assert small.row("train", "train_000000").image != small.row("val", "val_000000").image


def test_the_emblem_is_much_smaller_than_the_object():
    # At difficulty 0, emblems are the only saturated pixels.
    source = open_shapes(train=60, difficulty=0.0)
    shares = []
    for id in source.splits()["train"]:
        row = source.row("train", id)
        hsv = np.asarray(Image.open(io.BytesIO(row.image)).convert("HSV"))
        labels = pixels(row.mask)
        for t in row.tags:
            inside = labels == t
            shares.append((hsv[inside][:, 1] > 130).mean())
    assert 0.03 < np.mean(shares) < 0.4


def test_difficulty_lowers_the_contrast_between_objects_and_their_surroundings():
    def contrast(difficulty):
        source = open_shapes(train=60, difficulty=difficulty)
        out = []
        for id in source.splits()["train"]:
            row = source.row("train", id)
            image = Image.open(io.BytesIO(row.image))
            gray = np.asarray(image.convert("L"), float)
            muted = np.asarray(image.convert("HSV"))[:, :, 1] < 60  # bodies without their emblems
            inside = pixels(row.mask) > 0
            out.append(np.abs(gray[inside & muted] - gray[~inside].mean()).mean())
        return np.quantile(out, 0.2)  # of the faintest: most objects stay clear

    assert contrast(1.0) < 0.8 * contrast(0.0), (contrast(1.0), contrast(0.0))


def test_other_sizes():
    row = open_shapes(train=1, size=160).row("train", "train_000000")
    assert (row.width, row.height) == (160, 160) == pixels(row.mask).shape == pixels(row.image).shape[:2]


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [("train", 0, "≥ 1"), ("val", 0, "≥ 1"), ("size", 16, "32…4096"), ("difficulty", 1.5, "0…1"), ("seed", -1, "≥ 0")],
)
def test_values_out_of_bounds_are_named(key, value, wanted):
    with pytest.raises(DataError, match=f"^shapes: {key} is {value}; expected {wanted}$"):
        ShapesSource(ShapesSpec(**{key: value}))


def test_an_option_of_another_source_is_named():
    with pytest.raises(DataError, match="source 'shapes' has no option 'year'"):
        open_source("shapes", year=2014)
    with pytest.raises(DataError, match="unknown source 'shape'; did you mean 'shapes'"):
        open_source("shape")
