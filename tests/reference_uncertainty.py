"""Eqs. 2 to 8 as float64 Python loops: as implemented, and as printed."""

from __future__ import annotations

import math

import numpy as np


def class_position_maps(cam_BFN, inside_BN):
    """Row 0 is 1 − max_c M_c, the others M_c; padding is 0."""
    B, F, N = cam_BFN.shape
    m = np.zeros((B, F + 1, N))
    for b in range(B):
        for p in range(N):
            if inside_BN[b][p]:
                m[b][0][p] = 1 - max(cam_BFN[b][f][p] for f in range(F))
                for f in range(F):
                    m[b][f + 1][p] = cam_BFN[b][f][p]
    return m


def local_affinity_rows(logits_BNN, grid, radius, inside_BN=None):
    """Sigmoid within the radius and the box, rows divided by their sum."""
    B, N, _ = logits_BNN.shape
    w = grid[1]
    a = np.zeros((B, N, N))
    for b in range(B):
        for p in range(N):
            for q in range(N):
                far = max(abs(p // w - q // w), abs(p % w - q % w)) > radius
                outside = inside_BN is not None and not (inside_BN[b][p] and inside_BN[b][q])
                a[b][p][q] = 0.0 if far or outside else 1 / (1 + math.exp(-logits_BNN[b][p][q]))
            total = math.fsum(a[b][p])
            for q in range(N):
                a[b][p][q] = a[b][p][q] / total if total > 0 else 0.0
    return a


def class_vectors_under_maps(f4_BDN, m_BCN, tags_BF, ahat_BNN=None):
    """Eqs. 2 and 3 with a vector: r_c = Σ ω F4, ω_c ∝ Â·M_c."""
    B, D, N = f4_BDN.shape
    C = m_BCN.shape[1]
    r = np.zeros((B, C, D))
    present = np.zeros((B, C), dtype=bool)
    for b in range(B):
        for c in range(C):
            omega = list(m_BCN[b][c])
            if ahat_BNN is not None:
                omega = [math.fsum(ahat_BNN[b][p][q] * m_BCN[b][c][q] for q in range(N)) for p in range(N)]
            mass = math.fsum(omega)
            present[b][c] = (c == 0 or tags_BF[b][c - 1] > 0) and mass >= 1e-6
            if present[b][c]:
                for d in range(D):
                    r[b][c][d] = math.fsum(omega[p] / mass * f4_BDN[b][d][p] for p in range(N))
    return r, present


def printed_class_scalars(f4_BDN, m_BCN):
    """Eqs. 2 and 3 as printed: one scalar f_c per class, the features' mean under its map."""
    B, D, N = f4_BDN.shape
    f = np.zeros((B, m_BCN.shape[1]))
    for b in range(B):
        for c in range(m_BCN.shape[1]):
            f[b][c] = math.fsum(m_BCN[b][c][p] * f4_BDN[b][d][p] for p in range(N) for d in range(D)) / (N * D)
    return f


def printed_uncertainty(f_BC, phi_Cd):
    """Eqs. 3 to 5 as printed: H_c = f_c Φ_c, P_c = Σ_images H_c, u = 1 − cos(H_c, P_c)."""
    B, C = f_BC.shape
    u = np.zeros((B, C))
    for c in range(C):
        codes = [[f_BC[b][c] * x for x in phi_Cd[c]] for b in range(B)]
        bundle = [math.fsum(code[k] for code in codes) for k in range(len(phi_Cd[c]))]
        for b in range(B):
            u[b][c] = 1 - cosine_of(codes[b], bundle)
    return u


def cosine_of(x, y):
    """Cosine of two non-zero vectors."""
    return math.fsum(a * b for a, b in zip(x, y, strict=True)) / (length_of(x) * length_of(y))


def length_of(x):
    """Euclidean length."""
    return math.sqrt(math.fsum(a * a for a in x))


def mean_of(vectors):
    """Mean of a non-empty list of vectors."""
    return [math.fsum(v[k] for v in vectors) / len(vectors) for k in range(len(vectors[0]))]


class PrototypesByLoop:
    """Eqs. 3 to 5 as implemented; ``None`` stands for whatever does not exist yet."""

    def __init__(self, phi_dD, bias_d, C, *, eta, center, centre_momentum):
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

    def uncertainty(self, r_BCD, present_BC):
        B, C = present_BC.shape
        u, known = np.zeros((B, C)), np.zeros((B, C), dtype=bool)
        for b in range(B):
            for c in range(C):
                if present_BC[b][c] and self.prototypes[c] is not None:
                    u[b][c] = 1 - cosine_of(self.encode(r_BCD[b][c], self.means, self.sigma), self.prototypes[c])
                    known[b][c] = True
        return u, known

    def update(self, r_BCD, present_BC):
        B, C = present_BC.shape
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
        for c in range(C):
            if not rows[c]:
                continue
            votes = []
            if self.bias is None or sigma is not None:
                codes = [self.encode(r, means, sigma) for r in rows[c]]
                votes = [[x / length_of(h) for x in h] for h in codes if length_of(h) > 0]
            if votes:
                old, new = self.prototypes[c], mean_of(votes)
                self.prototypes[c] = new if old is None else self.moved(old, new, self.eta)
                self.counts[c] += 1
            old = self.means[c]
            self.means[c] = batch_means[c] if old is None else self.moved(old, batch_means[c], self.momentum)

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


def modulation_weights_by_loop(u_BC, known_BC, n_BC, *, strength, kind, per_class, u_min, bound):
    """Eqs. 6 to 8 as implemented: centred, bounded, normalised log-weights."""
    B, C = u_BC.shape
    w = np.ones((B, C))
    if kind == "none":
        return w
    for group in weight_groups(known_BC, n_BC, per_class):
        logs = {}
        for b, c in group:
            u = u_BC[b][c]
            logs[b, c] = 1 / (strength * max(u, u_min)) if kind == "inverse_exp" else -strength * u
        N = math.fsum(n_BC[b][c] for b, c in group)
        centre = math.fsum(n_BC[e[0]][e[1]] * logs[e] for e in group) / N
        limit = math.log(bound)
        raw = {e: math.exp(min(limit, max(-limit, logs[e] - centre))) for e in group}
        total = math.fsum(n_BC[e[0]][e[1]] * raw[e] for e in group)
        for b, c in group:
            w[b][c] = N * raw[b, c] / total
    return w


def weight_groups(known_BC, n_BC, per_class):
    """The non-empty groups of entries that are normalised together."""
    B, C = known_BC.shape
    weighed = [(b, c) for b in range(B) for c in range(C) if known_BC[b][c] and n_BC[b][c] > 0]
    groups = [[e for e in weighed if e[1] == c] for c in range(C)] if per_class else [weighed]
    return [g for g in groups if g]


def effective_share_by_loop(w_BC, known_BC, n_BC, per_class):
    """(Σŵ)²/(N·Σŵ²), classes averaged by their N; 1 without entries."""
    worth, total = 0.0, 0.0
    for group in weight_groups(known_BC, n_BC, per_class):
        s = math.fsum(n_BC[b][c] * w_BC[b][c] for b, c in group)
        q = math.fsum(n_BC[b][c] * w_BC[b][c] ** 2 for b, c in group)
        worth += s * s / q
        total += math.fsum(n_BC[b][c] for b, c in group)
    return worth / total if total else 1.0


def printed_modulation_weight(u, strength):
    """The factor e^{1/(strength·u)} of Eqs. 6 and 8 as printed, in the float32 that training uses."""
    with np.errstate(over="ignore"):
        return np.exp(np.float32(1 / (strength * u)))


def printed_classification_loss(logits_F, tags_F, u_F, alpha):
    """Eq. 6 as printed for one image: the log terms without their minus sign."""
    total = np.float32(0)
    for x, y, u in zip(logits_F, tags_F, u_F, strict=True):
        p = 1 / (1 + math.exp(-x))
        total += printed_modulation_weight(u, alpha) * np.float32(y * math.log(p) + (1 - y) * math.log(1 - p))
    return total / np.float32(len(logits_F))


def printed_segmentation_loss(logits_CN, labels_N, u_C, beta):
    """Eqs. 7 and 8 as printed for one image: u_seg[p] = u_cls[Y_p], no minus sign, 255 left out."""
    C, N = logits_CN.shape
    total, valid = np.float32(0), 0
    for p in range(N):
        if labels_N[p] != 255:
            log_z = math.log(math.fsum(math.exp(logits_CN[c][p]) for c in range(C)))
            log_p = np.float32(logits_CN[labels_N[p]][p] - log_z)
            total += printed_modulation_weight(u_C[labels_N[p]], beta) * log_p
            valid += 1
    return total / np.float32(max(valid, 1))
