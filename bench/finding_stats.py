"""Stored results of the arms of ``bench/finding.yaml``, and what they say with intervals over images and seeds."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.real_measure import PLACES
from ugrl.errors import DataError
from ugrl.seeding import generator
from ugrl.text import line

DRAWS = 1000
# Bins of the calibration error.
BINS = 10
Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Result:
    """What was measured of one arm with one seed.

    Attributes:
        scores: Shares of 1 by name.
        counts: Name of a score → (images, C, 3): pixels right, predicted and true.
        pairs: Split → name → one number for each (image, class) pair, NaN where there is none.
        step: Of the checkpoint.
    """

    scores: Mapping[str, float]
    counts: Mapping[str, Floats]
    pairs: Mapping[str, Mapping[str, Floats]]
    step: int = 0


def read(path: Path) -> Result:
    """A stored result.

    Raises:
        DataError: The file cannot be read, or is none.
    """
    try:
        raw = path.read_bytes()
        tree = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        counts = {}
        for name, images in tree["images"].items():
            rows = [(k, *row) for k, id in enumerate(sorted(images)) for row in images[id]]
            table = np.zeros((len(images), 1 + max(c for _, c, *_ in rows), 3))
            for k, c, *numbers in rows:
                table[k, c] = numbers
            counts[name] = table
        pairs = {
            split: {name: np.array([math.nan if x is None else x for x in column]) for name, column in columns.items()}
            for split, columns in tree["pairs"].items()
        }
        scores = {k: v for k, v in tree["scores"].items() if v is not None}
        return Result(scores, counts, with_doubts(pairs), int(tree.get("step", 0)))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{line(path)}: cannot be read as a result of an arm: {line(str(error))}") from None


def with_doubts(pairs: dict[str, dict[str, Floats]]) -> dict[str, dict[str, Floats]]:
    """The pairs with means of doubts: ``mixed`` of the margin and the classifier's −logit p, and ``all`` with the
    decoder's as well, in equal shares. Over the training pairs each has the same deviation, as
    :mod:`ugrl.method.calibrate` has it; no mask is needed for that.
    """
    for columns in pairs.values():
        p = columns["p"].clip(0.5 * 10.0**-PLACES, 1 - 0.5 * 10.0**-PLACES)
        columns["classifier"] = np.log1p(-p) - np.log(p)
    for name, parts in (("mixed", ("margin_shown", "classifier")), ("all", ("margin_shown", "classifier", "decoder"))):
        if all(np.isfinite(pairs["train"].get(part, np.array([]))).any() for part in parts):
            for columns in pairs.values():
                columns[name] = sum(columns[part] / float(np.nanstd(pairs["train"][part])) for part in parts)
    return pairs


def read_all(folder: Path, order: Sequence[str] = ()) -> dict[str, dict[int, Result]]:
    """Arm → seed → result, of all results in a folder, in an order of the arms; others follow.

    Raises:
        DataError: There is none, or one cannot be read.
    """
    found: dict[str, dict[int, Result]] = {}
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.json.gz")]):
        arm, _, seed = path.name.partition(".")[0].rpartition("-")
        if not arm or not seed.isdigit():
            raise DataError(f"{line(path)}: expected a name ARM-SEED.json")
        found.setdefault(arm, {})[int(seed)] = read(path)
    if not found:
        raise DataError(f"{line(folder)}: no result of an arm; make finding makes them")
    return {arm: found[arm] for arm in sorted(found, key=lambda arm: order.index(arm) if arm in order else len(order))}


# -- intervals --------------------------------------------------------------------------------


def miou(counts_NC3: Floats, weight_DN: Floats) -> Floats:
    """Mean IoU over the classes of the ground truth, with each image counted ``weight`` times: one for each draw."""
    n, c, _ = counts_NC3.shape
    right_DC, predicted_DC, true_DC = np.moveaxis((weight_DN @ counts_NC3.reshape(n, -1)).reshape(-1, c, 3), 2, 0)
    iou_DC = right_DC / np.where(true_DC > 0, predicted_DC + true_DC - right_DC, math.nan)
    found: Floats = np.nanmean(iou_DC, 1)
    return found


def auroc(score_N: Floats, bad_N: Bools, weight_DN: Floats) -> Floats:
    """Area under the ROC of ``score`` for ``bad``, each row counted ``weight`` times; a tie counts one half."""
    values, group_N = np.unique(score_N, return_inverse=True)
    first_V = np.concatenate([[0], np.bincount(group_N, minlength=len(values)).cumsum()[:-1]])
    order = np.argsort(group_N, kind="stable")
    bad_DV, good_DV = (np.add.reduceat((weight_DN * kind)[:, order], first_V, 1) for kind in (bad_N, ~bad_N))
    below_DV = good_DV.cumsum(1) - good_DV / 2
    with np.errstate(invalid="ignore"):
        found: Floats = (bad_DV * below_DV).sum(1) / (bad_DV.sum(1) * good_DV.sum(1))
    return found


@dataclass(frozen=True)
class Interval:
    """A mean with what a bootstrap says of it.

    Attributes:
        mean: Of the seeds as they are.
        low: 2.5 % of the draws lie below.
        high: 2.5 % of the draws lie above.
        p: Share of the draws on the other side of 0, doubled; at least 2 of ``DRAWS``.
        seeds: How many.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} ({100 * self.low:+.1f}, {100 * self.high:+.1f})"


def bootstrap(images: int, seeds: Sequence[int], value: Callable[[int, Floats], Floats], name: str) -> Interval:
    """The mean over seeds of a value, with seeds and images drawn again, each with replacement.

    Args:
        images: How many there are.
        seeds: Of the runs.
        value: Of a seed, for each draw d, when image k counts ``weight[d, k]`` times.
        name: Of the draws: the same name draws the same.
    """
    g = generator("finding", name)
    weight_DN, times_DS = np.empty((DRAWS, images)), np.empty((DRAWS, len(seeds)))
    for d in range(DRAWS):
        weight_DN[d] = np.bincount(g.integers(0, images, images), minlength=images)
        times_DS[d] = np.bincount(g.integers(0, len(seeds), len(seeds)), minlength=len(seeds))
    mean = statistics.fmean(float(value(seed, np.ones((1, images)))[0]) for seed in seeds)
    found = (times_DS * np.stack([value(seed, weight_DN) for seed in seeds], 1)).sum(1) / len(seeds)
    low, high = np.nanquantile(found, [0.025, 0.975])
    side = min(float((found <= 0).mean()), float((found >= 0).mean()))
    return Interval(mean, float(low), float(high), max(2 * side, 2 / DRAWS), len(seeds))


def holm(intervals: Mapping[str, Interval]) -> dict[str, float]:
    """The p of each, corrected for their number (Holm, 1979).

    >>> one = Interval(0.0, 0.0, 0.0, 0.01, 5)
    >>> holm({"a": one, "b": Interval(0.0, 0.0, 0.0, 0.5, 5)})
    {'a': 0.02, 'b': 0.5}
    """
    out, highest = {}, 0.0
    order = sorted(intervals, key=lambda name: intervals[name].p)
    for k, name in enumerate(order):
        highest = max(highest, min(1.0, intervals[name].p * (len(order) - k)))
        out[name] = highest
    return {name: out[name] for name in intervals}


def against(found: Mapping[str, Mapping[int, Result]], score: str, base: str) -> dict[str, Interval]:
    """The difference of each arm to another one in a mIoU, paired by seed and image."""
    out = {}
    for arm, runs in found.items():
        seeds = sorted(runs.keys() & found.get(base, {}).keys())
        if arm != base and seeds:

            def gap(seed: int, weight: Floats, arm: str = arm) -> Floats:
                return miou(found[arm][seed].counts[score], weight) - miou(found[base][seed].counts[score], weight)

            out[arm] = bootstrap(len(runs[seeds[0]].counts[score]), seeds, gap, score)
    return out


def judged_pairs(pairs: Mapping[str, Floats], name: str) -> tuple[Floats, Bools]:
    """A score of each pair, the larger the worse (``p`` stands for 1 − p), and which pairs it judges: those of u."""
    score = -pairs["p"] if name == "p" else pairs.get(name, np.full(len(pairs["p"]), math.nan))
    return score, np.isfinite(score) & np.isfinite(pairs["u"]) & np.isfinite(pairs["iou"])


def tells(runs: Mapping[int, Result], split: str, name: str) -> tuple[float, Interval] | None:
    """AUROC of a u for pairs whose CAM IoU is below the median, and what it has more than 1 − p.

    ``None``: the arm has no u, or a result of it lacks this one.
    """

    def columns(seed: int) -> tuple[Floats, Floats, Bools, Floats]:
        pairs = runs[seed].pairs[split]
        score, here = judged_pairs(pairs, name)
        iou = pairs["iou"][here]
        return score[here], pairs["p"][here], iou < np.median(iou), pairs["image"][here].astype(int)

    seeds = sorted(runs)
    if not all(judged_pairs(runs[seed].pairs[split], name)[1].any() for seed in seeds):
        return None
    cut = {seed: columns(seed) for seed in seeds}
    images = 1 + max(int(image.max()) for *_, image in cut.values())

    def one(seed: int) -> float:
        u, _, bad, _ = cut[seed]
        return float(auroc(u, bad, np.ones((1, len(u))))[0])

    def gap(seed: int, weight: Floats) -> Floats:
        u, p, bad, image = cut[seed]
        return auroc(u, bad, weight[:, image]) - auroc(-p, bad, weight[:, image])

    return statistics.fmean(map(one, seeds)), bootstrap(images, seeds, gap, f"pairs/{split}")


def calibration_error(runs: Mapping[int, Result], name: str) -> float | None:
    """How far a score's risk on val is from what train says, in the mean over seeds (Guo et al., 2017).

    The risk of a pair is the share of bad pairs in its tenth of the training pairs, sorted by the score; bad is a CAM
    IoU below the median of train. On val each tenth has the share of bad pairs that it has there. ``None`` as
    :func:`tells` has it.
    """
    errors = []
    for run in runs.values():
        columns = []
        for split in ("train", "val"):
            pairs = run.pairs[split]
            score, here = judged_pairs(pairs, name)
            if not here.any():
                return None
            columns.append((score[here], pairs["iou"][here]))
        (train, train_iou), (val, val_iou) = columns
        edges = np.quantile(train, np.linspace(0, 1, BINS + 1)[1:-1])
        median = np.median(train_iou)
        risk = _shares(np.searchsorted(edges, train), train_iou < median)
        seen, count = _shares(at := np.searchsorted(edges, val), val_iou < median), np.bincount(at, minlength=BINS)
        errors.append(float((count * np.abs(np.nan_to_num(risk - seen))).sum() / count.sum()))
    return statistics.fmean(errors)


def _shares(at: np.ndarray[Any, np.dtype[np.int64]], bad: Bools) -> Floats:
    """Share of bad ones in each bin; NaN where it is empty."""
    with np.errstate(invalid="ignore"):
        shares: Floats = np.bincount(at, bad, BINS) / np.bincount(at, minlength=BINS)
    return shares
