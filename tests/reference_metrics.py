"""Metrics and the Gaussian filter of the CRF as plain loops."""

from __future__ import annotations

import math

import numpy as np


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
