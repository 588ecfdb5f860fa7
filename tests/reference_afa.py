"""AFA's training step written down once more, from what shared notes and its paper say it does: plain and slow.

The encoder is given; everything behind it is here, image by image where that is easier to read: heads, CAM, labels,
PAR, the walk along the affinity, losses and AdamW's groups and rates. Nothing of the project's method or heads is used.
Steps count from 0. Random numbers are given: a branch or channel is dropped where its number lies below its rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = 255
BLACK = [(0.0 - mean) / std for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
# Images and drop-path's numbers → four maps, and the raw attention logits (B, M, N, N) of the last two blocks.
Encode = Callable[[Tensor, Tensor | None], tuple[list[Tensor], Tensor]]


@dataclass
class Settings:
    classes: int
    width: int
    dropout: float
    scales: tuple[float, ...] = (1.0, 0.5, 1.5)
    high: float = 0.55
    low: float = 0.35
    par_rounds: int = 10
    par_reach: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    radius: int = 8
    quiet_until: int = 2000
    """Last step that trains the classification alone."""
    walk_after: int = 6000
    """Last step whose CAM does not walk."""
    lr: float = 6e-5
    decay: float = 0.01
    warmup: int = 1500
    steps: int = 20000


class Heads(nn.Module):
    """Everything that is learned behind the encoder."""

    def __init__(self, dims: list[int], maps: int, s: Settings) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(dims[3], s.classes, 1, bias=False)
        self.pair = nn.Conv2d(maps, 1, 1)
        self.project = nn.ModuleList(nn.Linear(d, s.width) for d in dims)
        self.fuse = nn.Conv2d(4 * s.width, s.width, 1, bias=False)
        self.norm = nn.BatchNorm2d(s.width)
        self.pixel = nn.Conv2d(s.width, s.classes + 1, 1)

    def segment(self, maps: list[Tensor], keep_BD: Tensor | None) -> Tensor:
        size, made = maps[0].shape[-2:], []
        for x, layer in zip(maps, self.project, strict=True):
            y = layer(x.movedim(1, -1)).movedim(-1, 1)
            made.append(F.interpolate(y, size=size, mode="bilinear", align_corners=False))
        z = self.norm(self.fuse(torch.cat(made[::-1], 1))).relu()
        return self.pixel(z if keep_BD is None else z * keep_BD[:, :, None, None])

    def pairs(self, attention: Tensor) -> Tensor:
        """Probability that two cells show the same class: (B, N, N)."""
        return self.pair(attention + attention.transpose(2, 3))[:, 0].sigmoid()


def grow(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, h, w) to (K, *size)."""
    return F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]


def neighbours(x: Tensor, reach: tuple[int, ...]) -> Tensor:
    """(K, h, w) → (8·reaches, K, h, w): the eight pixels around each one; beyond the edge the edge repeats."""
    h, w = x.shape[-2:]
    out = []
    for d in reach:
        for dy, dx in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
            rows = (torch.arange(h) + dy * d).clamp(0, h - 1)
            cols = (torch.arange(w) + dx * d).clamp(0, w - 1)
            out.append(x[:, rows][:, :, cols])
    return torch.stack(out)


def par(image: Tensor, masks: Tensor, s: Settings) -> Tensor:
    """Pixel-adaptive refinement of masks (K, h, w) along an image (3, h, w)."""
    around = neighbours(image, s.par_reach)
    spread = around.std(0) + 1e-8
    colour = -(((around - image).abs() / spread / 0.3) ** 2).mean(1)
    far = torch.tensor([d * r for d in s.par_reach for r in (2**0.5, 1, 2**0.5, 1, 1, 2**0.5, 1, 2**0.5)]).to(image)
    place = -((far / (far.std() + 1e-8) / 0.3) ** 2)
    weight = colour.softmax(0) + 0.01 * place.softmax(0)[:, None, None]
    for _ in range(s.par_rounds):
        masks = (neighbours(masks, s.par_reach) * weight[:, None]).sum(0)
    return masks


def within(radius: int, h: int, w: int) -> Tensor:
    """Which of the h·w cells are at most ``radius`` rows and columns apart; a cell is near itself."""
    y, x = torch.arange(h * w) // w, torch.arange(h * w) % w
    return ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)


def in_box(labels: Tensor, box: list[int]) -> Tensor:
    out = torch.full_like(labels, IGNORED)
    y0, y1, x0, x1 = box
    out[y0:y1, x0:x1] = labels[y0:y1, x0:x1]
    return out


def two_runs(high: Tensor, low: Tensor, names: Tensor) -> Tensor:
    """The class that wins against the high background; background where the low one wins as well; else ignored."""
    first, second = names[high.argmax(0)], names[low.argmax(0)]
    return torch.where((first == 0) & (second == 0), 0, torch.where(first == 0, IGNORED, first))


def shown(tags: Tensor) -> Tensor:
    """Background and the classes of an image."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), tags.nonzero()[:, 0] + 1])


def plain_labels(cams: Tensor, tags: Tensor, images: Tensor, boxes: list[list[int]], s: Settings) -> Tensor:
    """Labels of the CAM: PAR over the whole crop at half its size."""
    out, size = [], (images.shape[2], images.shape[3])
    half = (size[0] // 2, size[1] // 2)
    for cam, tag, image, box in zip(cams, tags, images, boxes, strict=True):
        names, runs = shown(tag), []
        for score in (s.high, s.low):
            stack = torch.cat([torch.full_like(cam[:1], score), cam])[names]
            runs.append(grow(par(grow(image, half), grow(stack, half).softmax(0), s), size))
        out.append(in_box(two_runs(*runs, names), box))
    return torch.stack(out)


def walked_labels(
    cams: Tensor, tags: Tensor, images: Tensor, boxes: list[list[int]], pairs: Tensor, s: Settings
) -> Tensor:
    """Labels of the CAM after its walk along the pairs of the largest scale; PAR in each image's box."""
    out, size = [], (images.shape[2], images.shape[3])
    side = (math.isqrt(pairs.shape[1]), math.isqrt(pairs.shape[1]))
    for cam, tag, image, box, pair in zip(cams, tags, images, boxes, pairs, strict=True):
        walk = torch.where(within(s.radius, *side), pair**2, 0.0)
        walk = walk / (walk.sum(0, keepdim=True) + 0.1)
        names, runs = shown(tag), []
        y0, y1, x0, x1 = box
        part = image[:, y0:y1, x0:x1]
        half = ((y1 - y0) // 2, (x1 - x0) // 2)
        for score in (s.high, s.low):
            coarse = grow(cam * tag[:, None, None], side)
            stack = torch.cat([torch.full_like(coarse[:1], score), coarse])[names].softmax(0)
            moved = grow((stack.flatten(1) @ walk).view_as(stack), size)[:, y0:y1, x0:x1]
            small = F.interpolate(moved[None], size=half, mode="bilinear", align_corners=True)[0]
            runs.append(grow(par(grow(part, half), small, s), (y1 - y0, x1 - x0)))
        label = torch.full(size, IGNORED)
        label[y0:y1, x0:x1] = two_runs(*runs, names)
        out.append(label)
    return torch.stack(out)


def pair_loss(pairs: Tensor, labels: Tensor, s: Settings) -> Tensor:
    """Same labels should agree, different ones should not: cells have the label of their first pixel."""
    step = labels.shape[1] // math.isqrt(pairs.shape[1])
    cells = labels[:, ::step, ::step]
    same, other, n_same, n_other = 0.0, 0.0, 1, 1
    for pair, cell in zip(pairs, cells, strict=True):
        flat = cell.flatten()
        known = (flat != IGNORED)[:, None] & (flat != IGNORED) & within(s.radius, *cell.shape)
        equal = flat[:, None] == flat
        same, other = same + (1 - pair)[known & equal].sum(), other + pair[known & ~equal].sum()
        n_same, n_other = n_same + int((known & equal).sum()), n_other + int((known & ~equal).sum())
    return 0.5 * same / n_same + 0.5 * other / n_other


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of a background and a foreground term."""
    logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
    ground = F.cross_entropy(logits, torch.where(labels == 0, 0, IGNORED), ignore_index=IGNORED)
    front = F.cross_entropy(logits, torch.where(labels == 0, IGNORED, labels), ignore_index=IGNORED)
    return (ground + front) / 2


def rate(step: int, s: Settings) -> float:
    """Share of the peak rate: from 1e-6 up over the warm-up, then down to 0 at the end of the run."""
    if step < s.warmup:
        return 1 - (1 - step / s.warmup) * (1 - 1e-6)
    return 1 - step / s.steps


class Afa:
    """Network and optimizer. ``encoder`` is the module whose parameters ``encode`` uses."""

    def __init__(self, encoder: nn.Module, encode: Encode, heads: Heads, s: Settings) -> None:
        self.encoder, self.encode, self.heads, self.s = encoder, encode, heads, s
        norms = [p for name, p in encoder.named_parameters() if "norm" in name]
        rest = [p for name, p in encoder.named_parameters() if "norm" not in name]
        groups = [
            {"params": rest, "lr": s.lr, "weight_decay": s.decay},
            {"params": norms, "lr": 0.0, "weight_decay": 0.0},
            {"params": [*heads.parameters()], "lr": 10 * s.lr, "weight_decay": s.decay},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.999))
        self.peaks = [g["lr"] for g in self.adamw.param_groups]
        self.labels = self.seg_labels = torch.empty(0)

    @torch.no_grad()
    def cams(self, images: Tensor, paths: dict[tuple[float, bool], Tensor | None]) -> tuple[Tensor, Tensor]:
        """(B, F, H, W), normalised over the crop; and the pairs of the largest scale."""
        total, found = torch.zeros(()), torch.empty(0)
        b, _, height, width = images.shape
        for scale in self.s.scales:
            x = F.interpolate(images, size=(int(scale * height), int(scale * width)), mode="bilinear")
            x = x if scale != 1 else images
            plain, mirrored = paths[scale, False], paths[scale, True]
            path = None if plain is None or mirrored is None else torch.cat([plain, mirrored])
            maps, attention = self.encode(torch.cat([x, x.flip(3)]), path)
            self.heads.segment(maps, None)  # its norm's statistics move
            raw = F.conv2d(maps[3], self.heads.classifier.weight)
            raw = F.interpolate(raw, size=(height, width), mode="bilinear", align_corners=False)
            total = total + torch.maximum(raw[:b], raw[b:].flip(3)).relu()
            if scale == max(self.s.scales):
                found = self.heads.pairs(attention)[:b]
        total = total - total.amin((2, 3), keepdim=True)
        return total / (total.amax((2, 3), keepdim=True) + 1e-5), found

    def losses(
        self,
        step: int,
        images: Tensor,
        tags: Tensor,
        boxes: list[list[int]],
        path: Tensor | None,
        drop_BD: Tensor | None,
        paths: dict[tuple[float, bool], Tensor | None],
    ) -> dict[str, Tensor]:
        """``cls, seg, aux, total`` of a step."""
        s = self.s
        # The CAM comes first here, as in the project; AFA makes it second, which only the norm's statistics tell.
        cams, far_pairs = self.cams(images, paths)
        maps, attention = self.encode(images, path)
        keep = None if drop_BD is None else (drop_BD >= s.dropout) / (1 - s.dropout)
        logits, pairs = self.heads.segment(maps, keep), self.heads.pairs(attention)
        scores = self.heads.classifier(maps[3].amax((2, 3), keepdim=True)).flatten(1)
        self.labels = self.seg_labels = plain_labels(cams, tags, images, boxes, s)
        if step > s.walk_after:
            self.seg_labels = walked_labels(cams, tags, images, boxes, far_pairs, s)
        out = {
            "cls": F.multilabel_soft_margin_loss(scores, tags),
            "seg": pixel_loss(logits, self.seg_labels),
            "aux": pair_loss(pairs, self.labels, s),
        }
        on = 0.0 if step <= s.quiet_until else 0.1
        return {**out, "total": out["cls"] + on * out["seg"] + on * out["aux"]}

    def move(self, step: int) -> None:
        """Apply the gradients."""
        for group, peak in zip(self.adamw.param_groups, self.peaks, strict=True):
            group["lr"] = peak * rate(step, self.s)
        self.adamw.step()
        self.adamw.zero_grad()
