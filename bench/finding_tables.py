"""The tables of docs/finding.md, as Markdown, of results that were read."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np

from bench.finding_stats import Result, against, calibration_error, holm, judged_pairs, tells
from ugrl.config import Config
from ugrl.errors import DataError
from ugrl.text import line

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
    "mixed": "that margin and 1 − p",
    "decoder": "the decoder's doubt",
    "all": "all three",
}
# Of a trial: column of trials.csv → its heading.
TRIED = {"seg_miou": "segmentation", "final.seg_miou": "fresh seed, val", "tag_map": "tag mAP"}
PIXELS = {
    "conf": "confidence of the label",
    "u": "u of the class (Eq. 7)",
    "distance": "distance at the pixel",
    "margin_shown": "margin at the pixel",
    "decoder": "1 − the decoder's probability",
    "own": "the run's own u of the pixel",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def percent(value: float | None) -> str:
    """A share in percent, or a dash where there is none.

    >>> percent(0.8125), percent(None)
    ('81.2', '–')
    """
    return "–" if value is None else f"{100 * value:.1f}"


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


def by_arm(
    title: str, found: Mapping[str, Mapping[int, Result]], columns: Mapping[str, str], cell: Callable[[str, str], str]
) -> str:
    """A table with a row for each arm and a column for each score, of those that there are.

    Args:
        title: Heads the arms.
        found: The arms.
        columns: Name of a score → its column.
        cell: Of an arm and a score; a dash where there is none.
    """
    cells = {arm: {name: cell(arm, name) for name in columns} for arm in found}
    names = [name for name in columns if any(row[name] != "–" for row in cells.values())]
    rows = [[arm, *(row[name] for name in names)] for arm, row in cells.items() if {*row.values()} != {"–"}]
    return table([title, *(columns[name] for name in names)], rows)


def tells_tables(found: Mapping[str, Mapping[int, Result]]) -> str:
    """What tells bad pairs: AUROC of each u, the difference to 1 − p, and the calibration error."""
    known = {**TELLS, "p": "1 − p"}
    told = {
        (arm, split, name): tells(runs, split, name)
        for arm, runs in found.items()
        for split in ("train", "val")
        for name in known
    }

    def area(split: str) -> Callable[[str, str], str]:
        return lambda arm, name: percent(at[0] if (at := told[arm, split, name]) else None)

    def gap(split: str) -> Callable[[str, str], str]:
        return lambda arm, name: str(at[1]) if (at := told[arm, split, name]) else "–"

    def error(arm: str, name: str) -> str:
        return percent(calibration_error(found[arm], name))

    parts = [by_arm(f"AUROC for pairs, {split}", found, known, area(split)) for split in ("train", "val")]
    parts += [by_arm(f"AUROC − that of 1 − p, {split}", found, TELLS, gap(split)) for split in ("train", "val")]
    return "\n\n".join([*parts, by_arm("calibration error, val", found, known, error)])


def pixels_tables(found: Mapping[str, Mapping[int, Result]]) -> str:
    """What tells wrong pseudo-labels on train, pixel by pixel: AUROC for foreground and background labels."""
    kinds = {"fg": "foreground", "bg": "background"}

    def cell(kind: str) -> Callable[[str, str], str]:
        return lambda arm, name: values(found[arm], f"pixel_{name}_{kind}")

    return "\n\n".join(by_arm(f"AUROC for pixels, {kinds[kind]}", found, PIXELS, cell(kind)) for kind in kinds)


def coverage_tables(found: Mapping[str, Mapping[int, Result]], shares: Sequence[float] = (0.8, 0.6, 0.4)) -> str:
    """Mean CAM IoU of the share of pairs on val that a score trusts most: risk against coverage."""
    known = {"": "all pairs", **TELLS, "p": "1 − p"}

    def cell(share: float) -> Callable[[str, str], str]:
        def of(arm: str, name: str) -> str:
            trusted = []
            for run in found[arm].values():
                pairs = run.pairs["val"]
                risk, here = judged_pairs(pairs, name or "p")
                if not here.any():
                    return "–"
                iou = pairs["iou"][here][np.argsort(risk[here], kind="stable")]
                trusted.append(float(iou[: max(1, round((share if name else 1.0) * len(iou)))].mean()))
            return spread(trusted)

        return of

    return "\n\n".join(by_arm(f"{100 * share:.0f} % of the pairs", found, known, cell(share)) for share in shares)


def transfer_table(found: Mapping[str, Mapping[int, Result]]) -> str:
    """Arms ``ARM+WHERE``, each beside ``Base+WHERE``, with the difference."""
    rows = []
    for name, runs in found.items():
        arm, _, where = name.partition("+")
        base = f"Base+{where}"
        if arm == "Base" or base not in found:
            continue
        pair, cells = {base: found[base], name: runs}, []
        seeds = sorted(runs.keys() & found[base].keys())
        for score in COMPARED:
            cells += [spread([of[seed].scores[score] for seed in seeds]) for of in pair.values()]
            cells.append(str(against(pair, score, base).get(name, "–")))
        rows.append([where, arm, str(len(seeds)), *cells])
    heads = [f"{text}, Base | {text}, this arm | difference" for text in COMPARED.values()]
    return table(["where", "arm", "seeds", *" | ".join(heads).split(" | ")], rows)


def over_time_tables(found: Mapping[str, Mapping[int, Result]]) -> str:
    """Scores, and what each u knows, by step, of the checkpoints of one arm."""
    at: dict[int, dict[int, Result]] = {}
    for runs in found.values():
        for seed, result in runs.items():
            at.setdefault(result.step, {})[seed] = result
    steps = [at[step] for step in sorted(at)]
    known = {**TELLS, "p": "1 − p"}

    def rows(names: Mapping[str, str], cell: Callable[[str, Mapping[int, Result]], str]) -> list[list[str]]:
        return [[text, *(cell(name, runs) for runs in steps)] for name, text in names.items()]

    def area(split: str) -> Callable[[str, Mapping[int, Result]], str]:
        return lambda name, runs: percent(told[0] if (told := tells(runs, split, name)) else None)

    def error(name: str, runs: Mapping[int, Result]) -> str:
        return percent(calibration_error(runs, name))

    parts = {
        "scores": rows(SHOWN, lambda name, runs: values(runs, name)),
        "AUROC for pairs, train": rows(known, area("train")),
        "AUROC for pairs, val": rows(known, area("val")),
        "calibration error, val": rows(known, error),
        "AUROC for pixels, foreground": rows(PIXELS, lambda name, runs: values(runs, f"pixel_{name}_fg")),
        "AUROC for pixels, background": rows(PIXELS, lambda name, runs: values(runs, f"pixel_{name}_bg")),
    }
    header = [f"step {step}" for step in sorted(at)]
    return "\n\n".join(table([title, *header], of) for title, of in parts.items())


def search_tables(file: Path, ends: bool) -> str:
    """The trials of a search, and with ``ends`` what the ends of its axes are worth.

    Args:
        file: ``trials.csv`` of its report.
        ends: Of a search of corners.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, restval="")
            trials, names = list(reader), list(reader.fieldnames or ())
        if not trials:
            raise ValueError("it has no trial")
        sections = {f.name for f in fields(Config)}
        paths = [name for name in names if "." in name and name.partition(".")[0] in sections]
        made = [search_table(trials, paths), *([ends_table(trials, paths)] if ends else [])]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"{line(file)}: cannot be read as the trials of a search: {line(str(error))}") from None
    return "\n\n".join(made)


def search_table(trials: Sequence[Mapping[str, str]], paths: Sequence[str]) -> str:
    """The trials of a search: state, steps, scores in percent, and the values that were tried."""
    shown = [name for name in TRIED if any(trial.get(name) for trial in trials)]

    def value(text: str) -> str:
        with suppress(ValueError):
            return f"{float(text):.4g}"
        return text or "–"

    rows = [
        [
            trial["number"],
            trial["state"].lower() + (" †" if float(trial.get("collapsed") or 0) else ""),
            trial["step"],
            *(percent(float(trial[name]) if trial[name] else None) for name in shown),
            *(value(trial[path]) for path in paths),
        ]
        for trial in trials
    ]
    header = ["trial", "state", "steps", *(TRIED[name] for name in shown)]
    return table([*header, *(path.rpartition(".")[2] for path in paths)], rows)


def ends_table(trials: Sequence[Mapping[str, str]], paths: Sequence[str], score: str = "seg_miou") -> str:
    """What one end of each axis has more than the other, in points: of the trials that lie at ends alone.

    Each pair of axes is balanced in them (Plackett and Burman, 1946), so no axis has a part in the means of another.
    """
    values = np.array([[float(trial[path] or "nan") for path in paths] for trial in trials])
    low_P, high_P = np.nanmin(values, 0), np.nanmax(values, 0)
    points = np.array([float(trial[score] or "nan") for trial in trials])
    here = ((values == low_P) | (values == high_P)).all(1) & np.isfinite(points)
    rows = []
    for path, at, low, high in zip(paths, values.T, low_P, high_P, strict=True):
        ends = [points[here & (at == end)] for end in (low, high)]
        means = [float(x.mean()) if len(x) else None for x in ends]
        gap = "–" if None in means else f"{100 * (means[1] - means[0]):+.1f}"
        rows.append([path.rpartition(".")[2], f"{low:.4g}", f"{high:.4g}", *map(percent, means), gap])
    return table(["axis", "low end", "high end", "segmentation, low", "segmentation, high", "difference"], rows)


def values(runs: Mapping[int, Result], score: str) -> str:
    """Mean and standard deviation of a score over the seeds that have it, in percent."""
    return spread([r.scores[score] for r in runs.values() if score in r.scores])


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
