from __future__ import annotations

import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from tests.loaders import local
from tests.test_data_augment import Draws
from tests.tiny import tiny_tree
from ugrl import config as configs
from ugrl.data.augment import IMAGENET_STD, Augment
from ugrl.data.device import PixelBatch, RawBatch, triangles
from ugrl.data.make import BatchMaker, BufferPool
from ugrl.data.prepare import prepare
from ugrl.data.reader import ShardReader, wants_masks
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.errors import ConfigError
from ugrl.train.loop import Trainer
from ugrl.types import Row

MODES = ("none", "normalize", "augment")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    source = ShapesSource(ShapesSpec(train=24, val=1, size=48))
    return ShardReader(prepare(source, tmp_path_factory.mktemp("device") / "out", tune_val=0), "train")


def noise(id, width, height, mode="RGB"):
    rng = np.random.default_rng(width * height)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode).save(out, "PNG")
    return Row(id, out.getvalue(), width, height, (1,))


SIZES = [(61, 43), (1, 90), (90, 1), (200, 150), (33, 200), (3, 3), (150, 40), (64, 64)]
ROWS = [noise(f"r{k}", *size, mode="L" if k == 3 else "RGB") for k, size in enumerate(SIZES)]


def batch(on_device, *, crop=48, scales=(0.3, 2.5), epoch=0, rows=ROWS, mirror=True, dtype=None):
    maker = BatchMaker(Augment(crop, 1, *scales, mirror=mirror), seed=4, on_device=on_device)
    draft = maker.start(len(rows))
    for k in reversed(range(len(rows))):  # any order
        maker.fill(draft, k, rows[k], epoch)
    return maker.finish(draft).to("cpu", dtype)


def same(a, b, but=()):
    for name in ("images_B3HW", "tags_BF", "boxes_B4", "masks_BHW", "pairs_P2"):
        x, y = getattr(a, name), getattr(b, name)
        if name not in but:
            assert (x is None) == (y is None), name
            assert x is None or (x.dtype == y.dtype and torch.equal(x, y)), name
    assert a.ids == b.ids


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("epoch", range(4))
def test_normalising_later_gives_the_same_floats(epoch, dtype):
    host, later = (batch(mode, epoch=epoch, dtype=dtype) for mode in ("none", "normalize"))
    same(host, later)
    assert later.images_B3HW.is_contiguous() and host.images_B3HW.dtype == (dtype or torch.float32)


def test_what_is_carried_is_eight_bits(reader):
    for mode, kind in (("normalize", PixelBatch), ("augment", RawBatch)):
        with local(reader, 32, 6, seed=0, global_batch=4, threads=0, on_device=mode) as loader:
            carried = next(loader)
        assert isinstance(carried, kind)
        parts = [carried.pixels_BHW3] if mode == "normalize" else carried.images
        assert all(p.dtype == torch.uint8 for p in parts)


@pytest.mark.parametrize("scales", [(0.1, 0.1), (0.5, 0.5), (0.77, 0.77), (1.0, 1.0), (1.31, 1.31), (4.0, 4.0)])
@pytest.mark.parametrize("crop", [32, 70])
def test_cutting_later_differs_by_roundings(scales, crop):
    std_311 = torch.tensor(IMAGENET_STD)[:, None, None]
    for epoch in range(3):
        host, later = (batch(mode, crop=crop, scales=scales, epoch=epoch) for mode in ("none", "augment"))
        same(host, later, but=("images_B3HW",))
        levels = (host.images_B3HW - later.images_B3HW).abs() * std_311 * 255
        assert levels.max() <= 2.0 and levels.mean() < 0.5  # noise; two roundings of the host and its coefficients'
    if scales == (1.0, 1.0):
        torch.testing.assert_close(host.images_B3HW, later.images_B3HW, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_padding_is_plus_zero(mode):
    made = batch(mode, crop=96, scales=(0.2, 0.6))
    for image, (y0, y1, x0, x1) in zip(made.images_B3HW, made.boxes_B4.tolist(), strict=True):
        outside = torch.ones(96, 96, dtype=torch.bool)
        outside[y0:y1, x0:x1] = False
        assert outside.any()
        assert (image[:, outside] == 0).all() and not torch.signbit(image[:, outside]).any()
        assert (image[:, ~outside] != 0).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("crop", [40, 120])
def test_a_mirrored_crop_is_the_mirror_image(mode, crop, monkeypatch):
    rows = [ROWS[0], ROWS[3]]

    def made(u_mirror):
        monkeypatch.setattr("ugrl.data.make.sample_rng", lambda *_: Draws(0.5, u_mirror, 0.3, 0.2))
        return batch(mode, crop=crop, scales=(0.9, 0.9), rows=rows)

    plain, turned = made(0.9), made(0.1)
    torch.testing.assert_close(turned.images_B3HW, plain.images_B3HW.flip(3), rtol=0, atol=2e-6)
    assert (turned.boxes_B4[:, 2] == crop - plain.boxes_B4[:, 3]).all()


def pillow_weights(length, scaled, offset, size):
    """Pillow's coefficients of one axis, entry by entry, as its source defines them."""
    ratio = length / scaled
    reach = max(1.0, ratio)
    out = np.zeros((size, length))
    for i in range(size):
        centre = (offset + i + 0.5) * ratio
        first, last = max(0, int(centre - reach + 0.5)), min(length, int(centre + reach + 0.5))
        for j in range(first, last):
            out[i, j] = max(0.0, 1 - abs((j - centre + 0.5) / reach))
        out[i] /= out[i].sum()
    return out


@pytest.mark.parametrize(
    ("length", "scaled", "offset", "size"),
    [(50, 17, 0, 17), (50, 90, 31, 20), (7, 7, 0, 7), (1, 4, 0, 4), (300, 41, 9, 20)],
)
def test_the_weights_are_those_of_pillow(length, scaled, offset, size):
    first, crop, longest = 3, 40, length + 5  # a shorter image in a wider canvas
    ratio = length / scaled
    facts = torch.tensor([[(offset + 0.5) * ratio, ratio, f, length, first, first + size] for f in (0.0, 1.0)])
    facts = facts.double()
    facts[:, 0], facts[:, 1] = (offset + 0.5) * ratio, ratio  # not through float32
    plain, turned = triangles(facts, crop, longest).double().numpy()
    expected = np.zeros((crop, longest))
    expected[first : first + size, :length] = pillow_weights(length, scaled, offset, size)
    np.testing.assert_allclose(plain, expected, atol=2e-7)
    np.testing.assert_allclose(turned[first : first + size], expected[first : first + size][::-1], atol=2e-7)


@pytest.mark.parametrize("mode", MODES)
def test_threads_ranks_and_starts_change_nothing(reader, mode):
    def samples(*, start=0, world=1, **options):
        out = {}
        for rank in range(world):
            with local(
                reader,
                40,
                6,
                seed=2,
                global_batch=6,
                rank=rank,
                world=world,
                start_step=start,
                on_device=mode,
                **options,
            ) as loader:
                for step, carried in zip(range(start, 6), loader, strict=False):
                    made = carried.to("cpu")
                    for b, id in enumerate(made.ids):
                        parts = (made.images_B3HW, made.tags_BF, made.masks_BHW, made.boxes_B4)
                        out[step, id] = tuple(p[b].numpy().copy() for p in parts)
        return out

    def check(found, expected):
        assert found.keys() == expected.keys()
        for key, parts in found.items():
            for a, b in zip(parts, expected[key], strict=True):
                # A matrix product may add up in another order where the canvas of a batch has another size.
                np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 if mode == "augment" else 0)

    expected = samples(threads=0)
    assert len(expected) == 36
    check(samples(threads=2, prefetch=3), expected)
    check(samples(threads=1, world=2), expected)
    check(samples(threads=0, cache_mb=1), expected)
    check(samples(threads=2, start=3), {k: v for k, v in expected.items() if k[0] >= 3})


def test_masks_are_made_at_the_steps_that_want_them(reader):
    def steps(every, threads):
        with local(reader, 32, 6, seed=0, global_batch=4, threads=threads, masks_every=every, start_step=1) as loader:
            return [next(loader).masks_BHW is not None for _ in range(5)]

    for threads in (0, 2):
        assert steps(1, threads) == [True] * 5 and steps(0, threads) == [False] * 5
        assert steps(3, threads) == [False, True, False, False, True]
    assert [wants_masks(s, 2) for s in range(4)] == [False, True, False, True]


def test_memory_is_lent_again_only_when_nothing_refers_to_it():
    recycler = BufferPool()
    first = recycler.empty((4, 5), np.float32)
    place, view = first.data_ptr(), first[1:]
    second = recycler.empty((4, 5), np.float32)
    assert second.data_ptr() != place
    del first
    assert recycler.empty((4, 5), np.float32).data_ptr() != place  # a view is left
    array = view.numpy()
    del view
    assert recycler.empty((4, 5), np.float32).data_ptr() != place  # an array is left
    del array
    again = recycler.empty((4, 5), np.float32)
    del again
    held = [recycler.empty((4, 5), np.float32) for _ in range(3)]
    assert place in [t.data_ptr() for t in held]
    assert recycler.empty((2, 5), np.float32).shape == (2, 5)
    assert recycler.empty((4, 5), np.uint8).dtype == torch.uint8


def test_batches_that_are_kept_are_not_written_to(reader):
    with local(reader, 32, 6, seed=0, global_batch=4, threads=2, prefetch=2) as loader:
        kept = [next(loader) for _ in range(6)]
        before = [b.images_B3HW.clone() for b in kept]
        for _ in range(6):
            next(loader)
        assert all(torch.equal(b.images_B3HW, x) for b, x in zip(kept, before, strict=True))
        places = Counter(b.images_B3HW.data_ptr() for b in kept)
        assert max(places.values()) == 1


@pytest.mark.parametrize("threads", [0, 2])
def test_every_mode_trains(shards, tmp_path, threads):
    losses = {}
    for mode in MODES:
        tree = tiny_tree(steps=4)
        tree["data"] |= {"on_device": mode, "cache_mb": 2, "threads": threads}
        out = tmp_path / mode
        Trainer(configs.build(tree), shards=shards, out=out, quiet=True, device="cpu").fit()
        losses[mode] = (out / "metrics.jsonl").read_text().splitlines()
    total = {m: [json.loads(line)["total"] for line in lines if '"total"' in line] for m, lines in losses.items()}
    assert len(total["none"]) == 4 and total["none"] == total["normalize"]
    np.testing.assert_allclose(total["augment"], total["none"], rtol=0.02)


def test_other_values_are_refused():
    with pytest.raises(ConfigError, match="data.on_device.*expected one of auto, none, normalize, augment"):
        configs.build({"data": {"on_device": "gpu"}})
    with pytest.raises(ConfigError, match="data.cache_mb.*≥ 0"):
        configs.build({"data": {"cache_mb": -1}})
