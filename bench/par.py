"""PAR: shifted views of one padded image against one-hot convolutions, as AFA publishes it.

Crops of 512, refined at half size, ten iterations, one class an image. ``512`` is one run of one mask and its
background; ``512-pair`` is what training needs: labels by both thresholds, exactly the same ones on both sides in
float64. In float32 a pixel of equal scores may fall to either side; the entry's note says how many did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.baseline.par import naive_labels, naive_par
from bench.measure import Context, Different, Entry, compare, same
from ugrl.method.refine import PAR, refine_labels

SIZE, HIGH, LOW = 512, 0.55, 0.35
#: Share of pixels that rounding in float32 may give another label.
TIES = 1e-5
NAMES = ("par/512", "par/512-pair")


def crops(images: int, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images of flat patches with some noise, and one smooth CAM for each."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(images, 3, 24, 24, generator=g, dtype=torch.float64)
    noise = torch.rand(images, 3, size, size, generator=g, dtype=torch.float64)
    cam = F.interpolate(torch.rand(images, 1, 16, 16, generator=g, dtype=torch.float64), (size, size), mode="bilinear")
    made = F.interpolate(coarse, (size, size), mode="nearest") + 0.05 * noise
    return made.to(device, dtype), cam[:, 0].to(device, dtype)


def one_run(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """One threshold's masks through PAR, at half size."""
    par = PAR()
    image, cam = crops(1, size // 2, device, dtype)
    masks = torch.stack([torch.full_like(cam, HIGH), cam], 1).softmax(1)

    def ours() -> Tensor:
        # A background that is one minus the class needs no run of its own.
        classes = par(image, masks[:, 1:])
        return torch.cat([par.gain - classes, classes], 1)

    return ours, lambda: naive_par(par, image, masks)


def pair(
    images: int, size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Labels by both thresholds."""
    par = PAR()
    image, cam = crops(images, size, device, dtype)
    pairs_P2 = torch.tensor([[b, 0] for b in range(images)])
    boxes_B4 = torch.tensor([[0, size, 0, size]] * images)
    classes = torch.zeros(1, dtype=torch.int64, device=device)

    def ours() -> Tensor:
        return refine_labels(cam, pairs_P2, boxes_B4, image, batch=images, par=par, high=HIGH, low=LOW)[0]

    def plain() -> Tensor:
        return torch.stack([naive_labels(par, image[b], cam[b : b + 1], classes, HIGH, LOW) for b in range(images)])

    return ours, plain


def same_labels(name: str, ours: Tensor, plain: Tensor, share: float = 0.0) -> int:
    """Number of pixels whose labels differ.

    Raises:
        Different: They are more than ``share`` of all.
    """
    wrong = int((ours != plain).sum())
    if wrong > share * plain.numel():
        raise Different(f"{name}: {wrong} of {plain.numel()} labels differ")
    return wrong


def entries(ctx: Context) -> Iterator[Entry]:
    """One run, and labels by both thresholds."""
    for name in NAMES:
        if not ctx.wants(name):
            continue
        if name == "par/512":
            exact = one_run(128, ctx.device, torch.float64)
            same(f"{name}, float64", exact[0](), exact[1](), 1e-6)
            ours, plain = one_run(SIZE, ctx.device, torch.float32)
            yield compare(
                name,
                ours,
                plain,
                ctx=ctx,
                check=lambda a, b: same("par/512", a, b, 1e-4),
                note="one run of 10 iterations on a crop of 512 at half size, one class and background, float32",
            )
            continue
        exact = pair(1, SIZE, ctx.device, torch.float64)
        same_labels(f"{name}, float64", exact[0](), exact[1]())
        images = 2 if ctx.quick else 4
        ours, plain = pair(images, SIZE, ctx.device, torch.float32)
        off: list[int] = []
        made = compare(
            name,
            ours,
            plain,
            ctx=ctx,
            gate=5.0,
            per=images,
            check=lambda a, b, name=name, off=off: off.append(same_labels(name, a, b, TIES)),
            note=f"labels of {images} crops of 512 by both thresholds, one class each, float32, seconds an image",
        )
        yield replace(made, note=f"{made.note}; {off[0]} of {images * SIZE * SIZE} labels differ, in float64 none")
