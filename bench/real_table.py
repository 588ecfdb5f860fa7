"""The table of ``bench.real``: from the results of the arms, which are small files, in a second."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from ugrl.text import markdown

ORDER = ("Base", "I", "II", "III", "IV", "Full")
# Name of a score → its column.
COLUMNS = {
    "tag_map": "tag mAP, val",
    "cam_train": "CAM, train",
    "maps_train": "label maps, train",
    "refined_train": "refined maps, train",
    "pseudo_train": "pseudo-labels, train",
    "cam_val": "CAM, val",
    "maps_val": "label maps, val",
    "seg_val_plain": "seg, val",
    "seg_val": "seg averaged, val",
    "weak_full": "seg averaged ÷ Full",
}
TELLING = {
    "u_auroc_train": "u, pairs, train",
    "p_auroc_train": "1 − p, pairs, train",
    "u_auroc_val": "u, pairs, val",
    "p_auroc_val": "1 − p, pairs, val",
    "pixel_u_fg": "u, foreground pixels",
    "pixel_conf_fg": "confidence, foreground pixels",
    "pixel_u_bg": "u, background pixels",
    "pixel_conf_bg": "confidence, background pixels",
    "distance_auroc_train": "distance, pairs, train",
    "margin_auroc_train": "margin to all, pairs, train",
    "margin_shown_auroc_train": "margin to shown, pairs, train",
    "distance_auroc_val": "distance, pairs, val",
    "margin_auroc_val": "margin to all, pairs, val",
    "margin_shown_auroc_val": "margin to shown, pairs, val",
    "pixel_distance_fg": "distance at the pixel, foreground",
    "pixel_margin_shown_fg": "margin at the pixel, foreground",
    "pixel_distance_bg": "distance at the pixel, background",
    "pixel_margin_shown_bg": "margin at the pixel, background",
}
CHOSEN = {
    "cam_threshold": "threshold of the CAM",
    "maps_threshold": "threshold of the label maps",
    "refined_threshold": "threshold of the refined maps",
    "labelled_train": "labelled pixels, train",
}
LEGEND = (
    "Percent; mean ± standard deviation over seeds. IoU are means over the classes. Background thresholds are chosen "
    "on train (CAM, label maps, refined maps) and used on val. Label maps: what labels are made of, the CAM or what "
    "method.pseudo.source makes of it. Pseudo-labels: two thresholds as configured, without ignored pixels. "
    "seg: native size, one pass; averaged: eval.seg_scales and eval.mirror.",
    "AUROC in percent: what tells (image, class) pairs whose CAM IoU is below the median, and wrong pseudo-labels on "
    "train, pixel by pixel. 50 is chance. u is the run's own, of the class in the image; the others are measured with "
    "the same prototypes, whatever the run was trained with.",
)
Scores = Mapping[str, float | None]


def add_ratio(results: Mapping[tuple[str, int], Scores]) -> dict[tuple[str, int], Scores]:
    """The results with ``weak_full``: a segmentation's share of that of Full with the same seed, where there is one."""
    out: dict[tuple[str, int], Scores] = {}
    for (setting, seed), scores in results.items():
        own, full = scores.get("seg_val"), results.get(("Full", seed), {}).get("seg_val")
        out[setting, seed] = {**scores, "weak_full": own / full if own is not None and full else None}
    return out


def summary(results: Mapping[tuple[str, int], Scores], order: Sequence[str] = ORDER) -> dict[str, Any]:
    """Each score of each setting: value by seed, mean, standard deviation; and the differences to Base, seed by seed.

    Args:
        results: Scores by setting and seed.
        order: Of the settings in the tables.

    Returns:
        ``settings`` and ``minus_base``: setting → score → ``{"seeds": {seed: value}, "mean": …, "sd": …}``; ``sd`` is
        ``None`` with one seed.
    """
    results = add_ratio(results)
    settings = [s for s in order if any(s == setting for setting, _ in results)]
    names = (*COLUMNS, *TELLING, *CHOSEN)
    out: dict[str, Any] = {"settings": {}, "minus_base": {}}
    for setting in settings:
        seeds = sorted(seed for s, seed in results if s == setting)
        own = {name: {k: v for k in seeds if (v := results[setting, k].get(name)) is not None} for name in names}
        out["settings"][setting] = {name: _spread(found) for name, found in own.items() if found}
        if setting != "Base" and "Base" in settings:
            gaps = {
                name: {
                    k: v - b for k, v in own[name].items() if (b := results.get(("Base", k), {}).get(name)) is not None
                }
                for name in (*COLUMNS, *TELLING)
            }
            out["minus_base"][setting] = {name: _spread(found) for name, found in gaps.items() if found}
    return out


def _spread(values: Mapping[int, float]) -> dict[str, Any]:
    found = list(values.values())
    sd = statistics.stdev(found) if len(found) > 1 else None
    return {"seeds": {str(k): v for k, v in values.items()}, "mean": statistics.fmean(found), "sd": sd}


Part = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def parts(summed: Mapping[str, Any]) -> list[Part]:
    """The tables as text: title, header and rows of each."""
    blocks = [
        ("Scores", summed["settings"], COLUMNS, ""),
        ("Scores − Base, paired by seed", summed["minus_base"], COLUMNS, "+"),
    ]
    blocks += [("What tells bad labels", summed["settings"], TELLING, "")]
    blocks += [("Chosen on train", summed["settings"], CHOSEN, "")]
    out = []
    for title, rows, columns, sign in blocks:
        if rows:
            header = ("setting", "seeds", *columns.values())
            out.append((title, header, [_row(s, scores, columns, sign) for s, scores in rows.items()]))
    return out


def _row(setting: str, scores: Mapping[str, Any], columns: Mapping[str, str], sign: str) -> tuple[str, ...]:
    seeds = max((len(found["seeds"]) for found in scores.values()), default=0)
    return setting, str(seeds), *(_cell(scores.get(name), sign) for name in columns)


def _cell(found: Mapping[str, Any] | None, sign: str) -> str:
    if found is None:
        return "–"
    text = f"{100 * found['mean']:{sign}.1f}"
    return text if found["sd"] is None else f"{text} ± {100 * found['sd']:.1f}"


def as_markdown(summed: Mapping[str, Any], notes: Sequence[str]) -> str:
    """The tables as a Markdown file."""
    lines = ["# Settings on photographs", "", *(f"{markdown(note)}\n" for note in notes)]
    for title, header, rows in parts(summed):
        lines += [f"## {title}", "", _line(header), "| --- | ---: |" + " ---: |" * (len(header) - 2)]
        lines += [*map(_line, rows), ""]
    return "\n".join([*lines, *(f"{text}\n" for text in LEGEND)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def as_tables(summed: Mapping[str, Any]) -> list[Table]:
    """The tables for a terminal: scores are rows there, since there are more of them than settings."""
    made = []
    for title, header, rows in parts(summed):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for row in rows:
            table.add_column(row[0], justify="right", no_wrap=True)
        for k in range(1, len(header)):
            table.add_row(header[k], *(row[k] for row in rows))
        made.append(table)
    return made
