"""What each point of the published recipe changes in a training step, on padded crops of real images.

    python -m bench.recipe --voc VOCdevkit [--backbone mit_b1] [--weights NAME] [--crop 512] [--crops 12] [--batch 4]

One step after the warm-up of AFA's losses (setting Base), once with the project's own values and once with each
point as AFA's public code has it, one at a time and all together. The weights, the images, the draws of the crops
and the dropped branches of the training pass are the same; random weights have random biases, too. Crops whose
padding is less than a twentieth of their area, or more than three quarters, are passed over. Printed for each
point, over the batches: the share of the pixels within the images whose label is another one, and the cosine of the
gradients, of all parameters and of the encoder's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from ugrl.config import Config, load
from ugrl.data.augment import FACTOR, OFFSET, Augment
from ugrl.data.images import decode_pixels
from ugrl.data.make import BatchMaker
from ugrl.data.order import sample_rng
from ugrl.data.source import open_source
from ugrl.grid import inside_pixels
from ugrl.method.targets import TargetMaker, Targets
from ugrl.model.network import UGRLNet
from ugrl.train.accumulate import run_step
from ugrl.train.build import build_net, build_par, build_prototypes
from ugrl.train.step import Step
from ugrl.types import Batch, Row

#: What voc-afa sets and the project does not, as the project has it.
OWN = {
    "data.pad": "mean",
    "data.rounding": "nearest",
    "model.pool_extent": "box",
    "model.init": "own",
    "method.cam.extent": "box",
    "method.cam.mode": "eval",
    "method.cam.propagate": "none",
    "method.loss.balance": "none",
    "method.loss.affinity_labels": "centre",
    "train.head_decay": "weights",
}
#: The step, counted from 0: after the warm-up, and after the first one whose CAM may walk.
STEP = 7000


@dataclass(frozen=True)
class Point:
    """A row of the table: what is as AFA has it, and whether PAR sees 8-bit pixels or bf16 computes."""

    name: str
    values: dict[str, str]
    eight_bits: bool = False
    amp: bool = False


def _as_published(*keys: str) -> dict[str, str]:
    afa = {
        "data.pad": "black",
        "data.rounding": "floor",
        "model.pool_extent": "crop",
        "method.cam.extent": "crop",
        "method.cam.mode": "train",
        "method.loss.balance": "fg_bg",
        "method.loss.affinity_labels": "corner",
    }
    return {key: afa[key] for key in keys or afa}


def _rest() -> Iterator[tuple[str, dict[str, str]]]:
    return ((key, _as_published(key)) for key in _as_published() if key not in PADDING)


PADDING = ("data.pad", "model.pool_extent", "method.cam.extent")
POINTS = (
    *(Point(key, _as_published(key)) for key in PADDING),
    Point("these three", _as_published(*PADDING)),
    Point("all but propagate", _as_published(), eight_bits=True),
    *(Point(key, values) for key, values in _rest()),
    Point("propagate afa", {"method.cam.propagate": "afa"}),
    Point("all", _as_published() | {"method.cam.propagate": "afa"}, eight_bits=True),
    Point("propagate affinity", {"method.cam.propagate": "affinity"}),
    Point("8-bit pixels in PAR", {}, eight_bits=True),
    Point("bf16 (the project's, on CUDA)", {}, amp=True),
)


class _Recording(TargetMaker):
    """Keeps the targets, and gives PAR what AFA gives it: pixels cut down to whole levels of 255."""

    eight_bits = False
    last: Targets

    def __call__(self, *args: object) -> Targets:
        self.last = super().__call__(*args)  # type: ignore[arg-type]
        return self.last

    def labels(self, batch: Batch, cam_PHW: Tensor) -> tuple[Tensor, Tensor]:
        if self.eight_bits:
            factor_311, offset_311 = (torch.from_numpy(v)[:, None, None] for v in (FACTOR, OFFSET))
            levels_B3HW = ((batch.images_B3HW + offset_311) / factor_311).clamp(0, 255).floor()
            batch = replace(batch, images_B3HW=levels_B3HW * factor_311 - offset_311)
        return super().labels(batch, cam_PHW)


@dataclass(frozen=True)
class Seen:
    """Labels, the pixels within the images, and the gradients of a step."""

    labels_BHW: Tensor
    inside_BHW: Tensor
    encoder_n: Tensor
    all_n: Tensor


def padded_rows(root: str, cfg: Config, count: int) -> tuple[list[Row], int]:
    """Rows of the training list whose crops are padded, and F."""
    source = open_source("voc", root)
    augment, crop = Augment.of(cfg.data, len(source.class_names)), cfg.data.crop
    rows: list[Row] = []
    for id in source.splits()["train"]:
        row = source.row("train", id)
        image_HW3 = decode_pixels(row.image, row.id)
        y0, y1, x0, x1 = augment.cut(*image_HW3.shape[:2], sample_rng(cfg.seed, 0, row.id)).box_4
        if 0.25 <= (y1 - y0) * (x1 - x0) / crop**2 <= 0.95:
            rows.append(row)
        if len(rows) == count:
            break
    return rows, len(source.class_names)


def batches(rows: Sequence[Row], cfg: Config, classes: int, size: int) -> Iterator[Batch]:
    """The rows' crops, so many at a time."""
    maker = BatchMaker(Augment.of(cfg.data, classes), seed=cfg.seed)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        draft = maker.start(len(part), with_masks=False)
        for k, row in enumerate(part):
            maker.fill(draft, k, row, 0)
        yield maker.finish(draft).to("cpu")


def stepped(cfg: Config, net: UGRLNet, batch: Batch, point: Point) -> Seen:
    """Labels and gradients of one step with these weights."""
    prototypes, par = build_prototypes(cfg, net.classifier.out_channels, net.dim), build_par(cfg)
    step_fn = Step(cfg, net, prototypes, par)
    step_fn.target_maker = maker = _Recording(cfg, prototypes, par, stride=net.stride)
    maker.eight_bits = point.eight_bits
    net.zero_grad(set_to_none=True)
    run_step(step_fn, batch, STEP, amp=point.amp)
    found = {n: p.grad.flatten().double() for n, p in net.named_parameters() if p.grad is not None}
    assert maker.last.labels_BHW is not None
    size = (int(batch.images_B3HW.shape[-2]), int(batch.images_B3HW.shape[-1]))
    return Seen(
        maker.last.labels_BHW,
        inside_pixels(batch.boxes_B4, size, "cpu"),
        torch.cat([g for n, g in found.items() if n.startswith("encoder.")]),
        torch.cat(list(found.values())),
    )


def table(args: argparse.Namespace) -> Iterator[str]:
    """Lines of Markdown, each as soon as it is measured."""
    shared = {"model.backbone": args.backbone, "model.weights": args.weights, "data.crop": args.crop} | {
        "method.uncertainty.d_cls": 16,
        "method.contrast.d_seg": 16,
    }
    own = load("voc-afa", {**shared, **OWN})
    rows, classes = padded_rows(args.voc, own, args.crops)
    if not rows:
        raise SystemExit(
            f"bench.recipe: no image of {args.voc} gives a padded crop of {args.crop} px; try a larger one"
        )
    net = build_net(own, classes).train()
    if args.weights is None:
        _draw_biases(net)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    yield f"{len(rows)} crops of {args.crop} px in batches of {args.batch}; {args.backbone}, weights {args.weights}.\n"
    yield "| as AFA has it | labels changed, % | cosine of all gradients | of the encoder's |"
    yield "| --- | ---: | ---: | ---: |"

    def run(point: Point) -> list[Seen]:
        cfg = load("voc-afa", {**shared, **OWN, **point.values})
        out = []
        for batch in batches(rows, cfg, classes, args.batch):
            net.load_state_dict(state)
            out.append(stepped(cfg, net, batch, point))
        return out

    plain = run(Point("own", {}))
    for point in POINTS:
        pairs = list(zip(plain, run(point), strict=True))
        changed = [100 * float((a.labels_BHW != b.labels_BHW)[a.inside_BHW].double().mean()) for a, b in pairs]
        every = [float(torch.cosine_similarity(a.all_n, b.all_n, 0)) for a, b in pairs]
        encoder = [float(torch.cosine_similarity(a.encoder_n, b.encoder_n, 0)) for a, b in pairs]
        yield f"| {point.name} | {_cell(changed, '.1f')} | {_cell(every, '.3f')} | {_cell(encoder, '.3f')} |"


def _draw_biases(net: UGRLNet) -> None:
    """Random biases of the encoder. A fresh one has none, so that a patch of the mean colour is a vector of zeros.

    A layer norm of zeros has a gradient of 1/√eps, and nothing else would be seen in the gradients of such crops.
    """
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.encoder.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=g))


def _cell(values: Sequence[float], digits: str) -> str:
    return f"{fmean(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voc", required=True, metavar="DIR", help="a VOCdevkit")
    parser.add_argument("--backbone", default="mit_b1")
    parser.add_argument("--weights", metavar="NAME", help="as model.weights; default: random")
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--crops", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    for line in table(parser.parse_args()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
