"""A step of which only the encoder works in parts: the batch's maths in a part's memory.

Accumulating the gradients of whole small steps would change the method: norms, weights, valid counts, prototypes and
batch-wide contrast all span the global batch. Only the encoder treats each image by itself, and it is where the memory
goes. So it runs twice: first without gradients, a few images at a time, to give the heads the features of all
images; the losses are computed once, on all of them, and leave their gradient at the features; then the encoder runs
again over the same few images and takes that gradient on. What is added is one more forward pass of the encoder, which
is also the plain CAM pass where ``method.cam.share`` lets the training pass be one.

Source of the two-pass form: gradient caching (Gao et al., 2021, arXiv:2101.06983).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ugrl.model.network import Encoded
from ugrl.train.step import Step, zero_of
from ugrl.types import Batch, StepOutput


def parts_of(count: int, most: int) -> list[slice]:
    """``count`` rows in as few parts as hold at most ``most`` each, as equal as can be.

    >>> parts_of(7, 3)
    [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
    >>> parts_of(4, 0)
    [slice(0, 4, None)]
    """
    number = 1 if most <= 0 else -(-count // most)
    size, longer = divmod(count, number)
    ends = [(k + 1) * size + min(k + 1, longer) for k in range(number)]
    return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def run_step(
    step_fn: Step,
    batch: Batch,
    step: int,
    *,
    model: nn.Module | None = None,
    views: bool = False,
    micro_batch: int = 0,
    amp: bool = False,
) -> StepOutput:
    """Losses of a batch, and their gradients in the parameters; moves the prototypes.

    Args:
        step_fn: The training step of the method.
        batch: Samples of this rank, on the network's device.
        step: Number of the training step, counted from 0.
        model: The network as wrapped by DDP; the bare one by default.
        views: Whether to keep tensors for pictures.
        micro_batch: Most images that the encoder keeps activations of; 0: all.
        amp: Whether to compute in bf16 where autocast does.

    Returns:
        As :class:`Step`; the same numbers, to rounding, whatever ``micro_batch``.
    """
    model = model or step_fn.net
    parts = parts_of(len(batch.ids), micro_batch)
    if len(parts) == 1:
        with torch.autocast(batch.images_B3HW.device.type, torch.bfloat16, enabled=amp):
            out = step_fn(batch, step, model=model, views=views)
        out.loss.backward()
        return out
    return _in_parts(step_fn, batch, step, parts, model=model, views=views, amp=amp)


def _in_parts(
    step_fn: Step, batch: Batch, step: int, parts: list[slice], *, model: nn.Module, views: bool, amp: bool
) -> StepOutput:
    images, net = batch.images_B3HW, step_fn.net
    size = (images.shape[-2], images.shape[-1])
    noise, heads = step_fn.noise(batch, step), step_fn.schedule.heads(step)
    part_noise = [None if noise is None else noise.part(rows) for rows in parts]

    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        shared = step_fn.schedule.shares(step)
        # As in the undivided step, the CAM's passes do not share the memory with what the losses need.
        targets = None if shared else step_fn.targets(batch, step)
        with torch.no_grad():
            found: list[list[Tensor]] = []
            for rows, n in zip(parts, part_noise, strict=True):
                found.append(Encoded(*net.encoder(images[rows], n)).tensors())
            kept = [torch.cat(tensors) for tensors in zip(*found, strict=True)]
            del found
            if targets is None:
                targets = step_fn.targets(batch, step, Encoded.of(kept))
        leaves = [x.requires_grad_() for x in kept]
        answer = net.heads_of(
            Encoded.of(leaves), size, noise=noise, boxes=step_fn.pool_boxes(batch), where=targets.focus(), **heads
        )
        out = step_fn.losses(batch, answer, targets, step, views=views)
    # Not a pass of DDP: the heads' gradients stay this rank's own until the last part's pass sends all of them.
    out.loss.backward()
    del answer

    for k, (rows, n) in enumerate(zip(parts, part_noise, strict=True)):
        last = k == len(parts) - 1
        with nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
                again = model(images[rows], noise=n, encode_only=True)
            ends, gradients = [], []
            for x, leaf in zip(again.tensors(), leaves, strict=True):
                if leaf.grad is not None and x.requires_grad:  # a frozen encoder's do not
                    ends.append(x)
                    gradients.append(leaf.grad[rows])
            if last:
                zero = zero_of(*(m for m in net.children() if m is not net.encoder))
                ends.append(zero)
                gradients.append(torch.ones_like(zero))
            if ends:
                torch.autograd.backward(ends, gradients)
    return out
