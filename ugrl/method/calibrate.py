"""The u of pairs and pixels, mixed with other doubts in the same, and placed within its class; fitted without masks.

Three parts of a network can doubt that an image shows a class where its map lies: the prototypes (u), the classifier,
and the decoder (:mod:`ugrl.method.doubts`). They know different things, and each has a unit of its own. So a doubt is
moved and scaled: over the pairs (or pixels) of the training it then has u's mean and deviation. u becomes the weighted
mean of all of them. Who has nothing to say of a pair, as the classifier of background, leaves its share to u.

The place within the class: 2·Φ((u − m_c)/s_c), with the running mean and deviation of the class's u and Φ of the normal
distribution: twice the rank to be expected.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ugrl.distributed import all_reduce_sum
from ugrl.errors import ConfigError, UgrlError

TINY = 1e-12
"""A variance below this is none: nothing can be scaled by it."""

Doubts = Mapping[str, Tensor]
"""Who doubts → how much, of the shape of u, in any unit; NaN where it has nothing to say."""


class Mixture(nn.Module):
    """The weighted mean of u and of other doubts, aligned with u by running means; buffers only.

    Args:
        weights: Who doubts → its share, above 0; u has the rest.
        groups: G, kinds of entries that are aligned each by themselves.
        eta: Running means are those of about 1/(1 − η) batches.

    Attributes:
        moments_GK4: Running means of u, u², x and x², x the doubt of each of K.
        seen_GK: int64, entries in them.

    Raises:
        ConfigError: The shares leave nothing to u.
    """

    moments_GK4: Tensor
    seen_GK: Tensor

    def __init__(self, weights: Mapping[str, float], groups: int, eta: float) -> None:
        super().__init__()
        if sum(weights.values()) >= 1:
            told = " + ".join(f"{name}_weight {weight:g}" for name, weight in weights.items())
            raise ConfigError(f"{told}: expected a sum below 1, of which the prototypes have the rest")
        self.weights, self.groups, self.eta = dict(weights), groups, eta
        if weights:
            self.register_buffer("moments_GK4", torch.zeros(groups, len(weights), 4))
            self.register_buffer("seen_GK", torch.zeros(groups, len(weights), dtype=torch.int64))

    def forward(self, u: Tensor, known: Tensor, doubts: Doubts | None, group: Tensor | None = None) -> Tensor:
        """The mean, in [0, 2]; u itself where it is unknown, and until two entries of a group were seen.

        Args:
            u: Of the prototypes.
            known: bool, which there are.
            doubts: Of everyone who has a share.
            group: int64 in [0, G), of each entry; ``None``: all are of group 0.

        Raises:
            UgrlError: A doubt is missing.
        """
        out = u
        group = torch.zeros_like(u, dtype=torch.int64) if group is None else group
        for k, (name, weight) in enumerate(self.weights.items()):
            x = _given(doubts, name).to(u)
            mean, square, x_mean, x_square = self.moments_GK4[:, k].unbind(-1)
            x_variance = x_square - x_mean.square()
            fitted = (self.seen_GK[:, k] > 1) & (x_variance > TINY)
            scale = ((square - mean.square()).clamp(min=0) / x_variance.clamp(min=TINY)).sqrt()
            aligned = mean[group] + scale[group] * (x - x_mean[group])
            out = out + weight * torch.where(known & fitted[group] & ~x.isnan(), aligned - u, 0)
        return out.clamp(0, 2) if self.weights else u

    def update(self, u: Tensor, known: Tensor, doubts: Doubts | None, group: Tensor | None = None) -> None:
        """Let the moments follow the batch of all ranks, which must all call it; arguments as of :meth:`forward`."""
        if not self.weights:
            return
        flat = torch.zeros_like(u, dtype=torch.int64).flatten() if group is None else group.flatten()
        sums = []
        for name in self.weights:
            x = _given(doubts, name).to(u)
            here = known & ~x.isnan()
            rows_5M = torch.stack([v.where(here, 0).flatten() for v in (torch.ones_like(u), u, u * u, x, x * x)])
            # Millions of pixels are added.
            sums.append(rows_5M.new_zeros(5, self.groups, dtype=torch.float64).index_add_(1, flat, rows_5M.double()))
        n_GK, *sums_4GK = all_reduce_sum(torch.stack(sums)).permute(1, 2, 0)
        batch_GK4 = torch.stack(sums_4GK, -1) / n_GK.clamp(min=1)[..., None]
        follow(self.moments_GK4, self.seen_GK, batch_GK4, n_GK, self.eta)


class Calibration(nn.Module):
    """What u goes through when the prototypes have judged; buffers only.

    Args:
        num_classes: Number of classes C (with background).
        eta: Running means are those of about 1/(1 − η) batches.
        weights: Who else has a say in u → its share.
        within_class: Whether the u of pairs is placed within its class.

    Attributes:
        pairs, pixels: The mixtures. Pixels with a label of background are aligned apart from the others.
        u_moments_C2: Running means of u and u² of each class, and ``u_seen_C``, int64, pairs in them (``within_class``
            only).

    Raises:
        ConfigError: The shares leave nothing to u.
    """

    u_moments_C2: Tensor
    u_seen_C: Tensor

    def __init__(self, num_classes: int, *, eta: float, weights: Mapping[str, float], within_class: bool) -> None:
        super().__init__()
        self.eta, self.within_class = eta, within_class
        self.pairs, self.pixels = Mixture(weights, 1, eta), Mixture(weights, 2, eta)
        if within_class:
            self.register_buffer("u_moments_C2", torch.zeros(num_classes, 2))
            self.register_buffer("u_seen_C", torch.zeros(num_classes, dtype=torch.int64))

    def forward(self, u_BC: Tensor, known_BC: Tensor, doubts: Doubts | None) -> tuple[Tensor, Tensor]:
        """The u of pairs, in [0, 2], and which are known: for ``within_class``, where others were seen.

        Args:
            u_BC: Of the prototypes alone.
            known_BC: bool, which there are.
            doubts: Of everyone else who has a say, (B, C) each.

        Raises:
            UgrlError: A doubt is missing.
        """
        u_BC = self.pairs(u_BC, known_BC, doubts)
        if not self.within_class:
            return u_BC, known_BC
        mean_C, square_C = self.u_moments_C2.unbind(1)
        variance_C = square_C - mean_C.square()
        known_BC = known_BC & (self.u_seen_C > 1) & (variance_C > TINY)
        z_BC = (u_BC - mean_C) / variance_C.clamp(min=TINY).sqrt()
        return (2 * torch.special.ndtr(z_BC)).masked_fill(~known_BC, 0), known_BC

    def update(self, u_BC: Tensor, known_BC: Tensor, doubts: Doubts | None) -> None:
        """Let the moments of pairs follow the batch of all ranks; every rank must call it, with the same B."""
        if self.within_class:
            mixed_BC = self.pairs(u_BC, known_BC, doubts)
            batch_C2, n_C = mean_over_batch(torch.stack([mixed_BC, mixed_BC.square()], -1), known_BC)
            follow(self.u_moments_C2, self.u_seen_C, batch_C2, n_C, self.eta)
        self.pairs.update(u_BC, known_BC, doubts)


def follow(moments: Tensor, seen: Tensor, batch: Tensor, n: Tensor, eta: float) -> None:
    """Move moments (…, K) and the entries in them (…): plain means at first, then those of about 1/(1 − η) batches."""
    share = (n / (seen.to(n.dtype) + n).clamp(min=1)).clamp(min=1 - eta)
    moved = moments + share[..., None] * (batch - moments)
    moments.copy_(torch.where(n[..., None] > 0, moved, moments))
    seen.add_(n.long())


def mean_over_batch(x_BCD: Tensor, valid_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the valid images of all ranks (C, D), 0 without any, and their number (C,); x is 0 where invalid."""
    packed_CD = torch.cat([x_BCD.sum(dim=0), valid_BC.sum(dim=0)[:, None].to(x_BCD.dtype)], dim=1)
    packed_CD = all_reduce_sum(packed_CD)
    n_C = packed_CD[:, -1]
    return packed_CD[:, :-1] / n_C.clamp(min=1)[:, None], n_C


def _given(doubts: Doubts | None, name: str) -> Tensor:
    if doubts is None or name not in doubts:
        raise UgrlError(f"uncertainty: the {name} has a say in u, but its doubt was not given")
    return doubts[name]
