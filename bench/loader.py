"""Crops of 512 per second and core, from JPEG bytes to a batch: against the public recipe and the decoder alone.

64 generated 500×375 photographs (quality 90), scale 0.5–2.0, mirrored or not. ``crops``, ``pixels`` and ``device`` make
what an item of the public loader holds, two crops of one decoded image: as floats, as 8-bit pixels that the device
normalises, as decoded images that the device cuts. ``single`` and ``coco`` (real photographs, where they are there)
make one crop an image on both sides, as our loader does in an epoch. Rates count processor time, of child processes
too where there are any.
"""

from __future__ import annotations

import io
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from bench.baseline.loader import PublicDataset, item, stack
from bench.measure import Context, Different, Entry, Skipped, compare, entry
from ugrl.config import DataConfig
from ugrl.data.augment import IMAGENET_STD, Augment
from ugrl.data.cache import Decoded, PixelCache
from ugrl.data.images import decode_pixels, decode_rgb
from ugrl.data.loader import LocalLoader
from ugrl.data.make import BatchMaker, Loaded, OnDevice
from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest, ShardInfo, SplitInfo, sha256, write_rows
from ugrl.data.spec import LoaderSpec
from ugrl.files import write_whole
from ugrl.types import Row

CROP, BATCH, SEED, VIEWS = 512, 8, 0, 2
WIDTH, HEIGHT, QUALITY, COUNT = 500, 375, 90, 64
COCO = Path(__file__).parents[1] / "../shared/data/coco100"
NAMES = (
    "loader/crops",
    "loader/pixels",
    "loader/device",
    "loader/single",
    "loader/coco",
    "loader/decoder",
    "loader/share",
    "loader/share-pixels",
    "loader/share-device",
    "loader/torch-0",
    "loader/torch-2",
    "loader/cache",
)
GATE = 6.0


def photo(rng: np.random.Generator, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Something that compresses like a photograph: detail at all sizes, edges, and sensor noise."""
    out_HW3 = np.full((height, width, 3), 120, np.float32)
    for cells in (4, 8, 16, 32, 64, 128, 256):
        detail = rng.normal(0, 1, (max(2, height * cells // width), cells, 3)).astype(np.float32)
        detail = 1.2 * detail.mean(2, keepdims=True) + 0.4 * detail  # brightness varies more than colour
        planes = [Image.fromarray(detail[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        out_HW3 += 90 / cells**0.5 * np.stack([np.asarray(p) for p in planes], -1)
    y_H1, x_W = np.arange(height)[:, None], np.arange(width)
    for _ in range(12):
        cy, cx, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(10, 100)
        inside_HW = (y_H1 - cy) ** 2 + (x_W - cx) ** 2 * rng.uniform(0.4, 2) < radius**2
        out_HW3[inside_HW] += rng.normal(0, 50, 3).astype(np.float32)
    out_HW3 += rng.normal(0, 5, out_HW3.shape)
    return np.clip(out_HW3, 0, 255).astype(np.uint8)


def photos(count: int) -> list[Row]:
    """Generated photographs as rows."""
    rng, rows = np.random.default_rng(SEED), []
    for k in range(count):
        out = io.BytesIO()
        Image.fromarray(photo(rng)).save(out, "JPEG", quality=QUALITY)
        rows.append(Row(f"photo{k:03d}", out.getvalue(), WIDTH, HEIGHT, (1,), None))
    return rows


def real_photos(folder: Path) -> list[Row]:
    """The JPEGs below a folder as rows."""
    rows = []
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image:
            rows.append(Row(path.stem, path.read_bytes(), *image.size, (1,), None))
    return rows


def write_shards(rows: list[Row], folder: Path) -> Path:
    """A prepared folder with one split, ``train``."""
    folder.mkdir()
    path = folder / "train-00000.parquet"
    write_rows(path, iter(rows))
    shard = ShardInfo(path.name, len(rows), path.stat().st_size, sha256(path))
    split = SplitInfo(len(rows), 0, (shard,))
    write_whole(folder / "manifest.json", Manifest(folder, "folder", {}, ("thing",), {"train": split}).to_json())
    return folder


def kilobytes(rows: list[Row]) -> str:
    """Their mean size."""
    return f"{statistics.mean(len(r.image) for r in rows) / 1000:.0f}"


@dataclass(slots=True)
class Sides:
    """Ways from the same rows to the same crops, in one thread; a call makes ``views`` crops of every row."""

    rows: list[Row]
    augment: Augment
    views: int = VIEWS
    makers: dict[OnDevice, BatchMaker] = field(default_factory=dict)

    @property
    def crops(self) -> float:
        """How many a call makes."""
        return float(self.views * len(self.rows))

    def ours(self, on_device: OnDevice) -> list[Loaded]:
        """Batches with the first view of some rows, then the second of the same."""
        maker = self.makers.setdefault(on_device, BatchMaker(self.augment, seed=SEED, on_device=on_device))
        out: list[Loaded] = []
        for start in range(0, len(self.rows), BATCH):
            rows = self.rows[start : start + BATCH]
            drafts = [maker.start(len(rows)) for _ in range(self.views)]
            for k, row in enumerate(rows):
                decoded = Decoded(row, decode_pixels(row.image, row.id))
                for epoch, draft in enumerate(drafts):
                    maker.fill(draft, k, row, epoch, decoded)
            batches = [maker.finish(d) for d in drafts]
            out = [*out, *batches] if len(self.rows) <= BATCH else batches  # few are kept: memory is used again
        return out

    def public(self) -> list[Tensor]:
        """The same by the public recipe."""
        out: list[Tensor] = []
        for start in range(0, len(self.rows), BATCH):
            rows = self.rows[start : start + BATCH]
            batches = stack([item(r.image, r.id, self.augment, SEED, self.views) for r in rows])
            out = [*out, *batches] if len(self.rows) <= BATCH else batches
        return out

    def decode(self) -> None:
        """The decoder alone."""
        for row in self.rows:
            decode_pixels(row.image, row.id)

    def far(self, on_device: OnDevice) -> str:
        """How far our images are from the public recipe's, in words.

        Raises:
            Different: A value differs by more than two levels of 255, or half a level on average; or our padding
                is not 0.
        """
        std_311 = torch.tensor(IMAGENET_STD)[:, None, None]
        worst, means = 0.0, []
        for start in range(0, min(len(self.rows), 4 * BATCH), BATCH):
            few = Sides(self.rows[start : start + BATCH], self.augment, self.views)
            for batch, public in zip(few.ours(on_device), few.public(), strict=True):
                made = batch.to("cpu")
                for image, other, box in zip(made.images_B3HW, public, made.boxes_B4.tolist(), strict=True):
                    y0, y1, x0, x1 = box
                    levels = (image.double() - other.double()).abs()[:, y0:y1, x0:x1] * std_311 * 255
                    worst = max(worst, float(levels.max()))
                    means.append(float(levels.mean()))
                    image[:, y0:y1, x0:x1] = 0
                    if image.any():
                        raise Different(f"crops ({on_device}): padding is not 0")
        if worst > 2.01 or statistics.mean(means) > 0.5:
            raise Different(
                f"crops ({on_device}) differ by {worst:.2f} levels, {statistics.mean(means):.2f} on average"
            )
        return f"crops differ by at most {worst:.2f} levels of 255, {statistics.mean(means):.2f} on average"


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor time of this process, and of children that end meanwhile."""

    def now() -> float:
        who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, who))

    start = now()
    work()
    return now() - start


def local_epochs(folder: Path, augment: Augment, threads: int) -> int:
    """Two epochs by our loader; returns how many crops that was."""
    reader, crops = ShardReader(folder, "train"), 0
    steps = 2 * (len(reader) // BATCH)
    data = DataConfig(crop=augment.crop, threads=threads, prefetch=2)
    spec = LoaderSpec(folder, "train", augment.num_classes, seed=SEED, global_batch=BATCH, data=data)
    with LocalLoader(spec, reader) as loader:
        for _ in range(steps):
            crops += len(next(loader).to("cpu").ids)
    return crops


def torch_epoch(folder: Path, augment: Augment, workers: int) -> int:
    """One epoch, of two views an item, by torch's loader; returns how many crops that was."""
    dataset, crops = PublicDataset(lambda: ShardReader(folder, "train"), augment, SEED, VIEWS), 0
    for views in DataLoader(
        dataset, batch_size=BATCH // VIEWS, shuffle=True, num_workers=workers, collate_fn=stack, drop_last=True
    ):
        crops += sum(len(v) for v in views)
    return crops


def paired(
    name: str,
    rounds: int,
    ours: Callable[[], float],
    baseline: Callable[[], float],
    note: str,
    gate: float | None = None,
) -> Entry:
    """An entry of rates that each side measures itself, in interleaved rounds after a warm-up."""
    ours(), baseline()
    a, b = [], []
    for k in range(rounds):
        for side, out in ((ours, a), (baseline, b)) if k % 2 == 0 else ((baseline, b), (ours, a)):
            out.append(side())
    return entry(name, a, b, unit="crops/s", gate=gate, note=note)


def cache_rates(rows: list[Row], augment: Augment) -> tuple[float, float]:
    """Crops per second of a first and of a second epoch with a cache that has room for all."""
    room = sum(3 * r.width * r.height for r in rows) // 1_000_000 + 1
    cache = PixelCache(room)
    maker, rates = BatchMaker(augment, seed=SEED, cache=cache), []
    for epoch in range(2):
        start = time.process_time()
        for first in range(0, len(rows), BATCH):
            part = rows[first : first + BATCH]
            draft = maker.start(len(part))
            for k, row in enumerate(part):
                maker.fill(draft, k, row, epoch, maker.kept(row.id))
            maker.finish(draft)
        rates.append(len(rows) / (time.process_time() - start))
    if (cache.hits, cache.misses) != (len(rows), len(rows)):
        raise Different(f"the cache had {cache.hits} hits and {cache.misses} misses; expected {len(rows)} of both")
    return rates[0], rates[1]


def entries(ctx: Context) -> Iterator[Entry | Skipped]:
    """See the module."""
    # Loading is the host's work, whatever the device.
    ctx = replace(ctx, device=torch.device("cpu"), threads=1)
    augment = Augment(CROP, 1)
    rows = photos(32 if ctx.quick else COUNT)
    pairs, single = Sides(rows, augment), Sides(rows, augment, views=1)
    data = f"{len(rows)} photographs of {WIDTH}×{HEIGHT}, {kilobytes(rows)} kB"

    def against_public(name: str, sides: Sides, on_device: OnDevice, what: str, gate: float | None) -> Entry:
        ctx.log(f"{name}: the same crops?")
        note = f"{what}; the public recipe; {sides.far(on_device)}"
        return compare(
            name,
            lambda: sides.ours(on_device),
            sides.public,
            ctx=ctx,
            gate=gate,
            memory=False,
            note=note,
            per=sides.crops,
            unit="crops/s",
        )

    parts: dict[OnDevice, str] = {
        "none": "float batches",
        "normalize": "host part of data.on_device: normalize, 8-bit batches",
        "augment": "host part of data.on_device: augment, decoded images",
    }
    ways: tuple[tuple[str, Sides, OnDevice, float | None], ...] = (
        ("loader/crops", pairs, "none", GATE),
        ("loader/pixels", pairs, "normalize", GATE),
        ("loader/device", pairs, "augment", None),
        ("loader/single", single, "none", None),
    )
    for name, sides, on_device, gate in ways:
        if ctx.wants(name):
            count = "two crops an image" if sides.views == VIEWS else "one crop an image"
            yield against_public(name, sides, on_device, f"{parts[on_device]}, {count}, one thread, {data}", gate)
    if ctx.wants("loader/coco"):
        real = real_photos(COCO)[: 32 if ctx.quick else None] if COCO.is_dir() else []
        if real:
            what = f"float batches, one crop an image, one thread, {len(real)} images of COCO, {kilobytes(real)} kB"
            yield against_public("loader/coco", Sides(real, augment, views=1), "none", what, None)
        else:
            yield Skipped("loader/coco", "no coco100 folder beside the project")
    if ctx.wants("loader/decoder"):
        yield compare(
            "loader/decoder",
            single.decode,
            lambda: [np.asarray(decode_rgb(r.image, r.id)) for r in rows] and None,
            ctx=ctx,
            memory=False,
            note=f"the decoder in use; Pillow; {data}",
            per=single.crops,
            unit="images/s",
        )
    shares: tuple[tuple[str, OnDevice], ...] = (
        ("loader/share", "none"),
        ("loader/share-pixels", "normalize"),
        ("loader/share-device", "augment"),
    )
    for name, on_device in shares:
        if ctx.wants(name):
            yield compare(
                name,
                lambda k=on_device: single.ours(k),
                single.decode,
                ctx=ctx,
                memory=False,
                note=f"{parts[on_device]}, one crop an image; the decoder alone, the limit of any of them; {data}",
                per=single.crops,
                unit="crops/s",
            )

    folder = write_shards(rows, ctx.tmp / "loader")
    for name, workers in (("loader/torch-0", 0), ("loader/torch-2", 2)):
        if ctx.wants(name):
            ctx.log(name)

            def rate(epochs: Callable[[Path, Augment, int], int], workers: int = workers) -> float:
                made: list[int] = []
                return 1 / (cpu_seconds(lambda: made.append(epochs(folder, augment, workers))) / made[0])

            note = f"our loader, {workers} threads; torch's, {workers} processes, with the public recipe; same shards"
            note += ", processor time with the processes' own" if workers else ""
            rounds = 2 if ctx.quick else 5
            yield paired(name, rounds, lambda r=rate: r(local_epochs), lambda r=rate: r(torch_epoch), note)
    if ctx.wants("loader/cache"):
        ctx.log("loader/cache")
        pairs = [cache_rates(rows, augment) for _ in range(3 if ctx.quick else 7)][1:]
        note = "second epoch with data.cache_mb large enough; first epoch, which fills it; float batches"
        yield entry("loader/cache", [p[1] for p in pairs], [p[0] for p in pairs], unit="crops/s", note=note)
