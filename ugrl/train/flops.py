"""How many operations a training step takes, counted without doing them, and how long it takes on a device."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from ugrl.config import Config
from ugrl.method.contrast import Tile, sum_of_losses, tiles_of
from ugrl.method.objective import Objective
from ugrl.model.specs import crop_multiple, least_crop
from ugrl.train.build import build_net, build_par, build_prototypes
from ugrl.train.step import Step
from ugrl.types import IGNORE, Batch

# What a step that is timed may take, in GFLOP (a GPU shows what it can with more), and for how long it is repeated.
TIMED_GFLOP, ON_GPU, TIMED_S = 30.0, 100.0, 0.3
# Side of the contrastive loss's tiles on a CPU, where nothing else is asked for.
TILE = 512


aten = torch.ops.aten


def _linear(x: Any, weight: Any, *args: Any, out_shape: Any = None) -> int:
    """Of oneDNN's linear layer, which torch's counter does not know."""
    return 2 * math.prod(x) * int(weight[0])


def _convolution_backward(grad: Any, x: Any, weight: Any, *args: Any, out_shape: Any = None) -> int:
    """As the convolution itself, for each of the two gradients that are wanted; torch's counter forgets the groups."""
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(args[-1][:2])


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **more: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


FORMULAS = flop_registry | {
    aten.convolution_backward: shape_wrapper(_convolution_backward),
    aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward),
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = shape_wrapper(_linear)


class _Counter(TorchDispatchMode):
    """Counts as torch's FlopCounterMode does, without its attempts to take every operation apart, most of the time."""

    flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := FORMULAS.get(func._overloadpacket)) is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        return out


class _NoInit(TorchFunctionMode):
    """No weight is drawn: on the meta device there is none, and torch loads its compiler to find that out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class _FullPool(Objective):
    """The losses without what a host would ask the values for, so that it also runs on the meta device."""

    def contrast(self, emb_BDhw: Tensor, labels_Bhw: Tensor, pool_Bhw: Tensor) -> Tensor:
        """Every position is an anchor."""
        c = self.method.contrast
        x_BND, key_BN = emb_BDhw.flatten(2).transpose(1, 2), labels_Bhw.flatten(1)
        n, side = key_BN.shape[1], c.tile or TILE
        tiles = [Tile(0, n, 0, IGNORE, True)] if n <= side else tiles_of([n], 0, side, True)
        return sum_of_losses(x_BND, key_BN, tiles, c.tau, padded=False)


def step_gflop(cfg: Config, num_classes: int) -> float:
    """Operations of one training step after the warm-ups, forward and backward, CAM passes included, for one image.

    Matrix products, convolutions and attention count, each multiplication and each addition as one; norms, resizing and
    other things that move memory do not. The step runs on torch's meta device: one image of ``data.crop`` with one
    class, no pixel ignored, the contrastive pool at its full size.

    Args:
        cfg: Configuration of the run.
        num_classes: Number of foreground classes F (without background).

    Returns:
        GFLOP (10⁹ operations).
    """
    # PAR multiplies nothing that counts, but AFA's propagation cannot do without it. A Fourier code multiplies as much
    # as a linear one, which asks for no value.
    cam, u = cfg.method.cam, replace(cfg.method.uncertainty, encoding="linear")
    cam = cam if cam.propagate == "afa" else replace(cam, refine="none")
    cfg = replace(cfg, method=replace(cfg.method, cam=cam, uncertainty=u))
    meta = torch.device("meta")
    with meta, _NoInit():  # a network of any size takes no memory, and no time to be drawn
        step = _made(cfg, num_classes, meta)
    return _counted(step, _batch(cfg, num_classes, 1, meta), cfg.train.steps - 1)


def _counted(step: Step, batch: Batch, at: int) -> float:
    """Do a step; its GFLOP."""
    with _Counter() as counter:
        step(batch, at).loss.backward()
    return counter.flop / 1e9


def step_seconds(cfg: Config, num_classes: int, device: torch.device, gflop: float) -> float:
    """About how long a step of the global batch takes on a GPU, or on one CPU core.

    What is timed has fewer images, and smaller ones where one is too much already; its time is scaled by operations.

    Args:
        cfg: Configuration of the run.
        num_classes: Number of foreground classes F (without background).
        device: Device to compute on.
        gflop: Operations of a step, from :func:`step_gflop`.
    """
    most = TIMED_GFLOP * (ON_GPU if device.type == "cuda" else 1.0)
    small = replace(cfg, data=replace(cfg.data, crop=_timed_crop(cfg, most / gflop)))
    images = max(1, min(cfg.train.global_batch, int(most / gflop)))
    step, batch = _made(small, num_classes, device), _batch(small, num_classes, images, device)

    on_gpu = device.type == "cuda"
    # One thread's own time: what others do on the machine meanwhile does not count, nor do threads that wait.
    clock = time.perf_counter if on_gpu else time.thread_time
    threads = torch.get_num_threads()

    def once() -> float:
        start = clock()
        step(batch, cfg.train.steps - 1).loss.backward()
        if on_gpu:
            torch.cuda.synchronize(device)
        return clock() - start

    torch.set_num_threads(1)
    try:
        done = _counted(step, batch, cfg.train.steps - 1)  # also gives the class a prototype, and hence a u
        found = [once()]
        while sum(found) < TIMED_S:
            found.append(once())
    finally:
        torch.set_num_threads(threads)
    return min(found) * cfg.train.global_batch * gflop / done


def _timed_crop(cfg: Config, share: float) -> int:
    """A multiple of 32, or of a ViT's patch, that takes about a share of the crop's operations.

    Never one that leaves a CAM scale no key.
    """
    multiple = crop_multiple(cfg.model.backbone)
    unit = multiple if 32 % multiple else 32
    least = least_crop(cfg.model.backbone, cfg.method.cam.scales)
    wanted = cfg.data.crop * min(1.0, share) ** 0.5
    return min(cfg.data.crop, unit * round(max(least, wanted) / unit))


def _made(cfg: Config, num_classes: int, device: torch.device) -> Step:
    """A step with its network. Both CAM thresholds in one place: no pixel is ignored."""
    cam = cfg.method.cam
    middle = (cam.low + cam.high) / 2
    cam = replace(cam, low=middle, high=middle)
    cfg = replace(cfg, method=replace(cfg.method, cam=cam), train=replace(cfg.train, dtype="float32", micro_batch=0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_net(cfg, num_classes, pretrained=False).to(device)
        net.train()
        prototypes = build_prototypes(cfg, num_classes, net.dim).to(device)
        return Step(cfg, net, prototypes, build_par(cfg), _FullPool(cfg))


def _batch(cfg: Config, num_classes: int, images: int, device: torch.device) -> Batch:
    """Random pixels with one class in every image."""
    tags = torch.zeros(images, num_classes, device=device)
    tags[:, 0] = 1.0
    size = cfg.data.crop
    return Batch(
        ids=tuple(map(str, range(images))),
        images_B3HW=torch.randn(images, 3, size, size, device=device),
        tags_BF=tags,
        # Only the setting Full reads masks, and only method.pseudo.source teacher masks.
        masks_BHW=torch.zeros(images, size, size, dtype=torch.uint8, device=device),
        teachers_BHW=torch.zeros(images, size, size, dtype=torch.uint8, device=device),
        boxes_B4=torch.tensor([[0, size, 0, size]] * images, device="cpu"),
        pairs_P2=torch.tensor([[b, 0] for b in range(images)], device="cpu"),
    )
