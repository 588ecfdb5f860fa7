"""The reliable pool R: which pixels of an image the contrastive loss may use.

All images are handled at once by sorting; nothing waits for the device.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ugrl.errors import ConfigError
from ugrl.seeding import hash_uniform
from ugrl.types import IGNORE

PoolKind = Literal["stratified", "ranked", "random"]
MIN_PER_CLASS = 2  # an anchor needs a positive


@torch.no_grad()
def reliable_pool(
    labels_Bhw: Tensor,
    u_BC: Tensor,
    conf_Bhw: Tensor,
    *,
    keep: float,
    kind: PoolKind = "stratified",
    keys_B: Tensor,
    u_Bhw: Tensor | None = None,
) -> Tensor:
    """Choose about ``keep`` of the valid pixels of each image.

    The budget of an image with n valid pixels is ⌊keep·n + ½⌋, at least 1 if n > 0.

    - ``stratified``: the budget is shared over the classes present in proportion to area·e^(−u_c),
      at least 2 pixels each (this minimum goes before the budget) and at most all (what a full class
      cannot take goes to the others in the same proportion, see :func:`stratified_quota`). Within a
      class the most confident pixels are taken.
    - ``ranked``: the pixels with the lowest u of their class, as the paper prints it.
    - With a u of each pixel (``u_Bhw``), both take the pixels with the lowest of these instead.
    - ``random``: any.

    Ties, and ``random``, go by a hash of the image's key, so that neither batch nor rank matters.

    Args:
        labels_Bhw: Labels on the decoder's grid, 255 is never chosen.
        u_BC: Uncertainty by image and class; a class without one is given 0 by the caller.
        conf_Bhw: Confidence, any scale that grows with it.
        keep: K in (0, 1].
        kind: ``stratified``, ``ranked`` or ``random``, as described above.
        keys_B: int64, a function of (seed, step, image).
        u_Bhw: Uncertainty of each pixel, any scale that grows with it.

    Returns:
        bool (B, h, w).

    Raises:
        ConfigError: ``keep`` outside (0, 1] or an unknown ``kind``.
    """
    if not 0.0 < keep <= 1.0:
        raise ConfigError(f"keep: {keep!r}, expected a share of the pixels in (0, 1]")
    if kind not in ("stratified", "ranked", "random"):
        raise ConfigError(f"pool: {kind!r}, expected 'stratified', 'ranked' or 'random'")
    C = u_BC.shape[1]
    labels_BN = labels_Bhw.flatten(1).long()
    valid_BN = labels_BN != IGNORE
    tie_BN = hash_uniform(keys_B.to(labels_BN.device), labels_BN.shape[1])
    n_B = valid_BN.sum(1)
    budget_B = torch.minimum((keep * n_B.double() + 0.5).floor().long().clamp(min=1), n_B)
    safe_BN = labels_BN.where(valid_BN, 0)

    # The stratum that a pixel competes in; the last one, of quota 0, holds the ignored pixels.
    if kind == "stratified":
        stratum_BN = labels_BN.where(valid_BN, C)
        area_BC = _count(stratum_BN, C + 1)[:, :C]
        quota_BS = torch.nn.functional.pad(stratified_quota(area_BC, u_BC, budget_B), (0, 1))
        order_BN = _lexsort(stratum_BN, (-conf_Bhw if u_Bhw is None else u_Bhw).flatten(1), tie_BN)
    else:
        stratum_BN = (~valid_BN).long()
        quota_BS = torch.nn.functional.pad(budget_B[:, None], (0, 1))
        rank_BN = u_BC.gather(1, safe_BN) if u_Bhw is None else u_Bhw.flatten(1)
        order_BN = _lexsort(stratum_BN, *([rank_BN] if kind == "ranked" else []), tie_BN)

    size_BS = _count(stratum_BN, quota_BS.shape[1])
    start_BS = size_BS.cumsum(1) - size_BS
    sorted_BN = stratum_BN.gather(1, order_BN)
    place_BN = torch.arange(order_BN.shape[1], device=order_BN.device) - start_BS.gather(1, sorted_BN)
    taken_BN = place_BN < quota_BS.gather(1, sorted_BN)
    return torch.zeros_like(valid_BN).scatter_(1, order_BN, taken_BN).view_as(labels_Bhw)


def pool_bound(cells: int, classes: int, keep: float) -> int:
    """The most pixels that an image's pool can hold, known without looking: K's share, or two of every class.

    >>> pool_bound(16384, 21, 0.35), pool_bound(16, 21, 0.1)
    (5734, 16)
    """
    return min(cells, max(1, int(keep * cells + 0.5), MIN_PER_CLASS * classes))


def positions(mask_Bhw: Tensor, most: int) -> Tensor:
    """Where a mask is set: int64 (B, most), ascending; a shorter row goes on with positions where it is not.

    >>> positions(torch.tensor([[[False, True], [True, True]], [[True, False], [False, False]]]), 3).tolist()
    [[1, 2, 3], [0, 1, 2]]
    """
    return (~mask_Bhw.flatten(1)).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]


def chosen(mask_Bhw: Tensor, at_Bn: Tensor) -> Tensor:
    """The mask at some positions, bool (B, n)."""
    return mask_Bhw.flatten(1).gather(1, at_Bn)


def stratified_quota(area_BC: Tensor, u_BC: Tensor, budget_B: Tensor) -> Tensor:
    """Share each image's budget over its classes in proportion to area·e^(−u), within bounds.

    Water filling: q_c = λ·area_c·e^(−u_c) clamped to [min(2, area_c), area_c], with λ such that the
    sum is max(budget, Σ min(2, area_c)). It is solved exactly at the breakpoints of this piecewise
    linear function. Fractions are rounded by largest remainder, lower classes first among equals.

    Args:
        area_BC: int64 pixels of each class.
        u_BC: Uncertainty of each image and class, in [0, 2].
        budget_B: int64 pixels to choose, at most Σ area.

    Returns:
        int64 (B, C).
    """
    most_BC = area_BC.double()
    least_BC = most_BC.clamp(max=MIN_PER_CLASS)
    total_B1 = torch.maximum(budget_B.double(), least_BC.sum(1))[:, None]
    present_BC = area_BC > 0
    rate_BC = (most_BC * (-u_BC.double()).exp()).where(present_BC, 1.0)  # 1: no division by 0 below
    lower_BC, upper_BC = least_BC / rate_BC, most_BC / rate_BC  # λ at which a class leaves its bounds
    breaks_BK = torch.cat([lower_BC, upper_BC], 1).sort(1).values
    filled_BKC = (breaks_BK[:, :, None] * rate_BC[:, None]).clamp(least_BC[:, None], most_BC[:, None])
    filled_BK = filled_BKC.sum(2)
    # The last breakpoint that does not overfill; the first never does (all classes at their least).
    below_BK = filled_BK <= total_B1 * (1 + 1e-12)
    below_BK[:, 0] = True
    at_B1 = below_BK.sum(1, keepdim=True) - 1
    level_B1 = breaks_BK.gather(1, at_B1)
    moving_BC = present_BC & (lower_BC <= level_B1) & (level_B1 < upper_BC)
    slope_B1 = (rate_BC * moving_BC).sum(1, keepdim=True)
    rise_B1 = (total_B1 - filled_BK.gather(1, at_B1)).clamp(min=0) / slope_B1.where(slope_B1 > 0, 1.0)
    share_BC = ((level_B1 + rise_B1) * rate_BC).clamp(least_BC, most_BC)
    share_BC = (share_BC * 2**20).round() / 2**20  # rounding noise must not decide between equal remainders
    whole_BC = share_BC.floor()
    remainder_BC = (share_BC - whole_BC).where(whole_BC < most_BC, -1.0)
    missing_B1 = (total_B1 - whole_BC.sum(1, keepdim=True)).long()
    order_BC = remainder_BC.argsort(dim=1, descending=True, stable=True)
    rank_BC = torch.empty_like(order_BC).scatter_(
        1, order_BC, torch.arange(order_BC.shape[1], device=order_BC.device).expand_as(order_BC)
    )
    return whole_BC.long() + (rank_BC < missing_B1)


def _count(index_BN: Tensor, bins: int) -> Tensor:
    """int64 (B, bins): how often each index occurs in a row."""
    zeros = torch.zeros(index_BN.shape[0], bins, dtype=torch.int64, device=index_BN.device)
    return zeros.scatter_add_(1, index_BN, torch.ones_like(index_BN))


def _lexsort(*keys_BN: Tensor) -> Tensor:
    """Row-wise order by the first key, among equals by the second, and so on; all ascending."""
    order_BN = keys_BN[-1].argsort(dim=1, stable=True)
    for key_BN in reversed(keys_BN[:-1]):
        order_BN = order_BN.gather(1, key_BN.gather(1, order_BN).argsort(dim=1, stable=True))
    return order_BN
