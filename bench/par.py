"""PAR: one-hot convolutions, as AFA publishes it, against shifted views; same labels, one process.

Run: ``python -m bench.par [--size 512] [--classes 1] [--images 4] [--threads 1]``. Prints one JSON line with seconds
per image for a high and a low run, and the ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from ugrl.method.refine import AROUND, PAR, refine_labels


def neighbours(x_BCHW: Tensor, kernel: Tensor, dilations: tuple[int, ...]) -> Tensor:
    b, c, h, w = x_BCHW.shape
    out = []
    for d in dilations:
        padded = F.pad(x_BCHW, [d] * 4, mode="replicate").view(b * c, 1, h + 2 * d, w + 2 * d)
        out.append(F.conv2d(padded, kernel, dilation=d).view(b, c, 8, h, w))
    return torch.cat(out, 2)


def naive_par(par: PAR, image: Tensor, masks: Tensor) -> Tensor:
    """Every neighbour of every channel and mask materialised, the affinity computed by every call."""
    kernel = image.new_zeros((8, 1, 3, 3))
    for n, (dy, dx) in enumerate(AROUND):
        kernel[n, 0, 1 + dy, 1 + dx] = 1
    near = neighbours(image, kernel, par.dilations)
    spread = near.std(2, keepdim=True)
    energy = -(((near - image[:, :, None]).abs() / (spread + 1e-8) / par.w1) ** 2)
    weight = energy.mean(1, keepdim=True).softmax(2) + image.new_tensor(par.position())[:, None, None]
    for _ in range(par.iterations):
        masks = (neighbours(masks, kernel, par.dilations) * weight).sum(2)
    return masks


@torch.no_grad()
def naive_labels(par: PAR, image: Tensor, cam_nHW: Tensor, classes: Tensor, high: float, low: float) -> Tensor:
    size = image.shape[-2:]
    half = [n // 2 for n in size]
    small = F.interpolate(image[None], half, mode="bilinear")
    keys = torch.cat([classes.new_zeros(1), classes + 1])
    won = []
    for score in (high, low):
        logits = torch.cat([torch.full_like(cam_nHW[:1], score), cam_nHW])[None]
        masks = F.interpolate(logits, half, mode="bilinear").softmax(1)
        won.append(keys[F.interpolate(naive_par(par, small, masks), size, mode="bilinear").argmax(1)[0]])
    label = won[0].masked_fill(won[0] == 0, 255)
    return label.masked_fill(won[0] + won[1] == 0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1, help="present classes per image")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    g = torch.Generator().manual_seed(0)
    n, s = args.images, args.size
    coarse = torch.rand(n, 3, 24, 24, generator=g)
    images = F.interpolate(coarse, (s, s), mode="nearest") + 0.05 * torch.rand(n, 3, s, s, generator=g)
    cam = F.interpolate(torch.rand(n * args.classes, 1, 16, 16, generator=g), (s, s), mode="bilinear")[:, 0]
    pairs = torch.tensor([[b, f] for b in range(n) for f in range(args.classes)])
    boxes = torch.tensor([[0, s, 0, s]] * n)
    par = PAR()

    def fast() -> Tensor:
        return refine_labels(cam, pairs, boxes, images, batch=n, par=par)[0]

    def slow() -> Tensor:
        own = [pairs[:, 0] == b for b in range(n)]
        return torch.stack([naive_labels(par, images[b], cam[own[b]], pairs[own[b], 1], 0.55, 0.35) for b in range(n)])

    same = float((fast() == slow()).double().mean())
    times: dict[str, list[float]] = {"naive": [], "views": []}
    for _ in range(args.repeats):
        for name, run in (("naive", slow), ("views", fast)):
            start = time.process_time() if args.threads == 1 else time.perf_counter()
            run()
            end = time.process_time() if args.threads == 1 else time.perf_counter()
            times[name].append((end - start) / n)
    best = {name: statistics.median(values) for name, values in times.items()}
    report = {f"{name}_s_per_image": round(value, 4) for name, value in best.items()}
    report |= {"ratio": round(best["naive"] / best["views"], 2), "same_labels": same, **vars(args)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
