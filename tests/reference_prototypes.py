"""Prototypes, their u, and the doubts that are mixed with it, in float64 loops (Eqs. 3 to 5 as implemented)."""

from __future__ import annotations

import math

import numpy as np


def cosine_of(x, y):
    """Cosine of two non-zero vectors."""
    return math.fsum(a * b for a, b in zip(x, y, strict=True)) / (length_of(x) * length_of(y))


def length_of(x):
    """Euclidean length."""
    return math.sqrt(math.fsum(a * a for a in x))


def mean_of(vectors):
    """Mean of a non-empty list of vectors."""
    return [math.fsum(v[k] for v in vectors) / len(vectors) for k in range(len(vectors[0]))]


def followed(old, rows, eta):
    """Number and running means, after rows of further values."""
    if not rows:
        return old
    n = old[0] + len(rows)
    share = max(len(rows) / n, 1 - eta)
    return (n, *(m + share * (math.fsum(x) / len(rows) - m) for m, x in zip(old[1:], np.transpose(rows), strict=True)))


def aligned(u, x, moments):
    """A doubt x, moved and scaled to u's mean and deviation; u where nothing is known."""
    n, mean, square, x_mean, x_square = moments
    if math.isnan(x) or n < 2 or x_square - x_mean * x_mean <= 1e-12:
        return u
    return mean + math.sqrt(max(0.0, square - mean * mean) / (x_square - x_mean * x_mean)) * (x - x_mean)


def overlap_doubt_loops(probs, cam, classes, box, factor):
    """1 − Σ min / Σ max of the decoder's probabilities (C, h, w) and the CAM of an image's classes, at ``factor`` times
    the grid; by class, None where not shown."""
    C, h, w = probs.shape
    y0, y1, x0, x1 = box
    low, high = dict.fromkeys([0, *(f + 1 for f in classes)], 0.0), dict.fromkeys([0, *(f + 1 for f in classes)], 0.0)
    for y in range(h):
        for x in range(w):
            if not (y0 <= (y + 0.5) * factor < y1 and x0 <= (x + 0.5) * factor < x1):
                continue
            rows, columns = slice(y * factor, (y + 1) * factor), slice(x * factor, (x + 1) * factor)
            means = {f + 1: float(np.mean(plane[rows, columns])) for f, plane in zip(classes, cam, strict=True)}
            for c, m in {0: 1 - max(means.values(), default=0.0), **means}.items():
                low[c] += min(m, probs[c][y][x])
                high[c] += max(m, probs[c][y][x])
    return [1 - low[c] / high[c] if c in low and high[c] > 0 else math.nan for c in range(C)]


class PrototypesByLoop:
    """Eqs. 3 to 5 as implemented; ``None`` stands for whatever does not exist yet."""

    def __init__(
        self,
        phi_dD,
        bias_d,
        C,
        *,
        eta,
        center,
        centre_momentum,
        kind="distance",
        against="all",
        debias=False,
        within_class=False,
        weights=None,
        votes="class",
        several=(1, 1),
    ):
        self.votes, self.several = votes, [several[0]] + [several[1]] * (C - 1)
        # Second and further prototypes of each class, and how many batches moved each.
        self.more = [[None] * (n - 1) for n in self.several]
        self.more_counts = [[0] * (n - 1) for n in self.several]
        self.kind, self.against, self.debias, self.within_class = kind, against, debias, within_class
        self.moments = [(0, 0.0, 0.0)] * C  # pairs, mean of u, mean of u²
        self.weights = weights or {}
        self.doubts = dict.fromkeys(self.weights, (0, 0.0, 0.0, 0.0, 0.0))  # pairs, means of u, u², x, x²
        self.phi, self.bias, self.eta, self.center, self.momentum = phi_dD, bias_d, eta, center, centre_momentum
        self.prototypes, self.counts, self.means = [None] * C, [0] * C, [None] * C
        self.sigma, self.frozen = None, False

    def code(self, r, sigma):
        x = [math.fsum(a * b for a, b in zip(row, r, strict=True)) for row in self.phi]
        if self.bias is None:
            return x
        return [math.cos(v / sigma + b) for v, b in zip(x, self.bias, strict=True)]

    def encode(self, r, means, sigma):
        h = self.code(r, sigma)
        seen = [m for m in means if m is not None]
        if self.center and seen:
            centre = mean_of([self.code(m, sigma) for m in seen])
            h = [a - b for a, b in zip(h, centre, strict=True)]
        return h

    def cosine(self, r, c):
        """With the nearest prototype of a class."""
        code = self.encode(r, self.means, self.sigma)
        return max(cosine_of(code, p) for p in [self.prototypes[c], *self.more[c]] if p is not None)

    def position_votes(self, f4_BDN, labels_BN, means, sigma):
        """Unit codes of the positions, by class and prototype."""
        votes = [[[] for _ in range(n)] for n in self.several]
        B, _, N = f4_BDN.shape
        for b in range(B):
            for n in range(N):
                c = labels_BN[b][n]
                code = [] if c == 255 else self.encode(f4_BDN[b, :, n], means, sigma)
                if not code or length_of(code) == 0:
                    continue
                mine = [self.prototypes[c], *self.more[c]]
                if any(p is None for p in mine):
                    k = n * self.several[c] // N  # strips from top to bottom
                else:
                    k = int(np.argmax([cosine_of(code, p) for p in mine]))
                votes[c][k].append([x / length_of(code) for x in code])
        return votes

    def judge(self, r, c, shown):
        """u of a vector as one of class c, in an image that shows some classes; None without it."""
        if self.prototypes[c] is None:
            return None
        if self.kind == "distance":
            return 1 - self.cosine(r, c)
        rivals = [k for k in range(len(self.prototypes)) if k != c and self.prototypes[k] is not None]
        if self.against == "shown":
            rivals = [k for k in rivals if shown[k]]
        if not rivals:
            return None
        return 1 + (max(self.cosine(r, k) for k in rivals) - self.cosine(r, c)) / 2

    def judgements(self, r_BCD, present_BC):
        B, C = present_BC.shape
        pairs = {
            (b, c): self.judge(r_BCD[b][c], c, present_BC[b]) for b in range(B) for c in range(C) if present_BC[b][c]
        }
        return {pair: u for pair, u in pairs.items() if u is not None}

    def doubted(self, found, doubts):
        """The u of pairs, by pair, with what the others say."""
        out = dict(found)
        for name, weight in self.weights.items():
            for pair, u in found.items():
                out[pair] += weight * (aligned(u, doubts[name][pair], self.doubts[name]) - u)
        return {pair: min(2.0, max(0.0, u)) for pair, u in out.items()}

    def uncertainty(self, r_BCD, present_BC, doubts=None):
        B, C = present_BC.shape
        u, known = np.zeros((B, C)), np.zeros((B, C), dtype=bool)
        for (b, c), value in self.doubted(self.judgements(r_BCD, present_BC), doubts).items():
            if self.within_class:
                n, mean, square = self.moments[c]
                variance = square - mean * mean
                if n < 2 or variance <= 1e-12:
                    continue
                value = 1 + math.erf((value - mean) / math.sqrt(2 * variance))
            u[b][c], known[b][c] = value, True
        return u, known

    def update(self, r_BCD, present_BC, f4_BDN=None, labels_BN=None, doubts=None):
        B, C = present_BC.shape
        found = self.judgements(r_BCD, present_BC)
        for c in range(C):
            values = [u for (_, k), u in self.doubted(found, doubts).items() if k == c]
            self.moments[c] = followed(self.moments[c], [(u, u * u) for u in values], self.eta)
        for name in self.weights:
            rows = [(u, u * u, doubts[name][k], doubts[name][k] ** 2) for k, u in found.items()]
            rows = [row for row in rows if not math.isnan(row[2])]
            self.doubts[name] = followed(self.doubts[name], rows, self.eta)
        rows = [[r_BCD[b][c] for b in range(B) if present_BC[b][c]] for c in range(C)]
        batch_means = [mean_of(rows[c]) if rows[c] else None for c in range(C)]
        means = list(self.means) if any(m is not None for m in self.means) else batch_means
        sigma = self.sigma
        if self.bias is not None:
            flat = [r for c in range(C) for r in rows[c]]
            distances = [length_of(np.subtract(x, y)) for i, x in enumerate(flat) for y in flat[:i]]
            batch = float(np.median(distances)) if distances else None
            sigma = batch if self.sigma is None else self.sigma
            if self.sigma is None:
                self.sigma = batch
            elif not self.frozen and batch is not None:
                self.sigma = self.momentum * self.sigma + (1 - self.momentum) * batch
        if self.votes == "position":
            for c, by_row in enumerate(self.position_votes(f4_BDN, labels_BN, means, sigma)):
                for k, votes in enumerate(by_row):
                    if votes:
                        self.bundle(votes, c, k)
        for c in range(C):
            if not rows[c]:
                continue
            votes = []
            if self.votes == "class" and (self.bias is None or sigma is not None):
                codes = [self.encode(r, means, sigma) for r in rows[c]]
                votes = [[x / length_of(h) for x in h] for h in codes if length_of(h) > 0]
            if votes:
                self.bundle(votes, c, 0)
            old = self.means[c]
            self.means[c] = batch_means[c] if old is None else self.moved(old, batch_means[c], self.momentum)

    def bundle(self, votes, c, k):
        """Eq. 4 for prototype k of class c."""
        prototypes, counts, at = (
            (self.prototypes, self.counts, c) if k == 0 else (self.more[c], self.more_counts[c], k - 1)
        )
        old, new, eta, n = prototypes[at], mean_of(votes), self.eta, counts[at]
        if self.debias and old is not None:  # the weights η^age of all batches so far, made to sum to 1
            eta = math.fsum(eta**j for j in range(1, n + 1)) / math.fsum(eta**j for j in range(n + 1))
        prototypes[at] = new if old is None else self.moved(old, new, eta)
        counts[at] += 1

    def moved(self, old, new, momentum):
        return [momentum * a + (1 - momentum) * b for a, b in zip(old, new, strict=True)]

    def freeze(self):
        if self.bias is None or self.frozen:
            return
        self.frozen = True
        for c, prototype in enumerate(self.prototypes):
            if prototype is not None:
                h = self.encode(self.means[c], self.means, self.sigma)
                self.prototypes[c] = [x / length_of(h) for x in h]
