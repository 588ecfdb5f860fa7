"""Validation of a split with masks against the public recipe's (:mod:`bench.baseline.validation`).

Generated images of VOC's sizes (500×375, 375×500, 333×500), 20 classes. Each side decodes the images itself and
computes mIoU of segmentation and CAM; that the two sides' values agree is part of every entry. ``voc-ms`` adds
multi-scale segmentation with mirror images. Images per second.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.baseline.validation import public_validation
from bench.measure import Context, Different, Entry, Skipped, compare
from ugrl.config import Config, build
from ugrl.data.images import encode_labels
from ugrl.data.prepare import prepare
from ugrl.data.reader import ShardReader
from ugrl.eval.evaluate import evaluate
from ugrl.seeding import generator
from ugrl.train.build import build_net
from ugrl.types import Row

CLASSES = 20
SIZES = ((500, 375), (375, 500), (333, 500))
NAMES = ("validation/voc", "validation/voc-ms", "validation/voc-cuda")
#: Pixels that are equally good for two classes may fall to either in float32.
AGREE = 2e-3


@dataclass(frozen=True, slots=True)
class Photos:
    """Images of several sizes with coloured discs of their classes; a :class:`ugrl.data.source.Source`."""

    count: int
    sizes: tuple[tuple[int, int], ...] = SIZES
    classes: int = CLASSES

    name = "photos"
    root: Path | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """``c1``…."""
        return tuple(f"c{f}" for f in range(1, self.classes + 1))

    @property
    def options(self) -> dict[str, Any]:
        """What decides the rows."""
        return {"count": self.count}

    @property
    def left_out(self) -> dict[str, dict[str, int]]:
        """Nothing."""
        return {}

    def splits(self) -> dict[str, list[str]]:
        """Validation images alone."""
        return {"val": [f"photo_{i:05d}" for i in range(self.count)]}

    def tags(self, split: str, id: str) -> tuple[int, ...] | None:
        """Known only with the image."""
        return None

    def row(self, split: str, id: str) -> Row:
        """Paint an image."""
        number = int(id.removeprefix("photo_"))
        rng = generator(0, "bench photos", number)
        width, height = self.sizes[number % len(self.sizes)]
        noise = rng.normal(128, 40, (8, 8, 3)).clip(0, 255).astype(np.uint8)
        pixels = np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC), float)
        pixels = pixels + rng.normal(0, 6, pixels.shape)
        labels = np.zeros((height, width), np.uint8)
        y, x = np.mgrid[0:height, 0:width]
        for label in rng.permutation(self.classes)[: 1 + number % 3] + 1:
            cy, cx, r = rng.uniform(0.25, 0.75) * height, rng.uniform(0.25, 0.75) * width, rng.uniform(0.15, 0.3)
            disc = (y - cy) ** 2 + (x - cx) ** 2 < (r * min(width, height)) ** 2
            colour = generator(1, "bench colours", int(label)).uniform(0, 255, 3)
            pixels[disc] = 0.3 * pixels[disc] + 0.7 * colour
            labels[disc] = label
        out = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        tags = tuple(int(v) for v in np.unique(labels) if v)
        return Row(id, out.getvalue(), width, height, tags, encode_labels(labels))


def configuration(backbone: str, several: bool, *, amp: bool = False) -> Config:
    """CAM at three scales with mirror images, as in training; segmentation at one scale or at three."""
    scales = {"seg_scales": [1.0, 0.5, 1.5], "mirror": True} if several else {}
    return build(
        {
            "data": {"threads": 0},
            "model": {"backbone": backbone},
            "method": {"cam": {"refine": "none"}},
            "eval": {"amp": "auto" if amp else "off", **scales},
        }
    )


def sides(
    cfg: Config, reader: ShardReader, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[], dict[str, float]], Callable[[], dict[str, float]]]:
    """Our validation and the public one of the same network, whose decoder is far from its cautious initialisation."""
    net = build_net(cfg, len(reader.manifest.class_names)).to(device, dtype)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = net.decoder.classify.weight
        weight.copy_(torch.randn(weight.shape, generator=g).to(weight))

    def ours() -> dict[str, float]:
        metrics = evaluate(net, reader, cfg, device=device, dtype=dtype).metrics
        return {name: metrics[name] for name in ("seg_miou", "cam_miou")}

    return ours, lambda: public_validation(net, reader, cfg, device=device, dtype=dtype)


def check(ours: Any, theirs: Any, tolerance: float) -> None:
    """Raises :class:`Different` where an mIoU differs by more than ``tolerance``."""
    for name, value in ours.items():
        if not abs(theirs[name] - value) <= tolerance:
            raise Different(f"validation: {name} {value:.6f} and {theirs[name]:.6f}")


def photo_reader(folder: Path, count: int) -> ShardReader:
    """A prepared split of generated images; made once."""
    out = folder / f"photos-{count}"
    if not out.exists():
        prepare(Photos(count), out, tune_val=0, progress=False)
    return ShardReader(out, "val")


def entries(ctx: Context) -> Iterator[Entry | Skipped]:
    """On the CPU a small encoder and few images; on CUDA MiT-B1 and the gate."""
    cuda = ctx.device.type == "cuda"
    for name in NAMES:
        if not ctx.wants(name):
            continue
        if name.endswith("-cuda") != cuda:
            yield Skipped(name, "a comparison on the CPU" if cuda else "needs a CUDA device")
            continue
        backbone = "mit_b1" if cuda else "mit_b0"
        several = name.endswith("-ms")
        images = 96 if cuda else (1 if several else 3) if ctx.quick else 9
        if ctx.left < 25.0:
            yield Skipped(name, "no time left with --quick")
            continue
        cfg = configuration(backbone, several, amp=cuda)
        ours, theirs = sides(cfg, photo_reader(ctx.tmp, images), ctx.device)
        kind = "CAM and segmentation at three scales with mirror" if several else "segmentation and multi-scale CAM"
        yield compare(
            name,
            ours,
            theirs,
            ctx=ctx,
            unit="images/s",
            per=images,
            gate=10.0 if cuda else None,
            check=lambda a, b: check(a, b, 0.02 if cuda else AGREE),
            note=f"{images} images of VOC's sizes, {backbone}, {kind}, {'bf16' if cuda else 'fp32'}; same mIoU",
        )
