"""From the passes of several scales and mirror images to one map of class probabilities."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ugrl.bilinear import resize
from ugrl.config import EvalConfig
from ugrl.model.network import UGRLNet

Size = tuple[int, int]


def first_size(size: Size, how: EvalConfig, least: int = 1) -> Size:
    """Size of an image at scale 1.

    Args:
        size: Its own ``(H, W)``.
        how: ``resize``, ``side`` and ``rounding`` are read.
        least: Shortest side that the encoder takes.

    >>> first_size((375, 500), EvalConfig(resize="long_side", side=512, rounding="floor"))
    (384, 512)
    """
    if how.resize == "native":
        return size
    if how.resize == "square":
        return how.side, how.side
    ratio = how.side / max(size)
    return _whole(size[0] * ratio, how, least), _whole(size[1] * ratio, how, least)


def size_at(first: Size, scale: float, how: EvalConfig, least: int = 1) -> Size:
    """Size of an image at a scale, from :func:`first_size`.

    >>> size_at((333, 500), 0.75, EvalConfig()), size_at((333, 500), 0.75, EvalConfig(rounding="floor"))
    ((250, 375), (249, 375))
    """
    return first if scale == 1 else (_whole(first[0] * scale, how, least), _whole(first[1] * scale, how, least))


def _whole(side: float, how: EvalConfig, least: int) -> int:
    return max(least, int(side) if how.rounding == "floor" else round(side))


def _scaled(base_B3HW: Tensor, target: Size, scale: float, how: EvalConfig) -> Tensor:
    """Images at a scale. After ``long_side`` pixels keep their distance times the scale, as in AFA's code: a part of a
    pixel that is left over at the border is cut off. Otherwise the border stays where it is.
    """
    size = (base_B3HW.shape[-2], base_B3HW.shape[-1])
    if target == size:
        return base_B3HW
    if how.resize == "long_side" and target == (int(size[0] * scale), int(size[1] * scale)):
        return F.interpolate(base_B3HW, scale_factor=scale, mode="bilinear", align_corners=False)
    return resize(base_B3HW, target)


def shares_passes(how: EvalConfig) -> bool:
    """Whether an image is segmented at the sizes at which its CAM is made, so that both may share passes."""
    return how.resize == "native" and how.rounding == "nearest" and not how.cam_side


def with_tag_prior(probs_BCHW: Tensor, tags_BF: Tensor, power: float) -> Tensor:
    """Probabilities of each pixel, whose classes are weighed by those of the whole image.

    (1 − S_0) · S_c · p_c^γ / Σ_k S_k · p_k^γ for a class c; the background keeps its S_0. Weighed classes beside a
    background that is not would lose to it (docs/finding.md, "The classifier in the masks").

    Args:
        probs_BCHW: Probabilities S, class 0 is background.
        tags_BF: The classifier's probabilities p of the classes without background.
        power: γ, ``eval.tag_prior``; 0 changes nothing.
    """
    if power == 0:
        return probs_BCHW
    ground_B1HW, classes_BFHW = probs_BCHW[:, :1], probs_BCHW[:, 1:]
    weighed_BFHW = classes_BFHW * tags_BF.to(probs_BCHW.dtype)[:, :, None, None] ** power
    total_B1HW = weighed_BFHW.sum(1, keepdim=True)
    # Where no class is left, all is background.
    share_B1HW = (1 - ground_B1HW) / total_B1HW.clamp_min(torch.finfo(probs_BCHW.dtype).tiny)
    return torch.cat([torch.where(total_B1HW > 0, ground_B1HW, 1.0), weighed_BFHW * share_B1HW], 1)


def combined_scores(
    net: UGRLNet,
    images_B3HW: Tensor,
    how: EvalConfig,
    known: Mapping[tuple[float, bool], Tensor] | None = None,
) -> Tensor:
    """Class probabilities (B, C, H, W), combined over scales and mirror images.

    Args:
        net: Network in eval mode.
        images_B3HW: Normalised images of any size.
        how: Which sizes, scales and mirror images, and how they are combined.
        known: Logits by (scale, mirrored) of passes over images of the same sizes that were made already.
    """
    size = (images_B3HW.shape[-2], images_B3HW.shape[-1])
    first = first_size(size, how, net.min_size)
    # A square is cut from the image itself at each scale; the other sizes are steps from the first one.
    base = resize(images_B3HW, first) if how.resize == "long_side" and first != size else images_B3HW
    found: Tensor | None = None
    grid = size
    for scale in how.seg_scales:
        x: Tensor | None = None
        at_scale: Tensor | None = None
        for flip in (False, True) if how.mirror else (False,):
            logits = (known or {}).get((scale, flip))
            if logits is None:
                if x is None:
                    x = _scaled(base, size_at(first, scale, how, net.min_size), scale, how)
                logits = net.segment(x.flip(-1) if flip else x)
            if found is None and at_scale is None and how.combine_at == "decoder":
                grid = (logits.shape[-2], logits.shape[-1])
            scores = resize(logits.float(), grid)
            scores = scores.softmax(1) if how.combine_of == "probabilities" else scores
            scores = scores.flip(-1) if flip else scores
            at_scale = scores if at_scale is None else at_scale + scores
        assert at_scale is not None
        if how.mirror and how.mirror_by == "mean":
            at_scale = at_scale / 2
        if found is None:
            found = at_scale
        else:
            found = torch.maximum(found, at_scale) if how.combine == "max" else found + at_scale
    assert found is not None
    if how.combine == "mean":
        found = found / len(how.seg_scales)
    if grid != size:
        found = resize(found, size)
    if how.combine_of == "logits":
        return found.softmax(1)
    sums = how.combine == "max" or (how.mirror and how.mirror_by == "sum")
    return found / found.sum(1, keepdim=True) if sums else found
