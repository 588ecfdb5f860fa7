"""CAM, pseudo-labels, PAR and metrics as plain loops over Python floats: slow, and easy to check by eye."""

from __future__ import annotations

import math

import numpy as np


def ref_bilinear(plane, size):
    """Bilinear resize of a 2-D list, pixel centres at half integers, borders repeated."""
    height, width = len(plane), len(plane[0])
    out = [[0.0] * size[1] for _ in range(size[0])]

    def taps(i, cells, pixels):
        at = max(0.0, (i + 0.5) * pixels / cells - 0.5)
        low = min(int(at), pixels - 1)
        return low, min(low + 1, pixels - 1), at - low

    for i in range(size[0]):
        y0, y1, fy = taps(i, size[0], height)
        for j in range(size[1]):
            x0, x1, fx = taps(j, size[1], width)
            top = plane[y0][x0] * (1 - fx) + plane[y0][x1] * fx
            bottom = plane[y1][x0] * (1 - fx) + plane[y1][x1] * fx
            out[i][j] = top * (1 - fy) + bottom * fy
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
            small = [ref_bilinear(plane, size) for plane in image]
            plain = ref_bilinear(forward(small)[f], (height, width))
            if mirror:
                other = forward([ref_mirror(plane) for plane in small])[f]
                other = ref_mirror(ref_bilinear(other, (height, width)))
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


def ref_random_walk(cam, ahat, beta, log_iterations):
    """One map of N values along an N x N affinity."""
    count = len(cam)
    walk = []
    for i in range(count):
        row = [ahat[i][j] ** beta for j in range(count)]
        total = sum(row)
        walk.append([v / total if total > 0 else 0.0 for v in row])
    for _ in range(log_iterations):
        walk = [[sum(walk[i][k] * walk[k][j] for k in range(count)) for j in range(count)] for i in range(count)]
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
    small = [ref_bilinear(cut(plane), half) for plane in image]
    runs = []
    for score in (high, low):
        channels = [[[score] * half[1] for _ in range(half[0])]]
        channels += [ref_bilinear(cut(plane), half) for plane in planes]
        for y in range(half[0]):
            for x in range(half[1]):
                exps = [math.exp(c[y][x]) for c in channels]
                for c, e in zip(channels, exps, strict=True):
                    c[y][x] = e / math.fsum(exps)
        runs.append([ref_bilinear(m, size) for m in ref_par(small, channels, *par)])
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


def ref_average_precision(scores, positives):
    """Sum over distinct thresholds of the step in recall times precision."""
    total, last, area = sum(positives), 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [p for s, p in zip(scores, positives, strict=True) if s >= threshold]
        recall = sum(taken) / total
        area += (recall - last) * sum(taken) / len(taken)
        last = recall
    return area


def ref_auroc(scores, positives):
    """Share of (positive, negative) pairs in the right order, equal scores counting one half."""
    good = [s for s, p in zip(scores, positives, strict=True) if p]
    bad = [s for s, p in zip(scores, positives, strict=True) if not p]
    return sum(1.0 if g > b else 0.5 if g == b else 0.0 for g in good for b in bad) / (len(good) * len(bad))


def ref_gaussian_filter(features, values):
    """Sum over all points of exp(-|f_i - f_j|^2 / 2) times their value; (N, d) and (N, C) arrays, no truncation."""
    out = np.zeros_like(values)
    for i in range(len(features)):
        for j in range(len(features)):
            out[i] += math.exp(-0.5 * float(((features[i] - features[j]) ** 2).sum())) * values[j]
    return out
