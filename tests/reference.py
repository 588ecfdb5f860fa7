"""Every equation of the method as float64 Python loops: slow, and easy to check by eye.

In the order in which an image meets them: CAM, pseudo-labels and PAR; class vectors, prototypes, uncertainty
and weights (Eqs. 2 to 8, as implemented and as printed); the losses and the reliable pool (Eqs. 9 to 12).
Arrays are nested sequences or NumPy arrays; ``numeric_gradient`` is what gradients are held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tests.reference_prototypes import cosine_of

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


def bilinear_loops(image, size: tuple[int, int]) -> np.ndarray:
    """(h, w) → size with align_corners=False: pixel centres, borders repeated."""
    image = np.asarray(image, dtype=np.float64)
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


def ref_mirror(plane):
    return [row[::-1] for row in plane]


def ref_multi_scale_cam(forward, image, classes, box, scales, mirror):
    """CAMs of one image: ``forward(list of 3 planes) -> list of F planes``; returns one plane per class."""
    height, width = len(image[0]), len(image[0][0])
    out = []
    for f in classes:
        total = [[0.0] * width for _ in range(height)]
        for scale in scales:
            size = (round(height * scale), round(width * scale))
            small = [bilinear_loops(plane, size) for plane in image]
            plain = bilinear_loops(forward(small)[f], (height, width))
            if mirror:
                other = forward([ref_mirror(plane) for plane in small])[f]
                other = ref_mirror(bilinear_loops(other, (height, width)))
            for y in range(height):
                for x in range(width):
                    value = max(plain[y][x], other[y][x]) if mirror else plain[y][x]
                    total[y][x] += max(0.0, value)
        out.append(ref_normalise(total, box))
    return out


def ref_normalise(plane, box):
    y0, y1, x0, x1 = box
    values = [plane[y][x] for y in range(y0, y1) for x in range(x0, x1)]
    out = [[0.0] * len(plane[0]) for _ in plane]
    for y in range(y0, y1):
        for x in range(x0, x1):
            out[y][x] = (plane[y][x] - min(values)) / (max(values) - min(values) + 1e-5)
    return out


def ref_pseudo_labels(planes, classes, box, size, high, low):
    """Labels and confidence of one image from its present classes' CAMs."""
    labels = [[255] * size[1] for _ in range(size[0])]
    conf = [[0.0] * size[1] for _ in range(size[0])]
    for y in range(box[0], box[1]):
        for x in range(box[2], box[3]):
            best, best_class = 0.0, None
            for plane, f in zip(planes, classes, strict=True):
                if best_class is None or plane[y][x] > best:
                    best, best_class = plane[y][x], f
            if best_class is not None and best > high:
                labels[y][x], conf[y][x] = best_class + 1, best - high
            elif best <= low:
                labels[y][x], conf[y][x] = 0, low - best
    return labels, conf


def ref_random_walk(cam, ahat, beta):
    """One map of N values along an N x N affinity."""
    count = len(cam)
    walk = []
    for i in range(count):
        row = [ahat[i][j] ** beta for j in range(count)]
        total = sum(row)
        walk.append([v / total if total > 0 else 0.0 for v in row])
    return [sum(walk[i][j] * cam[j] for j in range(count)) for i in range(count)]


def ref_par(image, masks, iterations, dilations, w1, w2):
    """PAR of one image: lists of channel planes and of mask planes."""
    height, width, channels = len(image[0]), len(image[0][0]), len(image)
    offsets = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]

    def softmax(values):
        top = max(values)
        weights = [math.exp(v - top) for v in values]
        return [w / math.fsum(weights) for w in weights]

    def std(values):
        mean = math.fsum(values) / len(values)
        return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))

    def around(plane, y, x):
        return [plane[min(max(y + dy, 0), height - 1)][min(max(x + dx, 0), width - 1)] for dy, dx in offsets]

    far = [math.sqrt(dy * dy + dx * dx) for dy, dx in offsets]
    position = softmax([-((v / (std(far) + 1e-8) / w1) ** 2) for v in far])
    weights = [[None] * width for _ in range(height)]
    for y in range(height):
        for x in range(width):
            energy = [0.0] * len(offsets)
            for plane in image:
                near = around(plane, y, x)
                spread = std(near)
                for n, value in enumerate(near):
                    energy[n] -= (abs(value - plane[y][x]) / (spread + 1e-8) / w1) ** 2 / channels
            colour = softmax(energy)
            weights[y][x] = [c + w2 * p for c, p in zip(colour, position, strict=True)]
    for _ in range(iterations):
        masks = [
            [
                [sum(a * b for a, b in zip(weights[y][x], around(mask, y, x), strict=True)) for x in range(width)]
                for y in range(height)
            ]
            for mask in masks
        ]
    return masks


def ref_refine_labels(planes, classes, box, image, high, low, par):
    """AFA's two PAR runs for one image, background refined like any class; labels and log-margin confidence."""
    y0, y1, x0, x1 = box
    height, width = len(image[0]), len(image[0][0])
    labels = [[255] * width for _ in range(height)]
    conf = [[0.0] * width for _ in range(height)]

    def cut(plane):
        return [row[x0:x1] for row in plane[y0:y1]]

    size = (y1 - y0, x1 - x0)
    half = (max(1, size[0] // 2), max(1, size[1] // 2))
    small = [bilinear_loops(cut(plane), half) for plane in image]
    runs = []
    for score in (high, low):
        channels = [[[score] * half[1] for _ in range(half[0])]]
        channels += [bilinear_loops(cut(plane), half) for plane in planes]
        for y in range(half[0]):
            for x in range(half[1]):
                exps = [math.exp(c[y][x]) for c in channels]
                for c, e in zip(channels, exps, strict=True):
                    c[y][x] = e / math.fsum(exps)
        runs.append([bilinear_loops(m, size) for m in ref_par(small, channels, *par)])
    for y in range(size[0]):
        for x in range(size[1]):
            first = [c[y][x] for c in runs[0]]
            second = [c[y][x] for c in runs[1]]
            a, b = first.index(max(first)), second.index(max(second))
            if a > 0:
                labels[y + y0][x + x0] = classes[a - 1] + 1
                conf[y + y0][x + x0] = math.log(first[a]) - math.log(first[0])
            elif b == 0:
                labels[y + y0][x + x0] = 0
                conf[y + y0][x + x0] = math.log(second[0]) - math.log(max(second[1:])) if classes else low
    return labels, conf


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


def pixel_weights_by_loop(u, known, labels, *, strength, kind, u_min, bound):
    """Eq. 8 with a u of each pixel: as :func:`modulation_weights_by_loop` with each pixel an entry of its class."""
    flat = [(float(a), bool(k), int(y)) for a, k, y in zip(u.flat, known.flat, labels.flat, strict=True)]
    classes = sorted({y for _, _, y in flat})
    table, there = np.zeros((len(flat), len(classes))), np.zeros((len(flat), len(classes)), dtype=bool)
    for i, (a, k, y) in enumerate(flat):
        if k and y != IGNORED:
            table[i, classes.index(y)], there[i, classes.index(y)] = a, True
    w = modulation_weights_by_loop(
        table, there, there.astype(float), strength=strength, kind=kind, per_class=True, u_min=u_min, bound=bound
    )
    share = effective_share_by_loop(w, there, there.astype(float), True)
    return np.array([w[i, classes.index(y)] for i, (_, _, y) in enumerate(flat)]).reshape(u.shape), share


def position_loops(loop, f4, shown):
    """u of every position of (B, D, h, w), if it belonged to each class: (B, C, h, w), NaN where there is none."""
    B, C = shown.shape
    out = np.full((B, C, *f4.shape[2:]), np.nan)
    for b in range(B):
        for y, x in np.ndindex(*f4.shape[2:]):
            for c in range(C):
                u = loop.judge(f4[b, :, y, x], c, shown[b])
                out[b, c, y, x] = np.nan if u is None else u
    return out


def with_prototypes_loops(loop, cam, pairs, boxes, f4, weight, bias):
    """CAM + w·(cos(H_p, P_c) − cos(H_p, P_0) − b) within the box, cut to [0, 1)."""
    out = np.zeros_like(cam)
    for i, (b, f) in enumerate(pairs):
        gain = np.zeros(f4.shape[2:])
        if loop.prototypes[f + 1] is not None and loop.prototypes[0] is not None:
            for y, x in np.ndindex(*gain.shape):
                own, ground = loop.cosine(f4[b, :, y, x], f + 1), loop.cosine(f4[b, :, y, x], 0)
                gain[y, x] = own - ground - bias
        wide = bilinear_loops(gain, cam.shape[1:])
        y0, y1, x0, x1 = boxes[b]
        out[i, y0:y1, x0:x1] = np.clip(cam[i] + weight * wide, 0, 1 - 1e-6)[y0:y1, x0:x1]
    return out


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
    labels: np.ndarray, u: np.ndarray, conf: np.ndarray, keep: float, kind: str, ties: np.ndarray, u_px=None
) -> np.ndarray:
    """labels, conf, ties (seeded uniform numbers) and, where there is one, the u of each pixel (B, h, w)."""
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
                p
                for c, m in members.items()
                for p in sorted(m, key=lambda p: (-conf[b][p] if u_px is None else u_px[b][p], ties[b][p]))[: quota[c]]
            ]
        elif kind == "ranked":
            own = (lambda p, b=b: u[b, labels[b][p]]) if u_px is None else (lambda p, b=b: u_px[b][p])
            chosen = sorted(valid, key=lambda p: (own(p), ties[b][p]))[:budget]
        else:
            chosen = sorted(valid, key=lambda p: ties[b][p])[:budget]
        for p in chosen:
            pool[b][p] = True
    return pool
