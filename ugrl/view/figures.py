"""The paper's figures for a run of one's own, as PNG and PDF."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ugrl.data.reader import ShardReader
from ugrl.errors import DataError
from ugrl.eval.looks import Look
from ugrl.eval.palettes import palette as known_palette
from ugrl.text import line
from ugrl.types import IGNORE
from ugrl.view import pictures
from ugrl.view.collect import Run, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Class pairs that the CAM figure shows of one photograph.
MOST_TAGS = 3
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,  # a class with two dollar signs is no formula
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
}
INK = {"u": "#0072b2", "1 − p": "#d55e00", "the IoU itself": "#777777"}


@dataclass(frozen=True, slots=True)
class Pair:
    """One (image, class) pair: u, the classifier's probability, and the IoU of its CAM."""

    u: float
    p: float
    iou: float


@dataclass(slots=True)
class Found:
    """What the figures are drawn of.

    Attributes:
        runs: One or two; figures of one run are of the first.
        names: Background and the foreground classes.
        shown: Of each run, the photographs that are shown.
        vectors: Class → class vectors r of the first run, (n, D).
        embeddings: Class → mean embeddings of the first run, (n, D').
        pairs: Of the first run, those with a mask.
    """

    runs: Sequence[Run]
    names: tuple[str, ...]
    shown: list[dict[int, Look]]
    vectors: dict[int, list[np.ndarray]] = field(default_factory=dict)
    embeddings: dict[int, list[np.ndarray]] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)


def collect(
    runs: Sequence[Run],
    reader: ShardReader,
    indices: Sequence[int],
    *,
    images: int,
    on_batch: Callable[[int], None] = lambda n: None,
) -> Found:
    """Show photographs to one or two runs.

    Those that the figures show are evenly spaced among the tagged ones, never chosen by how well a run does on them.

    Args:
        runs: Of the same classes as the shards.
        reader: Of the split.
        indices: Positions in the split.
        images: Number of photographs to show.
        on_batch: Told how many photographs a run is through with.

    Raises:
        DataError: A row cannot be read.
    """
    tags = reader.manifest.tags(reader.split)
    tagged = [i for i in indices if tags[i]] or list(indices)
    chosen = {tagged[round(k)] for k in np.linspace(0, len(tagged) - 1, min(images, len(tagged)))}
    found = Found(runs, ("background", *(line(n, 40) for n in reader.manifest.class_names)), [{} for _ in runs])
    for k, run in enumerate(runs):
        embed = k == 0 and run.targets.schedule.contrasts and not run.targets.schedule.warm(run.got.step)
        for batch in looks(run, reader, indices, embed=embed):
            for look in batch:
                if look.index in chosen:
                    found.shown[k][look.index] = look
                if k == 0:
                    _count(found, look)
            on_batch(len(batch))
    return found


def _count(found: Found, look: Look) -> None:
    for c, r in look.vectors.items():
        found.vectors.setdefault(c, []).append(r)
    for c, e in look.embeddings.items():
        found.embeddings.setdefault(c, []).append(e)
    for f, iou in look.cam_iou.items():
        if f in look.u:
            found.pairs.append(Pair(look.u[f], float(look.probs_F[f - 1]), iou))


def draw(found: Found, folder: Path, *, palette: str = "safe") -> tuple[list[str], list[str]]:
    """Draw every figure that there is something to draw of.

    Args:
        found: From :func:`collect`.
        folder: Where ``NAME.png`` and ``NAME.pdf`` go; made if needed.
        palette: One of :data:`ugrl.eval.PALETTES`.

    Returns:
        Names of the figures, and in one line each what was not drawn and why.

    Raises:
        DataError: A file cannot be written.
    """
    import matplotlib

    drawn, notes = [], []
    with matplotlib.rc_context(STYLE):
        for name, make in FIGURES.items():
            made = make(found, known_palette(palette))
            if isinstance(made, str):
                notes.append(f"{name}: {made}")
                continue
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for suffix in ("png", "pdf"):
                    made.savefig(folder / f"{name}.{suffix}", bbox_inches="tight")
            except OSError as error:
                where = line(error.filename or folder / name)
                raise DataError(f"{where}: cannot be written ({error.strerror or error})") from None
            drawn.append(name)
    return drawn, notes


def _grid(rows: int, columns: Sequence[str], shape: tuple[int, int]) -> tuple[Figure, Any]:
    """A figure of photographs, with a title for each column."""
    from matplotlib.figure import Figure

    h, w = shape
    width = 1.75
    figure = Figure(figsize=(width * len(columns), width * min(1.6, h / w) * rows + 0.4), layout="compressed")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, text in zip(axes[0], columns, strict=True):
        ax.set_title(text, fontsize=9)
    return figure, axes


def _of_runs(found: Found, text: str) -> list[str]:
    return [f"{text}, {run.name}" if len(found.runs) > 1 else text for run in found.runs]


def _over(image_HW3: np.ndarray, colour_HW3: np.ndarray, share: float | np.ndarray = 0.6) -> np.ndarray:
    return (image_HW3 * (1 - share) + colour_HW3 * share).round().astype(np.uint8)


def _mask(look: Look, labels_HW: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Labels over the photograph, which background shows."""
    share_HW = np.where(labels_HW == 0, 0.0, np.where(labels_HW == IGNORE, 0.5, 0.75))[..., None]
    return _over(look.image_HW3, colours[labels_HW].astype(np.float64), share_HW)


def cams(found: Found, colours: np.ndarray) -> Figure | str:
    """The CAM of each tag, of one or two runs, beside the true mask of its class."""
    rows = [(i, f) for i, look in sorted(found.shown[0].items()) for f in look.tags[:MOST_TAGS]]
    if not rows:
        return "no photograph has a tag"
    truth = any(look.truth_HW is not None for look in found.shown[0].values())
    columns = ["photograph", *_of_runs(found, "CAM"), *(["true mask"] if truth else [])]
    figure, axes = _grid(len(rows), columns, found.shown[0][rows[0][0]].pseudo_HW.shape)
    for row, (i, f) in enumerate(rows):
        look = found.shown[0][i]
        axes[row, 0].imshow(look.image_HW3)
        axes[row, 0].text(
            -0.04, 0.5, found.names[f], transform=axes[row, 0].transAxes, rotation=90, ha="right", va="center"
        )
        for k, shown in enumerate(found.shown):
            axes[row, 1 + k].imshow(_over(look.image_HW3, pictures.heat(shown[i].cams[f])))
        if look.truth_HW is not None:
            axes[row, -1].imshow(_mask(look, np.where(look.truth_HW == f, f, 0).astype(np.uint8), colours))
    _scale(figure, axes, "CAM")
    return figure


def masks(found: Found, colours: np.ndarray) -> Figure | str:
    """Photograph, CAM, pseudo-label, prediction and true mask."""
    first = found.shown[0]
    truth = any(look.truth_HW is not None for look in first.values())
    own = [text for k in range(len(found.runs)) for text in (_of_runs(found, "pseudo-label")[k],
                                                             _of_runs(found, "prediction")[k])]  # fmt: skip
    columns = ["photograph", *_of_runs(found, "CAM"), *own, *(["true mask"] if truth else [])]
    figure, axes = _grid(len(first), columns, next(iter(first.values())).pseudo_HW.shape)
    used: set[int] = set()
    for row, i in enumerate(sorted(first)):
        look = first[i]
        shown = [look.image_HW3, *(_over(look.image_HW3, pictures.heat(s[i].cam_HW)) for s in found.shown)]
        label_maps = [m for s in found.shown for m in (s[i].pseudo_HW, s[i].predicted_HW)]
        if look.truth_HW is not None:
            label_maps.append(look.truth_HW)
        shown += [_mask(look, m, colours) for m in label_maps]
        used |= {int(c) for m in label_maps for c in np.unique(m)} - {0}
        for ax, picture in zip(axes[row], shown, strict=False):
            ax.imshow(picture)
    _legend(figure, found, sorted(used), colours)
    return figure


def _legend(figure: Figure, found: Found, used: Sequence[int], colours: np.ndarray) -> None:
    from matplotlib.patches import Patch

    names = {c: "undecided or ignored" if c == IGNORE else found.names[c] for c in used}
    patches = [Patch(color=colours[c] / 255.0, label=name) for c, name in names.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(6, max(1, len(patches))), fontsize=8)


def _scale(figure: Figure, axes: Any, text: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap

    map = LinearSegmentedColormap.from_list("heat", np.array(pictures.HEAT) / 255.0)
    figure.colorbar(ScalarMappable(cmap=map), ax=axes, location="bottom", shrink=0.4, pad=0.02, aspect=40, label=text)


def prototypes(found: Found, colours: np.ndarray) -> Figure | str:
    """Cosines between classes: of their mean vectors, of these less what all share, and of their hypervectors."""
    from matplotlib.figure import Figure

    own = found.runs[0].got.prototypes
    has = (own.prototypes_Cd.norm(dim=-1) > 0) & own.mean_seen_C
    classes = has.nonzero().flatten().tolist()
    if len(classes) < 2:
        return f"{len(classes) or 'no'} class has a prototype after step {found.runs[0].got.step}"
    mean_CD = own.mean_CD[has].float()
    panels = {
        "mean class vectors\n(no projection)": mean_CD,
        "less their common mean\n(no projection)": mean_CD - mean_CD.mean(0, keepdim=True),
        f"prototypes\n({own.prototypes_Cd.shape[1]}-d hypervectors)": own.prototypes_Cd[has].float(),
    }
    n = len(classes)
    side = max(2.3, 0.2 * n + 1.2)
    figure = Figure(figsize=(3 * side + 1, side + 0.9), layout="constrained")
    axes = figure.subplots(1, 3, squeeze=False)[0]
    names = [found.names[c] for c in classes]
    for ax, (title, x_CD) in zip(axes, panels.items(), strict=True):
        matrix = cosines(x_CD)
        drawn = ax.imshow(matrix, vmin=-1, vmax=1, cmap="PuOr")
        off = matrix[~np.eye(n, dtype=bool)]
        ax.set_title(f"{title}\nmean of different classes {_signed(off.mean())}", fontsize=8.5)
        ax.set_xticks(range(n), names, rotation=90, fontsize=7)
        ax.set_yticks(range(n), names if ax is axes[0] else [""] * n, fontsize=7)
        for i in range(n) if n <= 8 else ():
            for j in range(n):
                shade = "white" if abs(matrix[i, j]) > 0.6 else "black"
                ax.text(j, i, _signed(matrix[i, j]), ha="center", va="center", fontsize=6.5, color=shade)
    figure.colorbar(drawn, ax=list(axes), label="cosine", shrink=0.8, pad=0.01)
    return figure


def _signed(x: float) -> str:
    return f"{x:.2f}".replace("-", "−")


def cosines(x_CD: torch.Tensor) -> np.ndarray:
    """Cosine of every two rows, (C, C)."""
    unit_CD = torch.nn.functional.normalize(x_CD.double().cpu(), dim=-1)
    return (unit_CD @ unit_CD.mT).numpy()


def principal(x_nD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The two main directions of some rows.

    Returns:
        Coordinates (n, 2), the mean (D,), the directions (2, D), and the share of the variance of each, (2,).

    >>> at, _, _, share = principal(np.array([[0.0, 0, 1], [2, 0, 1], [4, 0, 1]]))
    >>> np.abs(at[:, 0]).round(6).tolist(), share.round(6).tolist()
    ([2.0, 0.0, 2.0], [1.0, 0.0])
    """
    mean_D = x_nD.mean(0)
    _, s, directions = np.linalg.svd(x_nD - mean_D, full_matrices=False)
    two_2D = np.zeros((2, x_nD.shape[1]))
    two_2D[: len(directions[:2])] = directions[:2]
    share = np.zeros(2)
    share[: len(s[:2])] = s[:2] ** 2 / max(float((s**2).sum()), 1e-30)
    return (x_nD - mean_D) @ two_2D.T, mean_D, two_2D, share


def scatter(found: Found, colours: np.ndarray) -> Figure | str:
    """Class vectors, their hypervectors with the prototypes, and pixel embeddings, by principal components."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    own = found.runs[0].got.prototypes
    vectors = {c: np.stack(v) for c, v in sorted(found.vectors.items())}
    if sum(map(len, vectors.values())) < 3:
        return "fewer than three class vectors"
    device = own.mean_CD.device
    codes = {c: _unit(own.encode(torch.from_numpy(v).to(device)).cpu().double().numpy()) for c, v in vectors.items()}
    stars = {c: _unit(own.prototypes_Cd[c : c + 1].cpu().double().numpy()) for c in codes if own.counts_C[c] > 0}
    panels: list[tuple[str, dict[int, np.ndarray], dict[int, np.ndarray]]] = [
        ("class vectors of the encoder", vectors, {}),
        ("their hypervectors; ✕ prototypes", codes, stars),
    ]
    if found.embeddings:
        embeddings = {c: np.stack(e) for c, e in sorted(found.embeddings.items())}
        panels.append(("embeddings of the decoder\n(mean of each class in an image)", embeddings, {}))
    figure = Figure(figsize=(3.5 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    ink = _ink(colours)
    for ax, (title, points, marks) in zip(axes, panels, strict=True):
        _scatter(ax, title, points, marks, ink)
    names = [c for c in vectors]
    handles = [
        Line2D([], [], marker=_marker(c), ls="", color=ink[c], mec="white", mew=0.3, ms=6, label=found.names[c])
        for c in names
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)), fontsize=7.5)
    return figure


def _ink(colours: np.ndarray) -> np.ndarray:
    """Colours on white: background is dark grey."""
    ink = colours / 255.0
    ink[0] = 0.35
    return ink


def _marker(c: int) -> str:
    # Colours repeat in lighter and darker tones from the eighth class on; marks then tell them apart.
    return "osD^v"[(c - 1) // 7 % 5] if c else "."


def _unit(x_nD: np.ndarray) -> np.ndarray:
    return x_nD / np.maximum(np.linalg.norm(x_nD, axis=-1, keepdims=True), 1e-12)


def _scatter(
    ax: Axes, title: str, points: dict[int, np.ndarray], marks: dict[int, np.ndarray], ink: np.ndarray
) -> None:
    at_n2, mean_D, two_2D, share = principal(np.concatenate(list(points.values())).astype(np.float64))
    start = 0
    for c, rows in points.items():
        at = at_n2[start : start + len(rows)]
        start += len(rows)
        ax.scatter(at[:, 0], at[:, 1], s=14, marker=_marker(c), color=[ink[c]], linewidths=0.2, edgecolors="white")
    for c, row in marks.items():
        (x, y) = ((row - mean_D) @ two_2D.T)[0]
        ax.scatter([x], [y], s=70, marker="X", color=[ink[c]], linewidths=1.0, edgecolors="black", zorder=3)
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(f"first component ({100 * share[0]:.0f} % of the variance)", fontsize=8)
    ax.set_ylabel(f"second ({100 * share[1]:.0f} %)", fontsize=8)
    ax.tick_params(labelsize=7)


def risk_coverage(score_n: np.ndarray, risk_n: np.ndarray) -> np.ndarray:
    """Mean risk of the k entries of the lowest score, for k = 1 … n; equal scores share their mean risk.

    >>> risk_coverage(np.array([0.1, 0.9, 0.1]), np.array([0.0, 1.0, 0.5])).tolist()
    [0.25, 0.25, 0.5]
    """
    _, group = np.unique(score_n, return_inverse=True)
    mean = np.bincount(group, weights=risk_n) / np.bincount(group)
    ordered = np.sort(group, kind="stable")
    return np.cumsum(mean[ordered]) / np.arange(1, len(score_n) + 1)


def risk(found: Found, colours: np.ndarray) -> Figure | str:
    """Risk against coverage: pairs in the order of u and of 1 − p, and the error of their CAMs."""
    from matplotlib.figure import Figure

    if len(found.pairs) < 2:
        return "fewer than two (image, class) pairs have a mask and a known u"
    risk_n = np.array([1 - pair.iou for pair in found.pairs])
    scores = {
        "u": np.array([pair.u for pair in found.pairs]),
        "1 − p": np.array([1 - pair.p for pair in found.pairs]),
        "the IoU itself": risk_n,
    }
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    ax = figure.subplots()
    coverage = np.arange(1, len(risk_n) + 1) / len(risk_n)
    for name, score_n in scores.items():
        curve = risk_coverage(score_n, risk_n)
        ls = ":" if name == "the IoU itself" else "--" if name == "1 − p" else "-"
        ax.plot(coverage, curve, color=INK[name], ls=ls, label=f"by {name}: area {curve.mean():.3f}")
    whole = float(risk_n.mean())
    ax.axhline(whole, color="#999999", lw=0.8, label=f"in no order: {whole:.3f}")
    ax.set_xlabel(f"coverage: share of the {len(risk_n)} (image, class) pairs kept")
    ax.set_ylabel("risk: mean 1 − IoU of their CAMs")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, math.ceil(10 * max(0.1, min(1.0, max(risk_n.mean() * 1.35, 0.1)))) / 10)
    ax.legend(fontsize=8, loc="best")
    return figure


FIGURES: dict[str, Callable[[Found, np.ndarray], Any]] = {
    "cam": cams,
    "masks": masks,
    "prototypes": prototypes,
    "scatter": scatter,
    "risk": risk,
}
