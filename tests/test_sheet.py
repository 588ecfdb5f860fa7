"""Pictures in TensorBoard: titles, tags and a legend, and the same validation images each time."""

from __future__ import annotations

import io
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny import tiny_tree
from ugrl.config import build
from ugrl.data.reader import ShardReader
from ugrl.eval import sheet
from ugrl.eval.palettes import heat, palette, u_share
from ugrl.eval.sheet import GAP, LINE, SIDE, draw, row_of
from ugrl.train import tensorboard
from ugrl.train.loop import LOOKS, Trainer

LEFT = [GAP + k * (SIDE + GAP) for k in range(6)]
TOP = GAP + 3 * LINE


def test_a_sheet_has_a_column_for_each_layer() -> None:
    image = np.full((10, 20, 3), 90, np.uint8)
    labels = np.zeros((10, 20), np.uint8)
    labels[:, 10:] = 2
    unsure = np.full((10, 20), np.nan, np.float32)
    unsure[5:] = 1.0
    cam = np.zeros((10, 20), np.float32)
    made = draw("step 3", [row_of("a", [2], image, {"CAM": cam, "label": labels, "u": unsure})], ["cat", "dog"])
    assert made.dtype == np.uint8 and made.shape[1] == 4 * (SIDE + GAP) + GAP
    high = SIDE // 2  # a row is as high as its pictures
    assert made.shape[0] == 2 * GAP + (2 + 1 + 1) * LINE + high + GAP
    middle = TOP + high // 4
    assert (made[middle, LEFT[0] + 9] == 90).all()
    over = (0.4 * 90 + 0.6 * heat(np.zeros(1))[0]).astype(np.uint8)
    assert made[middle, LEFT[1] + 9].tolist() == over.tolist()
    colours = palette("safe")
    assert made[middle, LEFT[2] + 9].tolist() == colours[0].tolist()
    assert made[middle, LEFT[2] + SIDE - 9].tolist() == colours[2].tolist()
    assert made[middle, LEFT[3] + 9].tolist() == list(sheet.UNKNOWN)
    assert made[TOP + high - 9, LEFT[3] + 9].tolist() == heat(np.ones(1))[0].tolist()


def changed(one: np.ndarray, other: np.ndarray) -> set[str]:
    """Which parts of two sheets of one row differ."""
    assert one.shape == other.shape
    rows = np.flatnonzero((one != other).any(axis=(1, 2)))
    parts = {"title": (0, GAP + LINE), "columns": (GAP + LINE, GAP + 2 * LINE), "tags": (GAP + 2 * LINE, TOP)}
    parts |= {"pictures": (TOP, TOP + SIDE), "legend": (TOP + SIDE, one.shape[0])}
    return {name for name, (first, end) in parts.items() if ((rows >= first) & (rows < end)).any()}


def test_its_words_are_the_title_the_columns_the_tags_and_the_classes() -> None:
    image, labels = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), np.uint8)

    def made(title: str = "t", column: str = "p", id: str = "a", tags: tuple[int, ...] = (1,), name: str = "cat"):
        return draw(title, [row_of(id, tags, image, {column: labels})], [name, "dog"])

    first = made()
    assert (made() == first).all()
    assert changed(first, made(title="u")) == {"title"}
    assert changed(first, made(column="q")) == {"columns"}
    assert changed(first, made(id="b")) == changed(first, made(tags=(2,))) == changed(first, made(tags=())) == {"tags"}
    assert changed(first, made(name="cow")) == {"tags", "legend"}


def test_words_from_outside_fit_and_break_nothing() -> None:
    image, labels = np.zeros((300, 2, 3), np.uint8), np.full((300, 2), 255, np.uint8)
    labels[0] = np.array([0, 3])
    names = ["w" * 3000, "a\nb\x1b[31m", "漢字"]
    rows = [row_of("x" * 900 + "\n", [1, 2, 3], image, {"label": labels}), row_of("b", [9], image, {"label": labels})]
    made = draw("t", rows, names)
    assert made.shape[1] == 2 * (SIDE + GAP) + GAP and made.shape[0] < 2 * (SIDE + LINE + GAP) + 8 * LINE
    assert (made[:, -1] == 255).all()  # nothing runs over the edge


# -- a run -----------------------------------------------------------------------------------------


def pictures(folder: Path) -> dict[tuple[str, int], np.ndarray]:
    """The pictures in TensorBoard's files, by name and step."""
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at + 12 <= len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                if value.HasField("image"):
                    with Image.open(io.BytesIO(value.image.encoded_image_string)) as image:
                        found[value.tag, event.step] = np.asarray(image.convert("RGB"))
    return found


def test_a_run_shows_the_same_images_at_each_validation(shards: Path, tmp_path: Path) -> None:
    cfg = build(tiny_tree(eval_every=2, picture_every=3))
    Trainer(cfg, shards=shards, out=tmp_path / "run", quiet=True, device="cpu").fit()
    found = pictures(tmp_path / "run" / "tb")
    assert set(found) == {("val/walk", 2), ("val/walk", 4), ("val/walk", 6), ("train/walk", 3), ("train/walk", 6)}
    first, second, last = (found["val/walk", step] for step in (2, 4, 6))
    assert first.shape[1] == 6 * (SIDE + GAP) + GAP  # photograph, CAM, pseudo-label, u, prediction, true mask
    photographs = slice(LEFT[0], LEFT[0] + SIDE)
    truth = slice(LEFT[5], LEFT[5] + SIDE)
    rows = slice(GAP + 2 * LINE, GAP + 2 * LINE + LOOKS * (SIDE + LINE + GAP))
    for columns in (photographs, truth):
        for later in (second, last):
            assert (first[rows, columns] == later[rows, columns]).all()
    cam = slice(LEFT[1], LEFT[1] + SIDE)
    assert (first[rows, cam] != second[rows, cam]).any() and (second[rows, cam] != last[rows, cam]).any()
    # They are spread over the split: the first row's photograph is that of its second eighth.
    reader = ShardReader(shards, cfg.data.val_split)
    with Image.open(io.BytesIO(reader[len(reader) // (2 * LOOKS)].image)) as image:
        wanted = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    shown = first[TOP : TOP + SIDE, photographs]
    assert np.abs(wanted.astype(int) - shown.astype(int)).mean() < 2


def losses(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("images_per_s", "step_s", "data_wait", "device_memory_mb", "time", "seconds")
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def test_pictures_change_nothing_of_the_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    cfg = build(tiny_tree(eval_every=2, picture_every=3))
    Trainer(cfg, shards=shards, out=tmp_path / "seen", quiet=True, device="cpu").fit()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as where it is not installed
    Trainer(cfg, shards=shards, out=tmp_path / "unseen", quiet=True, device="cpu").fit()
    assert not (tmp_path / "unseen" / "tb").exists()
    assert losses(tmp_path / "seen") == losses(tmp_path / "unseen")


@pytest.mark.parametrize(("kind", "low", "high"), [("distance", 0.0, 1.0), ("margin", 0.6, 1.4)])
def test_u_of_either_kind_uses_all_of_its_colours(kind: str, low: float, high: float) -> None:
    """A margin lies about 1: on the scale of a distance, all of it had the last colour."""
    u = np.array([low - 0.1, low, (low + high) / 2, high, high + 0.1, np.nan])
    np.testing.assert_allclose(u_share(u, kind), [0, 0, 0.5, 1, 1, np.nan], atol=1e-12)
    words = [text for placed in sheet._entries([], [], 900, kind) for _, _, text in placed]
    assert f"CAM: 0 … 1, u: {low:g} … {high:g} and more" in words


def test_a_run_of_margins_is_drawn_in_their_colours(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    kinds: list[tuple[str, str]] = []
    for name in ("draw", "u_share"):
        real = getattr(tensorboard, name)
        monkeypatch.setattr(tensorboard, name, lambda *x, name=name, real=real: kinds.append((name, x[-1])) or real(*x))
    tree = tiny_tree(steps=3, eval_every=3, picture_every=3, cls_warmup_iters=1, lr_warmup_iters=1)
    tree["method"]["uncertainty"]["kind"] = "margin"
    Trainer(build(tree), shards=shards, out=tmp_path / "run", quiet=True, device="cpu").fit()
    assert set(kinds) == {("draw", "margin"), ("u_share", "margin")}
