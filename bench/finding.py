"""The tables of docs/finding.md, from stored results alone, with intervals over images and seeds.

    python -m bench.finding [--results DIR] [--out FILE.md] [--page docs/finding.md]

Results are those that ``make finding`` measures (``python -m bench.real --arms bench/finding.yaml``): one small file
for each arm and seed. Nothing is trained here, and it takes seconds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench.real_arms import variants_of
from bench.real_measure import PLACES
from ugrl.command import enter
from ugrl.errors import DataError
from ugrl.eval.metrics import weighted_auroc
from ugrl.files import write_whole
from ugrl.seeding import generator
from ugrl.text import line

ARMS = Path(__file__).with_name("finding.yaml")
STORED = Path(__file__).parent / "results" / "finding"
DRAWS = 1000
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
# What the arms are compared in: name of the score, its column, and whose counts make its interval.
COMPARED = {"seg_val": "segmentation, val", "pseudo_train": "pseudo-labels, train"}
SHOWN = {
    "tag_map": "tag mAP, val",
    "cam_train": "CAM, train",
    "maps_train": "label maps, train",
    "pseudo_train": "pseudo-labels, train",
    "labelled_train": "labelled, train",
    "maps_val": "label maps, val",
    "seg_val": "segmentation, val",
}
TELLS = {
    "u": "the run's own u",
    "distance": "distance (Eq. 5)",
    "margin": "margin to all",
    "margin_shown": "margin to those shown",
    "mixed": "the same, and the classifier's doubt",
    "decoder": "the decoder's doubt",
    "all": "all three",
}
PIXELS = {
    "conf": "confidence of the label",
    "u": "u of the class (Eq. 7)",
    "distance": "distance at the pixel",
    "margin_shown": "margin at the pixel",
    "decoder": "1 − the decoder's probability",
    "own": "the run's own u of the pixel",
}
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Result:
    """What was measured of one arm with one seed.

    Attributes:
        scores: Shares of 1 by name.
        counts: Name of a score → (images, C, 3): pixels right, predicted and true.
        pairs: Split → name → one number for each (image, class) pair, NaN where there is none.
    """

    scores: Mapping[str, float]
    counts: Mapping[str, Floats]
    pairs: Mapping[str, Mapping[str, Floats]]


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
        return Result({k: v for k, v in tree["scores"].items() if v is not None}, counts, with_doubts(pairs))
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


def read_all(folder: Path) -> dict[str, dict[int, Result]]:
    """Arm → seed → result, of all results in a folder.

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
    order = list(variants_of(ARMS))
    return {arm: found[arm] for arm in sorted(found, key=lambda arm: order.index(arm) if arm in order else len(order))}


# -- intervals --------------------------------------------------------------------------------


def miou(counts_NC3: Floats, weight_N: Floats) -> float:
    """Mean IoU over the classes of the ground truth, each image counted ``weight`` times."""
    right, predicted, true = np.einsum("n,nck->kc", weight_N, counts_NC3)
    union = predicted + true - right
    return float((right[true > 0] / union[true > 0]).mean())


def auroc(score: Floats, bad: np.ndarray[Any, np.dtype[np.bool_]], weight: Floats) -> float:
    """Area under the ROC of ``score`` for ``bad``, each row counted ``weight`` times."""
    return weighted_auroc(*(torch.from_numpy(x) for x in (score, weight * bad, weight * ~bad)))


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


def bootstrap(images: int, seeds: Sequence[int], value: Callable[[int, Floats], float], name: str) -> Interval:
    """The mean over seeds of a value, with seeds and images drawn again, each with replacement.

    Args:
        images: How many there are.
        seeds: Of the runs.
        value: Of a seed, when image k counts ``weight[k]`` times.
        name: Of the draws: the same name draws the same.
    """
    g = generator("finding", name)
    mean = statistics.fmean(value(seed, np.ones(images)) for seed in seeds)
    draws = []
    for _ in range(DRAWS):
        weight = np.bincount(g.integers(0, images, images), minlength=images).astype(float)
        draws.append(statistics.fmean(value(seeds[k], weight) for k in g.integers(0, len(seeds), len(seeds))))
    found = np.array(draws)
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

            def gap(seed: int, weight: Floats, arm: str = arm) -> float:
                return miou(found[arm][seed].counts[score], weight) - miou(found[base][seed].counts[score], weight)

            out[arm] = bootstrap(len(runs[seeds[0]].counts[score]), seeds, gap, score)
    return out


def tells(runs: Mapping[int, Result], split: str, name: str) -> tuple[float, Interval] | None:
    """AUROC of a u for pairs whose CAM IoU is below the median, and what it has more than 1 − p.

    ``None``: the arm has no u, or a result of it lacks this one.
    """

    def columns(seed: int) -> tuple[Floats, Floats, np.ndarray[Any, np.dtype[np.bool_]], Floats]:
        pairs = runs[seed].pairs[split]
        here = np.isfinite(pairs[name]) & np.isfinite(pairs["u"]) & np.isfinite(pairs["iou"])
        iou = pairs["iou"][here]
        return pairs[name][here], pairs["p"][here], iou < np.median(iou), pairs["image"][here].astype(int)

    seeds = sorted(runs)
    if not all(
        np.isfinite(runs[seed].pairs[split].get(key, np.array([]))).any() for seed in seeds for key in ("u", name)
    ):
        return None
    cut = {seed: columns(seed) for seed in seeds}
    images = 1 + max(int(image.max()) for *_, image in cut.values())

    def one(seed: int) -> float:
        u, _, bad, _ = cut[seed]
        return auroc(u, bad, np.ones(len(u)))

    def gap(seed: int, weight: Floats) -> float:
        u, p, bad, image = cut[seed]
        return auroc(u, bad, weight[image]) - auroc(-p, bad, weight[image])

    return statistics.fmean(map(one, seeds)), bootstrap(images, seeds, gap, f"pairs/{split}")


# -- the tables -------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of shares, in percent."""
    if not values:
        return "–"
    text = f"{100 * statistics.fmean(values):.1f}"
    return text if len(values) == 1 else f"{text} ± {100 * statistics.stdev(values):.1f}"


def scores_table(found: Mapping[str, Mapping[int, Result]]) -> str:
    """The scores of each arm, and the segmentation's share of that of Full with the same seed."""
    rows = []
    for arm, runs in found.items():
        cells = [spread([r.scores[name] for r in runs.values() if name in r.scores]) for name in SHOWN]
        full = found.get("Full", {})
        ratios = [r.scores["seg_val"] / full[seed].scores["seg_val"] for seed, r in runs.items() if seed in full]
        rows.append([arm, str(len(runs)), *cells, spread(ratios)])
    return table(["arm", "seeds", *SHOWN.values(), "weak ÷ full"], rows)


def gaps_table(found: Mapping[str, Mapping[int, Result]], base: str) -> str:
    """What each arm has more than another one, with 95 % intervals and p corrected for the number of arms."""
    gaps = {score: against({a: r for a, r in found.items() if a != "Full"}, score, base) for score in COMPARED}
    # What one seed does is not known from that seed: no p, and the interval is over images alone.
    corrected = {s: holm({arm: g for arm, g in found.items() if g.seeds > 1}) for s, found in gaps.items()}
    rows = []
    for arm in gaps["seg_val"]:
        told = {s: f"{corrected[s][arm]:.3f}" if arm in corrected[s] else "–" for s in COMPARED}
        cells = [f"{gaps[s][arm]} | {told[s]}" for s in COMPARED]
        rows.append([arm, str(gaps["seg_val"][arm].seeds), *cells])
    heads = [f"{column} − {base} | p" for column in COMPARED.values()]
    header = ["arm", "seeds", *" | ".join(heads).split(" | ")]
    return table(header, rows)


def tells_table(found: Mapping[str, Mapping[int, Result]]) -> str:
    """What tells bad pairs: AUROC of each u, and the difference to 1 − p."""
    rows = []
    for arm, runs in found.items():
        for name, text in TELLS.items():
            cells = [tells(runs, split, name) for split in ("train", "val")]
            if all(cells):
                shown = [f"{100 * c[0]:.1f} | {c[1]}" for c in cells if c is not None]
                rows.append([arm, text, *shown])
    header = ["arm", "score", "train", "− (1 − p)", "val", "− (1 − p)"]
    return table(header, rows)


def pixels_table(found: Mapping[str, Mapping[int, Result]]) -> str:
    """What tells wrong pseudo-labels on train, pixel by pixel: AUROC for foreground and background labels."""
    rows = []
    for arm, runs in found.items():
        for name, text in PIXELS.items():
            keys = [f"pixel_{name}_{kind}" for kind in ("fg", "bg")]
            values = [[r.scores[key] for r in runs.values() if key in r.scores] for key in keys]
            if all(values):
                rows.append([arm, text, *map(spread, values)])
    return table(["arm", "score", "foreground", "background"], rows)


def coverage_table(found: Mapping[str, Mapping[int, Result]], shares: Sequence[float] = (1.0, 0.8, 0.6, 0.4)) -> str:
    """Mean CAM IoU of the share of pairs on val that a score trusts most: risk against coverage."""
    rows = []
    for arm, runs in found.items():
        for name, text in {**TELLS, "p": "1 − p"}.items():
            cells: list[list[float]] = [[] for _ in shares]
            for run in runs.values():
                pairs = run.pairs["val"]
                here = np.isfinite(pairs["u"]) & np.isfinite(pairs["iou"])
                if here.any() and (name == "p" or name in pairs):
                    risk = -pairs["p"][here] if name == "p" else pairs[name][here]
                    iou = pairs["iou"][here][np.argsort(risk, kind="stable")]
                    for cell, share in zip(cells, shares, strict=True):
                        cell.append(float(iou[: max(1, round(share * len(iou)))].mean()))
            if all(len(cell) == len(runs) for cell in cells):
                rows.append([arm, text, *map(spread, cells)])
    return table(["arm", "score", *(f"{100 * share:.0f} % of the pairs" for share in shares)], rows)


def power(found: Mapping[str, Mapping[int, Result]], score: str = "seg_val", base: str = "Base") -> str:
    """How large a difference some seeds can see: 80 % power, two sides, 5 %, by the paired t test."""
    first = found.get(base, {})
    gaps = [
        statistics.stdev(values)
        for arm, runs in found.items()
        if arm not in (base, "Full")
        and len(values := [runs[s].scores[score] - first[s].scores[score] for s in runs if s in first]) > 1
    ]
    if not gaps:
        return "Power: no arm has two seeds yet."
    sd = math.sqrt(statistics.fmean(x * x for x in gaps))
    # (t₀.₉₇₅ + t₀.₈₀) / √n with n − 1 degrees of freedom, for 3 and 5 seeds.
    factors = {3: (4.303 + 1.061) / math.sqrt(3), 5: (2.776 + 0.941) / math.sqrt(5)}
    seen = ", ".join(f"{100 * factor * sd:.1f} points with {n} seeds" for n, factor in factors.items())
    return f"Power: the paired differences in {score} have a standard deviation of {100 * sd:.2f} points: {seen}."


def report(found: Mapping[str, Mapping[int, Result]]) -> str:
    """All tables as Markdown."""
    parts = {
        "Scores": scores_table(found),
        "Differences to Base": gaps_table(found, "Base") + "\n\n" + power(found),
        "Differences to IV": gaps_table(found, "IV") if "IV" in found else "",
        "Differences to IV-doubts": gaps_table(found, "IV-doubts") if "IV-doubts" in found else "",
        "What tells bad pairs": tells_table(found),
        "Risk and coverage": coverage_table(found),
        "What tells wrong pixels": pixels_table(found),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items() if text) + "\n"


def with_tables(page: str, text: str) -> str:
    """A page with other tables, between its two marks.

    Raises:
        DataError: It lacks a mark.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"the page has no '{BEGIN}' before '{END}': put both where the tables belong")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def main(words: list[str] | None = None) -> int:
    """0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench.finding", description=__doc__)
    parser.add_argument("--results", type=Path, default=STORED, metavar="DIR", help="default: those in the project")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="put the tables in the place of those of a page")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the tables there, too")

    def body(args: argparse.Namespace, console: Console) -> int:
        text = report(read_all(args.results))
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(args.out, text)
        if args.page is not None:
            write_whole(args.page, with_tables(args.page.read_text(encoding="utf-8"), text))
        print(text)
        return 0

    words = sys.argv[1:] if words is None else words
    return enter(parser, words or ["--results", str(STORED)], body, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
