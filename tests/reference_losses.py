"""The losses and the reliable pool as float64 Python loops, straight from the equations.

Arrays are nested sequences or NumPy arrays; ``numeric_gradient`` is what gradients are held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

IGNORED = 255


def numeric_gradient(f: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of fourth order."""
    grad = np.zeros_like(x, dtype=np.float64)
    for index in np.ndindex(*x.shape):
        values = []
        for k in (-2, -1, 1, 2):
            moved = x.copy()
            moved[index] += k * step
            values.append(f(moved))
        grad[index] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
    return grad


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def classification_loss_loops(logits, tags, w) -> float:
    total, n = 0.0, 0
    for b in range(len(logits)):
        for f in range(len(logits[b])):
            x = float(logits[b][f])
            if tags[b][f] == 1:
                total += float(w[b][f]) * softplus(-x)  # −log σ(x)
            else:
                total += softplus(x)  # −log(1 − σ(x))
            n += 1
    return total / n if n else 0.0


def bilinear_loops(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) → size with align_corners=False: pixel centres, borders repeated."""
    h, w = image.shape
    out = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            sy = max((y + 0.5) * h / size[0] - 0.5, 0.0)
            sx = max((x + 0.5) * w / size[1] - 0.5, 0.0)
            y0, x0 = min(int(sy), h - 1), min(int(sx), w - 1)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            fy, fx = sy - y0, sx - x0
            top = (1 - fx) * image[y0, x0] + fx * image[y0, x1]
            bottom = (1 - fx) * image[y1, x0] + fx * image[y1, x1]
            out[y, x] = (1 - fy) * top + fy * bottom
    return out


def segmentation_loss_loops(seg: np.ndarray, labels: np.ndarray, w: np.ndarray, balance: str = "none") -> float:
    sums, counts = {"bg": 0.0, "fg": 0.0}, {"bg": 0, "fg": 0}
    for b in range(len(seg)):
        up = [bilinear_loops(seg[b, c], labels.shape[1:]) for c in range(seg.shape[1])]
        for y, x in np.ndindex(*labels.shape[1:]):
            label = int(labels[b, y, x])
            if label == IGNORED:
                continue
            logits = [float(u[y, x]) for u in up]
            top = max(logits)
            lse = top + math.log(sum(math.exp(v - top) for v in logits))
            kind = "fg" if label else "bg"
            sums[kind] += float(w[b, label]) * (lse - logits[label])
            counts[kind] += 1
    if balance == "none":
        n = counts["bg"] + counts["fg"]
        return (sums["bg"] + sums["fg"]) / n if n else 0.0
    return sum(0.5 * sums[k] / counts[k] for k in ("bg", "fg") if counts[k])


def affinity_loss_loops(affinity: np.ndarray, labels: np.ndarray, eligible: np.ndarray, radius: int = 8) -> float:
    same, different = [], []
    h, w = labels.shape[1:]
    for b in range(len(labels)):
        for i in range(h * w):
            for j in range(h * w):
                (yi, xi), (yj, xj) = divmod(i, w), divmod(j, w)
                if i == j or max(abs(yi - yj), abs(xi - xj)) > radius:
                    continue
                if not (eligible[b, yi, xi] and eligible[b, yj, xj]):
                    continue
                li, lj = int(labels[b, yi, xi]), int(labels[b, yj, xj])
                if IGNORED in (li, lj):
                    continue
                p = sigmoid(float(affinity[b, i, j]))
                if li == lj:
                    same.append(1.0 - p)
                else:
                    different.append(p)
    return sum(0.5 * sum(kind) / len(kind) for kind in (same, different) if kind)


def sample_nearest_loops(x: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    H, W = x.shape
    return np.array(
        [[x[math.floor((i + 0.5) * H / grid[0]), math.floor((j + 0.5) * W / grid[1])] for j in range(grid[1])]
         for i in range(grid[0])]
    )  # fmt: skip


def contrastive_loss_loops(
    emb: np.ndarray, labels: np.ndarray, pool: np.ndarray, tau: float, scope: str = "image"
) -> float:
    """emb (B, D, h, w): mean over anchors of log Σ_{j≠i} e^{s_ij/τ} − log Σ_{j≠i, same} e^{s_ij/τ}."""
    anchors = [
        (b, int(labels[b, y, x]), emb[b, :, y, x])
        for b, y, x in np.ndindex(*labels.shape)
        if pool[b, y, x] and labels[b, y, x] != IGNORED
    ]
    total, n = 0.0, 0
    for i, (image, label, vector) in enumerate(anchors):
        every, positive = [], []
        for j, (other_image, other_label, other) in enumerate(anchors):
            if i == j or (scope == "image" and image != other_image):
                continue
            s = sum(float(p) * float(q) for p, q in zip(vector, other, strict=True)) / tau
            every.append(s)
            if label == other_label:
                positive.append(s)
        if not positive:
            continue
        top = max(every)
        high = max(positive)
        lse_all = top + math.log(sum(math.exp(s - top) for s in every))
        lse_pos = high + math.log(sum(math.exp(s - high) for s in positive))
        total += lse_all - lse_pos
        n += 1
    return total / n if n else 0.0


def stratified_quota_loops(areas: list[int], u: list[float], budget: int) -> list[int]:
    """Bounded proportional shares by bisection on the level, then largest remainders."""
    present = [c for c in range(len(areas)) if areas[c]]
    least = {c: min(2, areas[c]) for c in present}
    total = max(budget, sum(least.values()))

    def shares(level: float) -> dict[int, float]:
        return {c: min(max(level * areas[c] * math.exp(-u[c]), least[c]), areas[c]) for c in present}

    low, high = 0.0, 2.0 * max((math.exp(u[c]) for c in present), default=1.0)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(shares(middle).values()) < total:
            low = middle
        else:
            high = middle
    exact = {c: round(s * 2**20) / 2**20 for c, s in shares(high).items()}
    quota = {c: math.floor(s) for c, s in exact.items()}
    missing = total - sum(quota.values())
    open_classes = [c for c in present if quota[c] < areas[c]]
    for c in sorted(open_classes, key=lambda c: (-(exact[c] - quota[c]), c))[:missing]:
        quota[c] += 1
    return [quota.get(c, 0) for c in range(len(areas))]


def reliable_pool_loops(
    labels: np.ndarray, u: np.ndarray, conf: np.ndarray, keep: float, kind: str, ties: np.ndarray
) -> np.ndarray:
    """labels, conf and ties (seeded uniform numbers) (B, h, w)."""
    pool = np.zeros(labels.shape, dtype=bool)
    for b in range(len(labels)):
        valid = [p for p in np.ndindex(*labels.shape[1:]) if labels[b][p] != IGNORED]
        if not valid:
            continue
        budget = min(max(math.floor(keep * len(valid) + 0.5), 1), len(valid))
        if kind == "stratified":
            members = {c: [p for p in valid if labels[b][p] == c] for c in range(u.shape[1])}
            quota = stratified_quota_loops([len(m) for m in members.values()], [float(v) for v in u[b]], budget)
            chosen = [
                p for c, m in members.items() for p in sorted(m, key=lambda p: (-conf[b][p], ties[b][p]))[: quota[c]]
            ]
        elif kind == "ranked":
            chosen = sorted(valid, key=lambda p: (u[b, labels[b][p]], ties[b][p]))[:budget]
        else:
            chosen = sorted(valid, key=lambda p: ties[b][p])[:budget]
        for p in chosen:
            pool[b][p] = True
    return pool
