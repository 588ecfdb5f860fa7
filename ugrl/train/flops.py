"""How many operations a training step takes, counted while it runs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ugrl.config import Config
from ugrl.method.build import build_par, build_prototypes
from ugrl.model.build import build_net
from ugrl.train.step import Step
from ugrl.types import Batch


def _linear(x: Any, weight: Any, *args: Any, out_val: Any = None, **more: Any) -> int:
    """Of oneDNN's linear layer, which torch's counter does not know."""
    rows = 1
    for n in x[:-1]:
        rows *= n
    return int(2 * rows * weight[0] * weight[1])


def step_gflop(cfg: Config, num_classes: int) -> float:
    """Operations of one training step after the warm-ups, forward and backward, CAM passes included, for one image.

    Matrix products, convolutions and attention count, each multiplication and each addition as one; norms, resizing and
    other things that move memory do not. The step runs on a CPU, on random pixels of ``data.crop``, with one class
    present and both CAM thresholds in one place: no pixel is ignored, and the contrastive pool has its full size.

    Args:
        cfg: The run.
        num_classes: Foreground classes.

    Returns:
        GFLOP (10⁹ operations).
    """
    step, batch = _made(cfg, num_classes, torch.device("cpu"))
    mapping: dict[Any, Any] = {}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        mapping[torch.ops.mkldnn._linear_pointwise] = _linear
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        step(batch, cfg.train.steps - 1).loss.backward()
    return float(counter.get_total_flops()) / 1e9


def step_seconds(cfg: Config, num_classes: int, device: torch.device) -> float:
    """Seconds of the same step on a device, times the images of the global batch: about what a step takes there.

    Args:
        cfg: The run.
        num_classes: Foreground classes.
        device: Where.
    """
    step, batch = _made(cfg, num_classes, device)

    def once() -> float:
        start = time.perf_counter()
        step(batch, cfg.train.steps - 1).loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return once() * cfg.train.global_batch


def _made(cfg: Config, num_classes: int, device: torch.device) -> tuple[Step, Batch]:
    """A step with its network, and a batch of one image whose class has a prototype, and hence a u."""
    cam = cfg.method.cam
    middle = (cam.low + cam.high) / 2
    cam = replace(cam, low=middle, high=middle, refine="none")
    cfg = replace(cfg, method=replace(cfg.method, cam=cam), train=replace(cfg.train, dtype="float32", micro_batch=0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_net(cfg, num_classes, pretrained=False).to(device)
        net.train()
        step = Step(cfg, net, build_prototypes(cfg, num_classes, net.dim).to(device), build_par(cfg))
        tags = torch.zeros(1, num_classes)
        tags[0, 0] = 1.0
        size = cfg.data.crop
        batch = Batch(
            ids=("counted",),
            images_B3HW=torch.randn(1, 3, size, size),
            tags_BF=tags,
            masks_BHW=None,
            boxes_B4=torch.tensor([[0, size, 0, size]]),
            pairs_P2=tags.nonzero(),
        ).to(device)
        with torch.no_grad():
            step(batch, cfg.train.steps - 1)
    return step, batch
