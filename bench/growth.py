"""How our side grows: time and peak memory against one quantity at a time, with fitted exponents.

- ``step-crop``: a whole training step (forward, backward) against the crop's side. Pixels are quadratic in it.
- ``step-batch``, ``step-classes``: the same against images a batch and classes.
- ``labels-classes``: labels, confidence and pool from CAMs of two present classes, against classes.
- ``contrast``: the loss and its gradient against anchors: N² in time, N in memory.
- ``shards-open``, ``shards-row``: opening a folder, and one row at a random place of an open one, against its shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.contrast import problem, sides
from bench.measure import Context, Growth, growth
from ugrl.config import build
from ugrl.data.reader import ShardReader
from ugrl.data.shards import MANIFEST, ROW_GROUP, Manifest, ShardInfo, SplitInfo, sha256, write_rows
from ugrl.files import write_whole
from ugrl.method.pool import reliable_pool
from ugrl.method.pseudo import pseudo_labels
from ugrl.train.build import build_net, build_par, build_prototypes
from ugrl.train.step import Step
from ugrl.types import Batch, Row

NAMES = tuple(
    f"growth/{name}"
    for name in ("step-crop", "step-batch", "step-classes", "labels-classes", "contrast", "shards-open", "shards-row")
)
ROWS_A_SHARD, READS = 64, 256


def batch_of(images: int, crop: int, classes: int, device: torch.device) -> Batch:
    """Random images with two tags each."""
    g = torch.Generator().manual_seed(0)
    pictures = torch.randn(images, 3, crop, crop, generator=g).to(device)
    tags = torch.zeros(images, classes)
    for b in range(images):
        tags[b, torch.randperm(classes, generator=g)[:2]] = 1
    boxes = torch.tensor([[0, crop, 0, crop]] * images)
    return Batch(tuple(map(str, range(images))), pictures, tags.to(device), boxes, None, tags.nonzero())


def training_step(
    *, crop: int, images: int, classes: int, device: torch.device, backbone: str = "mit_b0"
) -> Callable[[], None]:
    """Forward and backward of a step past the warm-up; gradients are released."""
    cfg = build(
        {
            "data": {"crop": crop},
            "model": {"backbone": backbone},
            "train": {"global_batch": images, "steps": 100, "cls_warmup_iters": 1, "lr_warmup_iters": 1},
        }
    )
    net = build_net(cfg, classes, pretrained=False).to(device).train()
    prototypes = build_prototypes(cfg, classes, net.dim).to(device)
    step_fn = Step(cfg, net, prototypes, build_par(cfg))
    batch = batch_of(images, crop, classes, device)

    def run() -> None:
        step_fn(batch, 50).loss.backward()
        net.zero_grad(set_to_none=True)

    return run


def labelling(classes: int, device: torch.device, crop: int = 512, images: int = 4) -> Callable[[], Tensor]:
    """Labels, confidence and pool of a batch, from the CAMs of two classes an image."""
    g = torch.Generator().manual_seed(0)
    pairs_P2 = torch.tensor([[b, f] for b in range(images) for f in (0, classes - 1)])
    cam_PHW = torch.rand(len(pairs_P2), crop, crop, generator=g).to(device)
    boxes_B4 = torch.tensor([[0, crop, 0, crop]] * images)
    u_BC = torch.rand(images, classes + 1, generator=g).to(device)
    keys_B = torch.arange(images)

    def run() -> Tensor:
        labels_BHW, conf_BHW = pseudo_labels(cam_PHW, pairs_P2, boxes_B4, batch=images)
        small, conf = labels_BHW[:, ::4, ::4], conf_BHW[:, ::4, ::4]
        return reliable_pool(small, u_BC, conf, keep=0.35, keys_B=keys_B)

    return run


def folder(root: Path, shards: int) -> Path:
    """A prepared folder whose rows hold 4 kB that are no image: nothing here decodes."""
    root.mkdir(parents=True)
    payload = np.random.default_rng(0).bytes(4_000)
    made = []
    for s in range(shards):
        path = root / f"train-{s:05d}.parquet"
        ids = (f"{s:05d}-{r:03d}" for r in range(ROWS_A_SHARD))
        write_rows(path, (Row(i, payload, 100, 100, (1,), None) for i in ids))
        made.append(ShardInfo(path.name, ROWS_A_SHARD, path.stat().st_size, sha256(path)))
    splits = {"train": SplitInfo(rows=shards * ROWS_A_SHARD, with_masks=0, shards=tuple(made))}
    manifest = Manifest(root=root, source="folder", options={}, class_names=("thing",), splits=splits)
    write_whole(root / MANIFEST, manifest.to_json())
    return root


def entries(ctx: Context) -> Iterator[Growth]:
    """All series."""
    quick, device = ctx.quick, ctx.device
    crops = (128, 192, 256) if quick else (128, 192, 256, 384, 512)
    backbone = "mit_b0" if quick else "mit_b1"

    def series(
        name: str, x: str, sizes: tuple[int, ...], make: Callable[[Any], Callable[[], object]], **how: Any
    ) -> Any:
        if ctx.wants(f"growth/{name}"):
            yield growth(f"growth/{name}", x, sizes, make, ctx=ctx, **how)

    yield from series(
        "step-crop",
        "crop, px",
        crops,
        lambda n: training_step(crop=n, images=1, classes=20, device=device, backbone=backbone),
        budget=30 if quick else 240,
        repeats=2 if quick else 3,
        note=f"{backbone}, 1 image, 20 classes",
    )
    yield from series(
        "step-batch",
        "images",
        (1, 2, 4) if quick else (1, 2, 4, 8),
        lambda n: training_step(crop=128, images=n, classes=20, device=device, backbone=backbone),
        budget=25 if quick else 120,
        repeats=2 if quick else 3,
        note=f"{backbone}, crop 128, 20 classes",
    )
    yield from series(
        "step-classes",
        "classes",
        (2, 20, 80) if quick else (2, 5, 10, 20, 40, 80),
        lambda n: training_step(crop=128, images=2, classes=n, device=device, backbone=backbone),
        budget=22 if quick else 120,
        repeats=2 if quick else 3,
        note=f"{backbone}, crop 128, 2 images of 2 classes",
    )
    yield from series(
        "labels-classes",
        "classes",
        (2, 20, 80) if quick else (2, 5, 10, 20, 40, 80),
        lambda n: labelling(n, device),
        budget=8 if quick else 60,
        note="4 images of 512 px, 2 classes each",
    )
    yield from series(
        "contrast",
        "anchors",
        (1024, 2048, 4096, 8192) if quick else (1024, 2048, 4096, 8192, 16384),
        lambda n: sides(*problem(n, device, torch.float32))[0],
        budget=30 if quick else 120,
        note="d 512, 3 classes",
    )
    folders: dict[int, Path] = {}

    def shards(count: int) -> Path:
        if count not in folders:
            folders[count] = folder(ctx.tmp / f"shards-{count}", count)
        return folders[count]

    def opening(count: int) -> Callable[[], object]:
        root = shards(count)
        return lambda: ShardReader(root, "train")

    def reading(count: int) -> Callable[[], object]:
        reader = ShardReader(shards(count), "train")
        at = np.random.default_rng(1).integers(0, len(reader), READS)
        # A reader keeps its last row group; no read may profit from the one before, however few groups there are.
        for k in range(1, READS):
            while at[k] // ROW_GROUP == at[k - 1] // ROW_GROUP:
                at[k] = (at[k] + ROW_GROUP) % len(reader)
        return lambda: len(reader.rows(at.tolist()))

    words = f"{ROWS_A_SHARD} rows of 4 kB a shard"
    yield from series("shards-open", "shards", (1, 4, 16, 64, 256), opening, memory=False, note=words)
    yield from series(
        "shards-row",
        "shards",
        (16, 32, 64, 128, 256),  # with fewer, the files that a reader keeps open are all there are
        reading,
        memory=False,
        per=lambda _: READS,
        note=f"{words}; seconds a row, footers read before",
    )
