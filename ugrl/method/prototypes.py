"""Class prototypes in a hyperdimensional space and the uncertainty against them (Eqs. 3 to 5).

A class vector r is encoded by a fixed random map, each (image, class) pair casts one unit vote, the
mean vote of the global batch moves the class's prototype (Eq. 4), and u = 1 − cos(H, P) (Eq. 5)
compares a pair with the prototype *before* its own vote is added: a pair that is alone with its class
would otherwise be compared with itself.

Centring. LayerNorm'd features share one direction, which pushes every cosine to 1. ``center``
removes the class-balanced mean: the average, over the classes seen so far, of their running means.
Batch t is encoded (u and votes alike) with the mean before batch t; the very first batch, which has
none, with its own. Linear: H = Φ(r − μ). Fourier: cos(Φ(r − μ)/σ + b) would centre nothing, for
the kernel these codes approximate depends on r − r' only; so the mean is taken between the codes, the
average over classes of the code of their mean. For the linear code that is the same as Φ(r − μ).

A prototype keeps its votes as they were cast. They are deviations from the mean of their own time: a
drift of all features together, which training makes, cancels in them, while rewriting old votes for
today's mean would bring it in. What the first votes lack (a mean of few classes) fades with η.

Two kinds of u. ``distance`` is Eq. 5. ``margin`` is contrastive: how much nearer the best rival's prototype is than
one's own, u = 1 + (max_k≠c cos(H, P_k) − cos(H, P_c)) / 2, which is 1 halfway between the two. Rivals are all other
classes, or those that the image shows: background and its other tags.

Two kinds of votes. ``class``: the code of each pair's class vector, as printed. ``position``: the code of each position
of F4 that has a label; a prototype is then the mean direction of single positions, and cosines with positions are
larger. A class may have several prototypes then: a position votes for the nearest of its class, and its cosine with a
class is that with the nearest. Until each of them has begun, the strips of the image decide, from top to bottom.

σ of the Fourier code is the median distance between class vectors, averaged over batches until
:meth:`Prototypes.freeze`. Another σ is another code, so freezing starts every prototype anew
from the code of its class's running mean, and σ does not move again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ugrl.distributed import all_gather_rows, all_reduce_sum
from ugrl.errors import ConfigError, UgrlError
from ugrl.method.calibrate import Calibration, Doubts, mean_over_batch
from ugrl.precision import full_precision
from ugrl.seeding import generator
from ugrl.types import IGNORE

Encoding = Literal["linear", "fourier"]
Kind = Literal["distance", "margin"]
Against = Literal["all", "shown"]
Votes = Literal["class", "position"]

TINY = 1e-12
"""Codes shorter than this have no direction: no vote and no u."""


class Prototypes(nn.Module):
    """Buffers only; ``state_dict`` is all there is to resume.

    Args:
        num_classes: Number of classes C (with background).
        dim: D, width of a class vector.
        d_cls: Width of a code.
        eta: η of Eq. 4.
        encoding: ``linear`` Φr, entries of Φ ~ N(0, 1/d_cls); ``fourier`` cos(Φr/σ + b), Φ ~ N(0, 1), b
            uniform in [0, 2π).
        center: Whether to remove the class-balanced mean.
        seed: Seed of the random projection Φ and its offset b.
        kind: ``distance`` (Eq. 5) or ``margin``, as above.
        against: Rivals of ``margin``: ``all`` other classes, or those that are ``shown``.
        debias: Whether a prototype is the mean of its first votes until 1/(1 − η) batches had some, as in Adam (Kingma
            and Ba, 2015); without it the first vote, of an untrained network, fades with η^n alone.
        within_class, weights: What :mod:`ugrl.method.calibrate` does with u: who else has a say, and its share.
        votes: ``class`` or ``position``, as above.
        several: Prototypes of the background, and of each other class; more than 1 need votes of positions and the
            linear encoding.
        centre_momentum: Share of the old value when running means and σ move; they follow the features
            faster than prototypes do, because a mean that lags is a common direction again.

    Attributes:
        phi_dD, bias_d: The fixed map (bias for Fourier only).
        prototypes_Cd: P, 0 for classes without a vote.
        counts_C: int64, batches that moved each prototype.
        extra_Ed, extra_counts_E: The same for the second and further prototypes of classes, in the order of classes.
        mean_CD: Running mean of each class's vectors.
        mean_seen_C: bool, classes that have one.
        calibration: What u goes through when the prototypes have judged.
        sigma, frozen: Length scale (0 while unknown) and whether it is final (Fourier only).

    Raises:
        ConfigError: A value out of range or an unknown encoding.
    """

    phi_dD: Tensor
    bias_d: Tensor
    prototypes_Cd: Tensor
    counts_C: Tensor
    mean_CD: Tensor
    mean_seen_C: Tensor
    sigma: Tensor
    frozen: Tensor
    extra_Ed: Tensor
    extra_counts_E: Tensor
    owner_S: Tensor
    turn_S: Tensor
    number_C: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        dim: int,
        d_cls: int,
        eta: float = 0.99,
        encoding: Encoding = "linear",
        center: bool = True,
        seed: int = 0,
        kind: Kind = "distance",
        against: Against = "all",
        debias: bool = False,
        within_class: bool = False,
        weights: Mapping[str, float] | None = None,
        votes: Votes = "class",
        several: tuple[int, int] = (1, 1),
        centre_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        _check_word("uncertainty", kind, ("distance", "margin"))
        _check_word("against", against, ("all", "shown"))
        _check_word("encoding", encoding, ("linear", "fourier"))
        _check_word("votes", votes, ("class", "position"))
        for name, share in (("eta", eta), ("centre_momentum", centre_momentum)):
            if not 0 <= share < 1:
                raise ConfigError(f"{name}: {share!r}, expected a number in [0, 1)")
        for name, size in (("num_classes", num_classes), ("dim", dim), ("d_cls", d_cls)):
            if size < 1:
                raise ConfigError(f"{name}: {size!r}, expected a positive integer")
        if min(several) < 1 or (max(several) > 1 and (votes != "position" or encoding != "linear")):
            raise ConfigError(f"several: {several}, expected (1, 1), or votes of positions and the linear encoding")
        self.votes = votes
        self.eta = eta
        self.encoding = encoding
        self.center = center
        self.kind, self.against, self.debias = kind, against, debias
        self.centre_momentum = centre_momentum
        # NumPy's Philox gives every machine the same Φ; the checkpoint carries it all the same.
        phi_dD = generator(seed, "prototypes", encoding, "phi").standard_normal((d_cls, dim))
        if encoding == "linear":
            phi_dD /= math.sqrt(d_cls)
        self.register_buffer("phi_dD", torch.from_numpy(phi_dD).float())
        self.register_buffer("prototypes_Cd", torch.zeros(num_classes, d_cls))
        self.register_buffer("counts_C", torch.zeros(num_classes, dtype=torch.int64))
        self._add_extra([several[0], *[several[1]] * (num_classes - 1)], d_cls)
        self.register_buffer("mean_CD", torch.zeros(num_classes, dim))
        self.register_buffer("mean_seen_C", torch.zeros(num_classes, dtype=torch.bool))
        self.calibration = Calibration(num_classes, eta=eta, weights=weights or {}, within_class=within_class)
        if encoding == "fourier":
            bias_d = generator(seed, "prototypes", encoding, "bias").random(d_cls) * (2 * math.pi)
            self.register_buffer("bias_d", torch.from_numpy(bias_d).float())
            self.register_buffer("sigma", torch.zeros(()))
            self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        # Known on the host so that a step with a final σ neither gathers rows nor waits for the device.
        self._settled = encoding == "linear"
        self.register_load_state_dict_post_hook(_after_load)

    def _add_extra(self, numbers: list[int], d_cls: int) -> None:
        """The rows of the second and further prototypes, given how many each class has."""
        owners = [c for c, number in enumerate(numbers) for _ in range(number - 1)]
        self._more = bool(owners)
        if owners:
            self.register_buffer("extra_Ed", torch.zeros(len(owners), d_cls))
            self.register_buffer("extra_counts_E", torch.zeros(len(owners), dtype=torch.int64))
        # The class of each row, and which of its class's rows it is.
        turn_E = [1 + owners[:k].count(c) for k, c in enumerate(owners)]
        for name, values in (
            ("owner_S", [*range(len(numbers)), *owners]),
            ("turn_S", [0] * len(numbers) + turn_E),
            ("number_C", numbers),
        ):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    @torch.no_grad()
    def encode(self, r_D: Tensor) -> Tensor:
        """H of class vectors (…, D) → (…, d_cls), centred on the mean so far; not of unit length."""
        with full_precision(r_D):
            sigma = None if self.encoding == "linear" else self.sigma
            return self._encode(r_D.to(self.phi_dD.dtype), self.mean_CD, self.mean_seen_C, sigma)

    @torch.no_grad()
    def uncertainty(self, r_BCD: Tensor, present_BC: Tensor, doubts: Doubts | None = None) -> tuple[Tensor, Tensor]:
        """Uncertainty u of each pair (Eq. 5, or the margin) against the prototypes as they are; call before
        :meth:`update`.

        Args:
            r_BCD: Class vectors; not read where absent.
            present_BC: bool, which exist; these are the classes that an image shows.
            doubts: Of everyone else who has a say, (B, C) each.

        Returns:
            u (B, C) in [0, 2], 0 where unknown, and bool (B, C): known, that is present and of a class
            that has a prototype (and a rival, for ``margin``; and others to be placed among, for ``within_class``).
            u has the buffers' type: float32, float64 after ``.double()``.

        Raises:
            UgrlError: A doubt is missing.
        """
        return self.calibration(*self.plain_uncertainty(r_BCD, present_BC), doubts)

    @torch.no_grad()
    def plain_uncertainty(self, r_BCD: Tensor, present_BC: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`uncertainty`, of the prototypes alone: neither mixed nor placed."""
        self._check(r_BCD, present_BC)
        r_BCD = r_BCD.masked_fill(~present_BC[..., None], 0)
        if self.kind == "margin":
            rivals_BK = present_BC if self.against == "shown" else torch.ones_like(present_BC)
            u_BCK, known_BCK = self.margins(r_BCD, rivals_BK[:, None])
            known_BC = known_BCK.diagonal(dim1=1, dim2=2) & present_BC
            return u_BCK.diagonal(dim1=1, dim2=2).masked_fill(~known_BC, 0), known_BC
        if self._more:
            cosine_BC, known_BC = (x.diagonal(dim1=1, dim2=2) for x in self.cosines(r_BCD))
            known_BC = known_BC & present_BC
            return (1 - cosine_BC).masked_fill(~known_BC, 0), known_BC
        with full_precision(r_BCD):
            h_BCd = self.encode(r_BCD)
            lengths_BC = h_BCd.norm(dim=-1)
            lengths_C = self.prototypes_Cd.norm(dim=-1)
            dot_BC = torch.einsum("bcd,cd->bc", h_BCd, self.prototypes_Cd)
            cosine_BC = dot_BC / lengths_BC.clamp(min=TINY) / lengths_C.clamp(min=TINY)
            known_BC = present_BC & (lengths_BC > TINY) & (lengths_C > TINY)  # P is 0 until its first vote
            return (1 - cosine_BC.clamp(-1, 1)).masked_fill(~known_BC, 0), known_BC

    @torch.no_grad()
    def cosines(self, r_D: Tensor) -> tuple[Tensor, Tensor]:
        """cos(H, P_k) of any vectors (…, D) with every class: (…, C), 0 where unknown; and bool (…, C): known.

        Of several prototypes of a class, the nearest counts.
        """
        with full_precision(r_D):
            h_d = self.encode(r_D)
            length_1 = h_d.norm(dim=-1, keepdim=True)
            cosine_S, known_S = self._row_cosines(h_d / length_1.clamp(min=TINY))
            known_S = (length_1 > TINY) & known_S
            if not self._more:
                return cosine_S.masked_fill(~known_S, 0), known_S
            owner_S = self.owner_S.expand_as(cosine_S)
            lowest_C = torch.full_like(cosine_S[..., : len(self.counts_C)], -2)
            cosine_C = lowest_C.scatter_reduce(-1, owner_S, cosine_S.masked_fill(~known_S, -2), "amax")
            return cosine_C.masked_fill(cosine_C < -1, 0), cosine_C >= -1

    def _rows(self) -> Tensor:
        return torch.cat([self.prototypes_Cd, self.extra_Ed]) if self._more else self.prototypes_Cd

    def _row_cosines(self, unit_d: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of unit codes (…, d_cls) with every row, (…, S); and bool (S,), which rows have begun."""
        rows_Sd = self._rows()
        lengths_S = rows_Sd.norm(dim=-1)
        return (unit_d @ (rows_Sd / lengths_S.clamp(min=TINY)[:, None]).mT).clamp(-1, 1), lengths_S > TINY

    def margins(self, r_D: Tensor, rivals_C: Tensor) -> tuple[Tensor, Tensor]:
        """The margin u of any vectors, for every class that they could belong to.

        Args:
            r_D: Vectors (…, D).
            rivals_C: bool, the classes among which the best rival is sought; shape of the result, or one that expands.

        Returns:
            u (…, C) in [0, 2], 0 where unknown; and bool (…, C): known, that is the class and a rival have prototypes.
        """
        cosine_C, known_C = self.cosines(r_D)
        score_C = cosine_C.masked_fill(~(known_C & rivals_C), -torch.inf)
        # The best rival of a class is the best of all, but for that best one itself.
        top_2, at_2 = score_C.topk(min(2, score_C.shape[-1]), dim=-1)
        second_1 = top_2[..., 1:] if top_2.shape[-1] > 1 else torch.full_like(top_2, -torch.inf)
        itself_C = torch.arange(score_C.shape[-1], device=score_C.device) == at_2[..., :1]
        rival_C = torch.where(itself_C, second_1, top_2[..., :1])
        known_C = known_C & (rival_C > -torch.inf)
        return (1 + (rival_C - cosine_C) / 2).masked_fill(~known_C, 0), known_C

    @torch.no_grad()
    def position_uncertainty(self, f4_BDhw: Tensor, shown_BC: Tensor) -> tuple[Tensor, Tensor]:
        """The u of each position, if it belonged to each class: its feature stands for the class vector.

        Args:
            f4_BDhw: Features of the encoder's last stage.
            shown_BC: bool, the classes that the images show, background among them.

        Returns:
            u (B, C, h, w) in [0, 2], 0 where unknown, and bool of the same shape: known.
        """
        x_BND = f4_BDhw.to(self.mean_CD.dtype).flatten(2).mT
        if self.kind == "margin":
            rivals_BC = shown_BC if self.against == "shown" else torch.ones_like(shown_BC)
            u_BNC, known_BNC = self.margins(x_BND, rivals_BC[:, None])
        else:
            cosine_BNC, known_BNC = self.cosines(x_BND)
            u_BNC = (1 - cosine_BNC).masked_fill(~known_BNC, 0)
        grid = (f4_BDhw.shape[-2], f4_BDhw.shape[-1])
        return u_BNC.mT.unflatten(2, grid), known_BNC.mT.unflatten(2, grid)

    @torch.no_grad()
    def update(
        self,
        r_BCD: Tensor,
        present_BC: Tensor,
        f4_BDN: Tensor | None = None,
        labels_BN: Tensor | None = None,
        doubts: Doubts | None = None,
    ) -> None:
        """Bundle the votes of all ranks and move prototypes, means and σ (Eq. 4).

        P ← η P + (1 − η) P̂ for the classes of the global batch, P ← P̂ the first time; P̂ is the mean of
        the unit votes H/‖H‖. Every rank must call it, with the same B, whatever it has present.

        Args:
            r_BCD: Class vectors; not read where absent.
            present_BC: bool, which exist.
            f4_BDN: Features of the positions; where positions vote.
            labels_BN: int64, the class that each position votes for, or 255.
            doubts: Of everyone else who has a say in u.
        """
        self._check(r_BCD, present_BC)
        self.calibration.update(*self.plain_uncertainty(r_BCD, present_BC), doubts)
        with full_precision(r_BCD):
            r_BCD = r_BCD.to(self.phi_dD.dtype).masked_fill(~present_BC[..., None], 0)
            batch_mean_CD, n_C = mean_over_batch(r_BCD, present_BC)
            here_C = n_C > 0
            started = self.mean_seen_C.any()
            mean_CD = torch.where(started, self.mean_CD, batch_mean_CD)
            seen_C = torch.where(started, self.mean_seen_C, here_C)
            sigma = None
            if self.encoding == "fourier":
                sigma = self.sigma if self._settled else self._move_sigma(r_BCD, present_BC)

            if self.votes == "position":
                if f4_BDN is None or labels_BN is None:
                    raise UgrlError("prototypes: positions vote, but none were given")
                bundle_Sd, votes_S = self._position_votes(f4_BDN, labels_BN, (mean_CD, seen_C, sigma))
            else:
                h_BCd = self._encode(r_BCD, mean_CD, seen_C, sigma)
                lengths_BC = h_BCd.norm(dim=-1)
                votes_BC = present_BC & (lengths_BC > TINY)
                if sigma is not None:
                    votes_BC = votes_BC & (sigma > 0)
                unit_BCd = (h_BCd / lengths_BC.clamp(min=TINY)[..., None]).masked_fill(~votes_BC[..., None], 0)
                bundle_Sd, votes_S = mean_over_batch(unit_BCd, votes_BC)

            voted_S, counts_S = votes_S > 0, self._counts()
            eta = self._momentum(counts_S)[:, None] if self.debias else self.eta
            rows_Sd = _move(self._rows(), bundle_Sd, eta, counts_S > 0, voted_S)
            self.prototypes_Cd.copy_(rows_Sd[: len(self.counts_C)])
            self.counts_C.add_(voted_S[: len(self.counts_C)])
            if self._more:
                self.extra_Ed.copy_(rows_Sd[len(self.counts_C) :])
                self.extra_counts_E.add_(voted_S[len(self.counts_C) :])
            self.mean_CD.copy_(_move(self.mean_CD, batch_mean_CD, self.centre_momentum, self.mean_seen_C, here_C))
            self.mean_seen_C.logical_or_(here_C)

    @torch.no_grad()
    def freeze(self) -> None:
        """End of the classification warm-up: σ is final. Nothing to do for the linear encoding.

        Prototypes restart from the code of their class's running mean, since votes cast with another σ
        are in another code; counts stay. Without a σ yet, the first that a batch gives is final. Calling
        it again changes nothing.
        """
        if self.encoding == "linear" or bool(self.frozen):
            return
        self.frozen.fill_(True)
        self._settled = bool(self.sigma > 0)
        h_Cd = self.encode(self.mean_CD)
        lengths_C = h_Cd.norm(dim=-1)
        keep_C = (self.counts_C > 0) & (lengths_C > TINY)
        self.prototypes_Cd.copy_((h_Cd / lengths_C.clamp(min=TINY)[:, None]).masked_fill(~keep_C[:, None], 0))
        self.counts_C.masked_fill_(~keep_C, 0)

    def _code(self, r_D: Tensor, sigma: Tensor | None) -> Tensor:
        x_d = r_D @ self.phi_dD.mT
        if sigma is None:
            return x_d
        return torch.cos(x_d / sigma.where(sigma > 0, 1) + self.bias_d)

    def _encode(self, r_D: Tensor, mean_CD: Tensor, seen_C: Tensor, sigma: Tensor | None) -> Tensor:
        if not self.center:
            return self._code(r_D, sigma)
        share_C = seen_C.to(r_D.dtype) / seen_C.sum().clamp(min=1)
        if sigma is None:  # subtracting before Φ loses fewer digits than after
            return self._code(r_D - share_C @ mean_CD, None)
        return self._code(r_D, sigma) - share_C @ self._code(mean_CD, sigma)

    def _counts(self) -> Tensor:
        return torch.cat([self.counts_C, self.extra_counts_E]) if self._more else self.counts_C

    def _momentum(self, counts_S: Tensor) -> Tensor:
        """η of this batch for each row (S,), with which every batch so far has the weight that η gives its age."""
        eta_S = torch.full_like(counts_S, self.eta, dtype=self.prototypes_Cd.dtype)
        return eta_S * (1 - eta_S**counts_S) / (1 - eta_S ** (counts_S + 1))

    def _position_votes(
        self, f4_BDN: Tensor, labels_BN: Tensor, how: tuple[Tensor, Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """The mean unit code (S, d_cls) of the positions, over all ranks, that vote for each row; and their number.

        Args:
            f4_BDN: Features of the positions.
            labels_BN: Their classes, or 255.
            how: Means, which of them exist, and σ, as of this batch.
        """
        h_BNd = self._encode(f4_BDN.to(self.phi_dD.dtype).mT, *how)
        lengths_BN1 = h_BNd.norm(dim=-1, keepdim=True)
        unit_BNd = h_BNd / lengths_BN1.clamp(min=TINY)
        valid_BN = (labels_BN != IGNORE) & (lengths_BN1[..., 0] > TINY)
        if how[2] is not None:
            valid_BN = valid_BN & (how[2] > 0)
        class_BN = labels_BN.where(valid_BN, 0)
        row_BN = class_BN
        if self._more:
            n = labels_BN.shape[1]
            strip_BN = torch.arange(n, device=class_BN.device) * self.number_C[class_BN] // n
            own_BNS = self.owner_S == class_BN[..., None]
            begun_C = torch.ones_like(self.counts_C).scatter_reduce(0, self.owner_S, self._counts(), "amin") > 0
            cosine_BNS, _ = self._row_cosines(unit_BNd)
            nearest_BN = cosine_BNS.masked_fill(~own_BNS, -2).argmax(-1)
            first_BN = (own_BNS & (self.turn_S == strip_BN[..., None])).to(torch.uint8).argmax(-1)
            row_BN = torch.where(begun_C[class_BN], nearest_BN, first_BN)
        rows = len(self.owner_S)
        sums = unit_BNd.new_zeros(rows + 1, unit_BNd.shape[-1] + 1)
        ones_BN1 = torch.ones_like(lengths_BN1)
        at = row_BN.where(valid_BN, rows).flatten()
        sums.index_add_(0, at, torch.cat([unit_BNd, ones_BN1], -1).flatten(0, 1))
        sums = all_reduce_sum(sums[:rows].contiguous())
        return sums[:, :-1] / sums[:, -1:].clamp(min=1), sums[:, -1]

    def _move_sigma(self, r_BCD: Tensor, present_BC: Tensor) -> Tensor:
        """Let σ follow this batch; returns the one to encode this batch with: the one before, if any."""
        rows_MD = all_gather_rows(r_BCD.flatten(0, 1))  # absent rows are the padding that makes ranks equal
        valid_M = all_gather_rows(present_BC.flatten().to(torch.uint8)) > 0
        batch = _median_distance(rows_MD, valid_M)
        known = self.sigma > 0
        moved = self.centre_momentum * self.sigma + (1 - self.centre_momentum) * batch
        moved = self.sigma.where(self.frozen | (batch == 0), moved)
        used = torch.where(known, self.sigma, batch)
        self.sigma.copy_(torch.where(known, moved, batch))
        return used

    def _check(self, r_BCD: Tensor, present_BC: Tensor) -> None:
        if r_BCD.shape[1:] != self.mean_CD.shape or present_BC.shape != r_BCD.shape[:2]:
            got = f"{tuple(r_BCD.shape)} and {tuple(present_BC.shape)}"
            raise UgrlError(f"class vectors: shapes {got}, expected (B, {', '.join(map(str, self.mean_CD.shape))})")


def _check_word(name: str, word: str, allowed: tuple[str, str]) -> None:
    """Raise where a word is neither of the two that are allowed."""
    if word not in allowed:
        raise ConfigError(f"{name}: {word!r}, expected {allowed[0]!r} or {allowed[1]!r}")


def _after_load(module: nn.Module, _: object) -> None:
    assert isinstance(module, Prototypes)
    module._settled = module.encoding == "linear" or bool(module.frozen & (module.sigma > 0))


def _move(old_CD: Tensor, new_CD: Tensor, momentum: float | Tensor, had_C: Tensor, here_C: Tensor) -> Tensor:
    """EMA of the rows that are here, a copy where there was none before."""
    moved_CD = torch.where(had_C[:, None], momentum * old_CD + (1 - momentum) * new_CD, new_CD)
    return torch.where(here_C[:, None], moved_CD, old_CD)


def _median_distance(x_MD: Tensor, valid_M: Tensor) -> Tensor:
    """Median ‖x_i − x_j‖ over pairs of different valid rows; 0 without a pair."""
    # The matrix-product form of cdist cancels for rows that share a large common part.
    distance_MM = torch.cdist(x_MD, x_MD, compute_mode="donot_use_mm_for_euclid_dist")
    pair_MM = (valid_M[:, None] & valid_M).triu(diagonal=1)
    ascending = distance_MM.masked_fill(~pair_MM, torch.inf).flatten().sort().values
    n = pair_MM.sum()
    middle_2 = torch.stack([(n - 1).clamp(min=0) // 2, n // 2])
    return ascending.gather(0, middle_2).mean().where(n > 0, 0)
