"""From uncertainties to loss weights (Eqs. 6 to 8, repaired).

The printed weight e^{1/(α·u)} overflows float32 for α·u < 0.0113 and lets one entry outweigh all
others together. Here the log-weights are centred, bounded and normalised over the entries they
weigh, so the scale of the loss is kept and no entry can be silenced. Sums go over all ranks.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ugrl.distributed import all_reduce_sum
from ugrl.errors import ConfigError
from ugrl.precision import full_precision
from ugrl.types import IGNORE

Kind = Literal["inverse_exp", "exp_decay", "none"]


@torch.no_grad()
def modulation_weights(
    u_BC: Tensor,
    known_BC: Tensor,
    n_BC: Tensor,
    *,
    strength: float,
    kind: Kind = "inverse_exp",
    per_class: bool,
    u_min: float = 0.05,
    bound: float = 3.0,
) -> Tensor:
    """ŵ of every (image, class): more certain entries weigh more, and the mean weight is 1.

    log w = 1/(strength·max(u, u_min)) or −strength·u, centred on its mean, clamped to ± ln(bound), then
    ŵ = N·w/Σw. Mean, N and Σw count an entry ``n`` times and run over the weighed entries (known, n > 0)
    of all ranks, either all together or each class by itself.

    Args:
        u_BC: Uncertainties in [0, 2]; not read where unknown.
        known_BC: bool, which entries have a u.
        n_BC: Multiplicity of an entry: its pixels, or 1 for a tag.
        strength: α (Eq. 6) or β (Eq. 8).
        kind: ``inverse_exp`` (the paper's, repaired), ``exp_decay`` or ``none``.
        per_class: Normalise within each class, so that classes keep their shares of the loss.
        u_min: Floor of u, ``inverse_exp`` only.
        bound: Largest factor between w and the geometric mean weight, > 1; two weights of a group
            differ by at most bound².

    Returns:
        ŵ (B, C), exactly 1 where nothing is weighed (no u, no multiplicity, N = 0). float32, float64
        for a float64 u.

    Raises:
        ConfigError: Unknown ``kind``, or a bound that is not above 1.

    >>> u = torch.tensor([[0.2, 0.4]])
    >>> w = modulation_weights(u, u > 0, torch.ones(1, 2), strength=5.0, per_class=False)
    >>> [round(x, 3) for x in w[0].tolist()]
    [1.245, 0.755]
    """
    _check(kind, bound)
    u_BC = u_BC if u_BC.dtype == torch.float64 else u_BC.float()
    if kind == "none":
        return torch.ones_like(u_BC)
    with full_precision(u_BC):
        n_BC = n_BC.to(u_BC.dtype)
        weighed_BC = known_BC & (n_BC > 0)
        n_BC = n_BC.where(weighed_BC, 0)
        log_BC = _log_weight(u_BC, strength, kind, u_min).where(weighed_BC, 0)

        count_G, log_sum_G = _group_sums(torch.stack([n_BC, n_BC * log_BC]), per_class)
        some_G = count_G.clamp(min=torch.finfo(u_BC.dtype).tiny)  # counts may be shares; 0 must not divide
        limit = math.log(bound)
        w_BC = (log_BC - log_sum_G / some_G).clamp(-limit, limit).exp()
        (sum_G,) = _group_sums((n_BC * w_BC)[None], per_class)
        scale_G = count_G / sum_G.where(count_G > 0, 1)
        return torch.where(weighed_BC, scale_G * w_BC, 1.0)


@torch.no_grad()
def pixel_weights(
    u_BHW: Tensor,
    known_BHW: Tensor,
    labels_BHW: Tensor,
    classes: int,
    *,
    strength: float,
    kind: Kind = "inverse_exp",
    u_min: float = 0.05,
    bound: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """ŵ of every pixel, from its own u: Eq. 8 with a u_seg that is not constant within a class (Eq. 7).

    As :func:`modulation_weights` by class: the pixels of a label, over all ranks, have the mean weight 1.

    Args:
        u_BHW: Uncertainties in [0, 2]; not read where unknown.
        known_BHW: bool, which pixels have a u.
        labels_BHW: int64, 255 is not weighed.
        classes: C.
        strength: β (Eq. 8).
        kind: As there.
        u_min: As there.
        bound: As there.

    Returns:
        ŵ (B, H, W), exactly 1 where nothing is weighed; and the effective sample share, a scalar in (0, 1].

    Raises:
        ConfigError: As there.
    """
    _check(kind, bound)
    u_BHW = u_BHW if u_BHW.dtype == torch.float64 else u_BHW.float()
    weighed_BHW = known_BHW & (labels_BHW != IGNORE)
    if kind == "none":
        return torch.ones_like(u_BHW), u_BHW.new_ones(())
    with full_precision(u_BHW):
        group_BHW = labels_BHW.where(weighed_BHW, classes)  # the last group holds what is not weighed
        log_BHW = _log_weight(u_BHW, strength, kind, u_min)

        def sums(*x_BHW: Tensor) -> Tensor:
            """Sums over the pixels of each class and all ranks, (K, C), in float64: millions of pixels are added."""
            flat = torch.stack([x.flatten() for x in x_BHW]).double()
            out = flat.new_zeros(len(x_BHW), classes + 1)
            return all_reduce_sum(out.index_add_(1, group_BHW.flatten(), flat)[:, :classes].contiguous())

        count_C, log_C = sums(torch.ones_like(log_BHW), log_BHW)
        centre_C = torch.nn.functional.pad(log_C / count_C.clamp(min=1), (0, 1)).to(log_BHW)
        limit = math.log(bound)
        w_BHW = (log_BHW - centre_C[group_BHW]).clamp(-limit, limit).exp()
        sum_C, square_C = sums(w_BHW, w_BHW.square())
        some_C = count_C > 0
        scale_C = torch.nn.functional.pad(count_C / sum_C.where(some_C, 1), (0, 1)).to(log_BHW)
        worth, total = (sum_C.square() / square_C.where(some_C, 1)).sum(), count_C.sum()
        share = torch.where(total > 0, worth / total.clamp(min=1), 1.0).to(u_BHW)
        return torch.where(weighed_BHW, scale_C[group_BHW] * w_BHW, 1.0), share


@torch.no_grad()
def effective_share(w_BC: Tensor, known_BC: Tensor, n_BC: Tensor, per_class: bool = False) -> Tensor:
    """Effective sample share of the weights, (Σŵ)²/(N·Σŵ²), over all ranks.

    Args:
        w_BC: Weights from :func:`modulation_weights`.
        known_BC: bool, which entries have an uncertainty.
        n_BC: Pixels of an entry, or 1 for a tag.
        per_class: Whether the weights were normalised within each class; the shares of the classes are averaged then.

    Returns:
        Scalar in (0, 1]; 1 for equal weights and for N = 0.

    >>> one = torch.ones(1, 2)
    >>> effective_share(torch.tensor([[1.5, 0.5]]), one > 0, one).item()
    0.800000011920929
    """
    w_BC = w_BC if w_BC.dtype == torch.float64 else w_BC.float()
    n_BC = n_BC.to(w_BC.dtype).where(known_BC, 0)
    count_G, sum_G, square_G = _group_sums(torch.stack([n_BC, n_BC * w_BC, n_BC * w_BC.square()]), per_class)
    some_G = count_G > 0
    # N_g · share_g = (Σŵ)²/Σŵ², the number of equally weighted entries that group g is worth.
    worth_G = sum_G.square() / square_G.where(some_G, 1)
    total = count_G.sum()
    return torch.where(total > 0, worth_G.sum() / total.where(total > 0, 1), 1.0)


def _check(kind: str, bound: float) -> None:
    if kind not in ("inverse_exp", "exp_decay", "none"):
        raise ConfigError(f"weighting: {kind!r}, expected 'inverse_exp', 'exp_decay' or 'none'")
    if not bound > 1:
        raise ConfigError(f"weighting bound: {bound!r}, expected a factor > 1")


def _log_weight(u: Tensor, strength: float, kind: Kind, u_min: float) -> Tensor:
    return 1 / (strength * u.clamp(min=u_min)) if kind == "inverse_exp" else -strength * u


def _group_sums(x_KBC: Tensor, per_class: bool) -> Tensor:
    """K sums over all ranks: (K, C) per class, else (K, 1)."""
    x_KG = x_KBC.sum(dim=1)
    return all_reduce_sum(x_KG if per_class else x_KG.sum(dim=-1, keepdim=True))
