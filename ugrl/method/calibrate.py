"""The u of pairs, given a say of the classifier and placed within its class; fitted to training pairs, without masks.

The classifier's say w: the u of a pair becomes (1 − w)·u + w·v, where v is the classifier's doubt −logit p of the tag,
moved and scaled so that over the pairs of the training it has u's mean and deviation. The two know different things:
the margin is of the place where the class is seen, p of the whole image. Background, which has no p, keeps its u.

The place within the class: 2·Φ((u − m_c)/s_c), with the running mean and deviation of the class's u and Φ of the normal
distribution: twice the rank to be expected.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ugrl.distributed import all_reduce_sum
from ugrl.errors import ConfigError, UgrlError

TINY = 1e-12
"""A variance below this is none: nothing can be scaled by it."""


class Calibration(nn.Module):
    """Buffers only.

    Args:
        num_classes: Number of classes C (with background).
        eta: Running means are those of about 1/(1 − η) batches.
        classifier_weight: w of the classifier's doubt, in [0, 1).
        within_class: Whether u is placed within its class.

    Attributes:
        doubt_moments_4: Running means of u, u², logit and logit² of pairs, and ``doubt_seen``, int64, pairs in them
            (``classifier_weight`` only).
        u_moments_C2: Running means of u and u² of each class, and ``u_seen_C``, int64, pairs in them (``within_class``
            only).

    Raises:
        ConfigError: The weight is out of range.
    """

    doubt_moments_4: Tensor
    doubt_seen: Tensor
    u_moments_C2: Tensor
    u_seen_C: Tensor

    def __init__(self, num_classes: int, *, eta: float, classifier_weight: float, within_class: bool) -> None:
        super().__init__()
        if not 0 <= classifier_weight < 1:
            raise ConfigError(f"classifier_weight: {classifier_weight!r}, expected a number in [0, 1)")
        self.eta, self.classifier_weight, self.within_class = eta, classifier_weight, within_class
        if classifier_weight:
            self.register_buffer("doubt_moments_4", torch.zeros(4))
            self.register_buffer("doubt_seen", torch.zeros((), dtype=torch.int64))
        if within_class:
            self.register_buffer("u_moments_C2", torch.zeros(num_classes, 2))
            self.register_buffer("u_seen_C", torch.zeros(num_classes, dtype=torch.int64))

    def forward(self, u_BC: Tensor, known_BC: Tensor, logits_BF: Tensor | None) -> tuple[Tensor, Tensor]:
        """The u of pairs, in [0, 2], and which are known: for ``within_class``, where others were seen.

        Args:
            u_BC: Of the prototypes alone.
            known_BC: bool, which there are.
            logits_BF: The classifier's scores before the sigmoid; where it has a say.

        Raises:
            UgrlError: The classifier has a say, and ``logits_BF`` is missing.
        """
        u_BC = self._with_doubt(u_BC, known_BC, logits_BF)
        if not self.within_class:
            return u_BC, known_BC
        mean_C, square_C = self.u_moments_C2.unbind(1)
        variance_C = square_C - mean_C.square()
        known_BC = known_BC & (self.u_seen_C > 1) & (variance_C > TINY)
        z_BC = (u_BC - mean_C) / variance_C.clamp(min=TINY).sqrt()
        return (2 * torch.special.ndtr(z_BC)).masked_fill(~known_BC, 0), known_BC

    def update(self, u_BC: Tensor, known_BC: Tensor, logits_BF: Tensor | None) -> None:
        """Let the moments follow the batch of all ranks; every rank must call it, with the same B."""
        if self.within_class:
            mixed_BC = self._with_doubt(u_BC, known_BC, logits_BF)
            batch_C2, n_C = mean_over_batch(torch.stack([mixed_BC, mixed_BC.square()], -1), known_BC)
            self._follow(self.u_moments_C2, self.u_seen_C, batch_C2, n_C)
        if self.classifier_weight:
            u_BF, known_BF, scores_BF = u_BC[:, 1:], known_BC[:, 1:], _given(logits_BF, u_BC)
            rows_BF4 = torch.stack([u_BF, u_BF.square(), scores_BF, scores_BF.square()], -1)
            rows_N14 = rows_BF4.masked_fill(~known_BF[..., None], 0).flatten(0, 1)[:, None]
            batch_14, n_1 = mean_over_batch(rows_N14, known_BF.flatten()[:, None])
            self._follow(self.doubt_moments_4, self.doubt_seen, batch_14[0], n_1[0])

    def _with_doubt(self, u_BC: Tensor, known_BC: Tensor, logits_BF: Tensor | None) -> Tensor:
        """The u with the classifier's say; the prototypes' own until two pairs were seen."""
        if not self.classifier_weight:
            return u_BC
        u, u_square, logit, logit_square = self.doubt_moments_4
        u_variance, logit_variance = (u_square - u.square()).clamp(min=0), logit_square - logit.square()
        scale = (u_variance / logit_variance.clamp(min=TINY)).sqrt()
        doubt_BF = u + scale * (logit - _given(logits_BF, u_BC))
        mixed_BF = torch.lerp(u_BC[:, 1:], doubt_BF, self.classifier_weight).clamp(0, 2)
        fitted = (self.doubt_seen > 1) & (logit_variance > TINY)
        return torch.where(known_BC & fitted, torch.cat([u_BC[:, :1], mixed_BF], dim=1), u_BC)

    def _follow(self, moments: Tensor, seen: Tensor, batch: Tensor, n: Tensor) -> None:
        """Move moments (…, K) and the pairs in them (…): plain means first, then those of about 1/(1 − η) batches."""
        share = (n / (seen.to(n.dtype) + n).clamp(min=1)).clamp(min=1 - self.eta)
        moved = moments + share[..., None] * (batch - moments)
        moments.copy_(torch.where(n[..., None] > 0, moved, moments))
        seen.add_(n.long())


def mean_over_batch(x_BCD: Tensor, valid_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the valid images of all ranks (C, D), 0 without any, and their number (C,); x is 0 where invalid."""
    packed_CD = torch.cat([x_BCD.sum(dim=0), valid_BC.sum(dim=0)[:, None].to(x_BCD.dtype)], dim=1)
    packed_CD = all_reduce_sum(packed_CD)
    n_C = packed_CD[:, -1]
    return packed_CD[:, :-1] / n_C.clamp(min=1)[:, None], n_C


def _given(logits_BF: Tensor | None, u_BC: Tensor) -> Tensor:
    if logits_BF is None:
        raise UgrlError("uncertainty: the classifier has a say in u, but its scores were not given")
    return logits_BF.to(u_BC)
