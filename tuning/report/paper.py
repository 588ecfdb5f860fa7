"""The tables and figures of the paper that a search measures again: its numbers beside the printed ones.

Printed values are those of the paper's Tables 3 and 4. Figure 7 prints curves without numbers, and names their peaks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tuning.formatting import plural, short
from tuning.ledger.noise import Gap, Measure, difference, measure, show
from tuning.report.drawing import BEST, COLORS, SHADES, STYLE, save
from tuning.report.findings import PAPER
from tuning.report.luck import by_luck, seed_noise
from tuning.report.read import Findings
from tuning.study.record import Run, TrialRow, label, ranked
from ugrl.secrets import masked
from ugrl.text import markdown

SETTING, KEEP = "method.setting", "method.contrast.keep"
D_CLS, D_SEG = "method.uncertainty.d_cls", "method.contrast.d_seg"
SEG, CAM, GFLOP = "seg_miou", "cam_miou", "gflop"
SETTINGS = ("Base", "I", "II", "III", "IV")
PRINTED = {
    CAM: dict(zip(SETTINGS, (65.3, 69.7, 72.5, 74.8, 77.9), strict=True)),
    SEG: dict(zip(SETTINGS, (63.4, 68.2, 70.4, 74.0, 77.4), strict=True)),
}
# Table 4: segmentation mIoU by K.
PRINTED_KEEP = {
    "VOC": {0.05: 75.8, 0.2: 76.3, 0.35: 77.4, 0.5: 77.0, 0.65: 75.2, 0.8: 74.2},
    "COCO": {0.05: 44.1, 0.2: 47.3, 0.35: 48.2, 0.5: 46.9, 0.65: 45.5, 0.8: 42.7},
}
PICTURE = "paper.png"


@dataclass(frozen=True)
class PaperSection:
    """Measured values beside printed ones.

    Attributes:
        title: Which table or figure.
        header: Of the columns.
        rows: Cells, as text.
        sentences: What they say, and how they were measured.
        image: Name of the picture in the folder of plots, or nothing.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sentences: tuple[str, ...]
    image: str = ""

    def markdown(self) -> str:
        """The section as a file of its own, the picture in ``plots/``."""
        lines = [f"# {markdown(self.title)}", ""]
        if self.rows:
            lines += [_line(self.header), "| --- " * len(self.header) + "|", *map(_line, self.rows), ""]
        for sentence in self.sentences:
            lines += [markdown(masked(sentence)), ""]
        if self.image:
            lines += [f"![{markdown(self.title)}](plots/{self.image})", ""]
        return "\n".join(lines)


@dataclass(frozen=True)
class Cell:
    """What was measured at one setting.

    Attributes:
        key: The searched values that name it.
        row: Its trial, the best one where there are several; ``None`` where none has completed.
        runs: Of that trial, with those of fresh seeds.
        others: Trials of the same setting that are left out.
    """

    key: tuple[Any, ...]
    row: TrialRow | None = None
    runs: tuple[Run, ...] = ()
    others: int = 0


def paper_section(findings: Findings, folder: Path) -> PaperSection | None:
    """The table or figure of the paper that the search is set beside; ``None`` if it names none.

    Args:
        findings: Of the search.
        folder: Of the plots; ``paper.png`` is drawn there for ``table4`` and ``fig7``, and removed otherwise.
    """
    make = MAKERS.get(findings.search.space.paper)
    if make is None:
        return None
    title, paths, build = make
    (folder / PICTURE).unlink(missing_ok=True)
    missing = [p for p in paths if p not in [a.path for a in findings.search.space.search]]
    if missing:
        return PaperSection(title, (), (), (f"Nothing to compare: {' and '.join(missing)} is not searched.",))
    return build(title, findings, folder)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation of two series, ties shared; NaN with fewer than two different values.

    >>> spearman([1, 2, 3], [10, 30, 20])
    0.5
    """
    x, y = _ranks(a), _ranks(b)
    mean = (len(x) + 1) / 2
    top = sum((p - mean) * (q - mean) for p, q in zip(x, y, strict=True))
    below = math.sqrt(sum((p - mean) ** 2 for p in x) * sum((q - mean) ** 2 for q in y))
    return top / below if below else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2 for v in values]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(markdown(masked(c)) for c in cells) + " |"


# -- what was measured ------------------------------------------------------------------------


def _cells(findings: Findings, paths: Sequence[str], keys: Sequence[tuple[Any, ...]] = ()) -> list[Cell]:
    """One cell for each setting that was tried, in order; those of ``keys`` in any case."""
    groups: dict[tuple[Any, ...], list[TrialRow]] = {key: [] for key in keys}
    for r in ranked(findings.rows, findings.search.objectives[0]):
        if all(p in r.params for p in paths):
            groups.setdefault(tuple(r.params[p] for p in paths), []).append(r)
    fresh = {f.trial.number: f.runs for f in findings.finalists}
    made = [
        Cell(key, rows[0], (*rows[0].runs, *fresh.get(rows[0].number, ())), len(rows) - 1) if rows else Cell(key)
        for key, rows in groups.items()
    ]
    return made if keys else sorted(made, key=lambda c: c.key)


def _on_final(cells: Sequence[Cell]) -> bool:
    """Whether every setting that was measured was measured on the untouched split: rows must be comparable."""
    return all(any(r.final for r in c.runs) for c in cells if c.row) and any(c.row for c in cells)


def _measured(cell: Cell, name: str, final: bool) -> Measure:
    """A metric of a cell; costs are not measured on a split."""
    return measure(cell.runs, name, final=final and name != GFLOP)


def _how(findings: Findings, cells: Sequence[Cell], final: bool) -> str:
    space, search = findings.search.space, findings.search
    sees = (
        "which the search sees" if space.steers else "which steers nothing: every point runs to its end with every seed"
    )
    split = f"the untouched split '{space.final.split}'" if final else f"split '{space.split}', {sees}"
    text = f"Measured here: mean ± standard error over seeds, on {split}; configuration {space.config}, "
    text += (
        f"{search.steps} steps. Levels compare with printed ones only where data, backbone and schedule are the same."
    )
    have = [m for c in cells if (m := _measured(c, SEG, final)).known]
    if seed_noise(findings, SEG, final=final).judges_pairs(have):
        text += " All settings ran on the same seeds, and their differences are judged seed by seed."
    if any(c.others for c in cells):
        text += " Where several trials share a setting, the best of them stands for it, which is optimistic."
    return text


def _seeds(cell: Cell, final: bool, name: str = SEG) -> str:
    return str(_measured(cell, name, final).count) if cell.row else "–"


# -- Table 3 ----------------------------------------------------------------------------------


def _table3(title: str, findings: Findings, folder: Path) -> PaperSection:
    cells = _cells(findings, (SETTING,), [(s,) for s in SETTINGS])
    final = _on_final(cells)
    header = ["setting", "seeds"]
    for words in ("CAM", "seg"):
        header += [f"{words} mIoU, %", f"{words} printed", f"{words} − Base", f"{words} − Base, printed"]
    rows = []
    for cell in cells:
        setting = str(cell.key[0])
        line = [setting, _seeds(cell, final)]
        for name in (CAM, SEG):
            printed = PRINTED[name]
            own, base = _measured(cell, name, final), _measured(cells[0], name, final)
            gap = difference(own, base, seed_noise(findings, name, final=final))
            # Full is no row of the paper's table: nothing is printed for it.
            told = setting in printed
            line += [own.short(1) or _absent(cell, findings), f"{printed[setting]:.1f}" if told else "–"]
            based = setting == "Base"
            line += ["" if based or not gap.known else _signed(gap)]
            line += ["" if based else f"{printed[setting] - printed['Base']:+.1f}" if told else "–"]
        rows.append(tuple(line))
    claimed = [cell for cell in cells if cell.key[0] in SETTINGS]
    sentences = [_order(claimed, name, final, findings) for name in (SEG, CAM)]
    return PaperSection(title, tuple(header), tuple(rows), (*filter(None, sentences), _how(findings, cells, final)))


def _absent(cell: Cell, findings: Findings) -> str:
    """Why a setting has no number."""
    if cell.row:
        return "not measured"
    found = {
        "failed" if r.state == "FAIL" else r.state.lower()
        for r in findings.rows
        if r.params.get(SETTING) == cell.key[0]
    }
    return ", ".join(sorted(found)) or "not run"


def _signed(gap: Gap) -> str:
    return ("+" if gap.mean >= 0 else "") + gap.short(1)


def _order(cells: Sequence[Cell], name: str, final: bool, findings: Findings) -> str:
    """One sentence on whether the measured values rise as the paper claims."""
    have = [(str(c.key[0]), m) for c in cells if (m := _measured(c, name, final)).known]
    words = label(name).rsplit(",", 1)[0]
    if len(have) < 2:
        return f"{words}: fewer than two settings have been measured, so the claimed order is not tested yet."
    rho = spearman([m.mean for _, m in have], [PRINTED[name][s] for s, _ in have])
    agreement = f"{rho:.2f}" if math.isfinite(rho) else "undefined: all are equal"
    noise = seed_noise(findings, name, final=final)
    gaps = [(f"{a} → {b}", difference(n, m, noise)) for (a, m), (b, n) in itertools.pairwise(have)]
    up = sum(g.mean > 0 for _, g in gaps)
    text = (
        f"{words}: the claimed order {' < '.join(s for s, _ in have)} has a rank agreement of {agreement} "
        f"(Spearman; 1 is the paper's order); {up} of {plural(len(gaps), 'step')} {'goes' if up == 1 else 'go'} up"
    )
    if not noise.known:
        return f"{text}. With one seed each the noise is not known, so the steps are not judged."
    real = [f"{step} {_signed(g)}" for step, g in gaps if g.real]
    verb = "is" if len(real) == 1 else "are"
    text += f"; {len(real)} {verb} beyond noise: {', '.join(real)}." if real else ", none beyond noise."
    if have[0][0] != "Base":
        return text
    whole = [(s, difference(m, have[0][1], noise)) for s, m in have[1:]]
    apart = [f"{s} {_signed(g)}" for s, g in whole if g.real]
    return f"{text} Against Base, beyond noise: {', '.join(apart) or 'none'}."


# -- Table 4 ----------------------------------------------------------------------------------


def _table4(title: str, findings: Findings, folder: Path) -> PaperSection:
    cells = _cells(findings, (KEEP,))
    final = _on_final(cells)
    chosen = PAPER[KEEP]
    rows = tuple(
        (
            short(cell.key[0]),
            _seeds(cell, final),
            _measured(cell, CAM, final).short(1) or "not measured",
            _measured(cell, SEG, final).short(1) or "not measured",
            *(_printed_keep(printed, cell.key[0]) for printed in PRINTED_KEEP.values()),
        )
        for cell in cells
    )
    sentences = [
        f"The paper prints segmentation mIoU; its best, and its choice, is K {chosen} on both data sets.",
        _best_cell(cells, [("K", KEEP)], final, findings),
    ]
    if sum(_measured(c, CAM, final).known for c in cells) > 1:
        sentences.append(_best_cell(cells, [("K", KEEP)], final, findings, CAM))
    image = _picture(folder, _plot_keep(cells, final), [c for c in cells if _measured(c, SEG, final).known])
    header = ("K", "seeds", "CAM mIoU, %", "seg mIoU, %", *(f"seg printed, {name}" for name in PRINTED_KEEP))
    return PaperSection(title, header, rows, (*sentences, _how(findings, cells, final)), image)


def _printed_keep(printed: dict[float, float], keep: Any) -> str:
    found = [value for k, value in printed.items() if math.isclose(keep, k)]
    return f"{found[0]:.1f}" if found else "not printed"


def _best_cell(
    cells: Sequence[Cell], names: Sequence[tuple[str, str]], final: bool, findings: Findings, name: str = SEG
) -> str:
    """Which setting is best here, and how far the paper's choice is from it."""
    have = [(c, m) for c in cells if (m := _measured(c, name, final)).known]
    if len(have) < 2:
        return "Fewer than two settings have been measured: nothing to compare yet."

    def words(cell: Cell) -> str:
        return ", ".join(f"{word} {short(v)}" for (word, _), v in zip(names, cell.key, strict=True))

    place = max(range(len(have)), key=lambda i: have[i][1].mean)
    (best, top), (lowest, low) = have[place], min(have, key=lambda pair: pair[1].mean)
    measures, noise = [m for _, m in have], seed_noise(findings, name, final=final)
    text = f"Best here: {words(best)} with {top.text()}, {100 * (top.mean - low.mean):.2f} points above the lowest, "
    text += f"{words(lowest)}: {_judged(by_luck(measures, noise))}."
    paths = [p for _, p in names]
    own = next((i for i, (c, _) in enumerate(have) if all(map(_near, c.key, (PAPER[p] for p in paths)))), None)
    if own is None:
        return f"{text} The paper's choice was not measured."
    if own == place:
        return f"{text} It is the paper's choice."
    gap = 100 * (top.mean - measures[own].mean)
    luck = _judged(by_luck(measures, noise, own))
    return f"{text} The paper's choice, {words(have[own][0])}, is {gap:.2f} points below the best: {luck}."


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)


def _judged(luck: float) -> str:
    """What a share of :func:`by_luck` says."""
    if math.isnan(luck):
        return "with one seed each the noise is not known"
    share = f"{100 * luck:.0f} %" if luck >= 0.01 else "less than 1 %"
    words = "beyond noise" if luck < 0.05 else "within noise"
    return f"{words} (seeds alone would give as much in {share} of cases)"


def _picture(folder: Path, plot: Callable[[], Figure], have: Sequence[Cell]) -> str:
    """Draw and name the picture, if there is anything to see."""
    if len(have) < 2:
        return ""
    with plt.rc_context(STYLE):
        save(plot(), folder / PICTURE)
    return PICTURE


def _plot_keep(cells: Sequence[Cell], final: bool) -> Callable[[], Figure]:
    def plot() -> Figure:
        fig, ax = plt.subplots(figsize=(6.2, 3.6))
        for name, color in ((SEG, COLORS["COMPLETE"]), (CAM, COLORS["PRUNED"])):
            _errors(ax, [(c.key[0], _measured(c, name, final)) for c in cells], color, label(name).split(",")[0])
        _choice(ax, PAPER[KEEP])
        ax.set(xlabel="K, share of reliable pixels", ylabel="mIoU, %", title="Table 4: share of reliable pixels")
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return fig

    return plot


def _errors(ax: Axes, points: Sequence[tuple[float, Measure]], color: Any, name: str) -> None:
    """A line with error bars through what is known."""
    have = [(x, m) for x, m in points if m.known]
    if have:
        scale = 1.0 if have[0][1].name == GFLOP else 100.0
        ax.errorbar(
            [x for x, _ in have],
            [scale * m.mean for _, m in have],
            yerr=[0.0 if math.isnan(m.stderr) else scale * m.stderr for _, m in have],
            color=color,
            marker="o",
            ms=5,
            lw=1.4,
            capsize=3,
            label=name,
        )


def _choice(ax: Axes, x: float) -> None:
    ax.axvline(x, color="#666666", ls="--", lw=0.9, label="the paper's choice")


# -- Figure 7 ---------------------------------------------------------------------------------


def _fig7(title: str, findings: Findings, folder: Path) -> PaperSection:
    cells = _cells(findings, (D_CLS, D_SEG))
    final = _on_final(cells)
    chosen = (PAPER[D_CLS], PAPER[D_SEG])
    rows = tuple(
        (
            *map(short, cell.key),
            _seeds(cell, final),
            _measured(cell, SEG, final).short(1) or "not measured",
            show(GFLOP, _measured(cell, GFLOP, final).mean) or "not measured",
            "the peak of both curves" if cell.key == chosen else "a point without a number",
        )
        for cell in cells
    )
    sentences = [
        f"The paper prints curves without numbers and names their peaks: d_cls {chosen[0]} and d_seg {chosen[1]}; it "
        "calls 512 the initial feature dimension.",
        _best_cell(cells, [("d_cls", D_CLS), ("d_seg", D_SEG)], final, findings),
        _compute(cells, final),
    ]
    image = _picture(folder, _plot_widths(cells, final), [c for c in cells if _measured(c, SEG, final).known])
    header = ("d_cls", "d_seg", "seeds", "seg mIoU, %", "GFLOP a step", "printed")
    return PaperSection(title, header, rows, (*filter(None, sentences), _how(findings, cells, final)), image)


def _compute(cells: Sequence[Cell], final: bool) -> str:
    """What the widths cost in operations."""
    have = [(c, m.mean) for c in cells if (m := _measured(c, GFLOP, final)).known]
    if len(have) < 2:
        return ""
    low, high = min(have, key=lambda p: p[1]), max(have, key=lambda p: p[1])
    ends = [f"{flop:.4g} GFLOP at d_cls {cell.key[0]}, d_seg {cell.key[1]}" for cell, flop in (low, high)]
    return f"A training step takes {' and '.join(ends)}: {high[1] / max(low[1], 1e-12):.2f} times as much."


def _plot_widths(cells: Sequence[Cell], final: bool) -> Callable[[], Figure]:
    def plot() -> Figure:
        names = [n for n in (SEG, GFLOP) if any(_measured(c, n, final).known for c in cells)]
        fig, grid = plt.subplots(len(names), 2, figsize=(9.4, 3.1 * len(names) + 0.4), squeeze=False, sharey="row")
        for line, name in zip(grid, names, strict=True):
            for k, ax in enumerate(line):
                _widths(ax, cells, k, name, final)
            line[0].set_ylabel(label(name) if name == SEG else "GFLOP a step")
        for ax in grid[-1]:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=9)
        fig.suptitle("Figure 7: widths of the two hyperdimensional spaces")
        return fig

    return plot


def _widths(ax: Axes, cells: Sequence[Cell], k: int, name: str, final: bool) -> None:
    """A metric over one width, a line for each value of the other."""
    words = ("d_cls", "d_seg")
    others = sorted({c.key[1 - k] for c in cells})
    for place, other in enumerate(others):
        these = sorted((c for c in cells if c.key[1 - k] == other), key=lambda c: c.key[k])
        color = SHADES(place / max(1, len(others) - 1))
        _errors(ax, [(c.key[k], _measured(c, name, final)) for c in these], color, f"{words[1 - k]} {other}")
    ax.axvline((PAPER[D_CLS], PAPER[D_SEG])[k], color=BEST, ls="--", lw=0.9, label="the paper's choice")
    ax.set_xscale("log", base=2)
    ticks = sorted({c.key[k] for c in cells})
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel(words[k])


MAKERS: dict[str, tuple[str, tuple[str, ...], Callable[[str, Findings, Path], PaperSection]]] = {
    "table3": ("Table 3 of the paper: what each part adds", (SETTING,), _table3),
    "table4": ("Table 4 of the paper: the share K of reliable pixels", (KEEP,), _table4),
    "fig7": ("Figure 7 of the paper: the widths d_cls and d_seg", (D_CLS, D_SEG), _fig7),
}
