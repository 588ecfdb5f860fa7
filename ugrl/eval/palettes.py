"""Colours of classes: VOC's, and ones that colour-blind people tell apart.

A safe palette begins with published colours. It is extended by one rule. Of a fixed grid of colours (steps of 1/8 of
each channel, neither very dark nor nearly white) the next one is that whose least distance to black and to all colours
before it is the largest. The distance of two colours is the least ΔE (CIE 1976, L*a*b*, D65) over normal sight,
protanopia and deuteranopia, which are simulated with the matrices of Machado et al. (2009) at severity 1. So the first
n colours do not depend on how many follow. Black is background in each palette.

Sources: M. Okabe, K. Ito, *Color Universal Design* (2008). P. Tol, *Colour Schemes* (SRON, 2021), "muted". G. Machado,
M. Oliveira, L. Fernandes, *A Physiologically-based Model for Simulation of Color Vision Deficiency* (IEEE TVCG, 2009).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ugrl.errors import ConfigError
from ugrl.eval import PALETTES
from ugrl.eval.palette import voc_palette
from ugrl.text import nearest

OKABE_ITO = ("E69F00", "56B4E9", "009E73", "F0E442", "0072B2", "D55E00", "CC79A7")
TOL_MUTED = ("CC6677", "332288", "DDCC77", "117733", "88CCEE", "882255", "44AA99", "999933", "AA4499")
_BASES = {"safe": OKABE_ITO, "tol": TOL_MUTED}
# A map in [0, 1] from dark blue over teal to yellow: lightness rises all the way, so that grey shows it too.
HEAT = ((13, 8, 80), (60, 75, 170), (32, 144, 140), (120, 200, 90), (253, 231, 37))
#: Pixels that say nothing (255), in every palette, as in VOC's.
IGNORED = (224, 224, 192)

# What linear RGB becomes in the eye, severity 1 (Machado et al. 2009).
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])


@lru_cache(maxsize=8)
def palette(name: str = "voc") -> np.ndarray:
    """The 256 colours of a palette, uint8 (256, 3), read-only.

    Raises:
        ConfigError: There is no such palette.

    >>> palette("safe")[:3].tolist()
    [[0, 0, 0], [230, 159, 0], [86, 180, 233]]
    """
    if name not in PALETTES:
        raise ConfigError(f"palette '{name}' is unknown{nearest(name, PALETTES)}")
    colours = voc_palette() if name == "voc" else _extended(_BASES[name], 254)
    colours.flags.writeable = False
    return colours


# Where the colours of u begin and end. A perfect match has distance 0; halfway between two prototypes a margin is 1,
# and what it tells lies around that.
U_COLOURS = {"distance": (0.0, 1.0), "margin": (0.6, 1.4)}


def u_share(u_HW: np.ndarray, kind: str) -> np.ndarray:
    """How far u lies along the colours of its kind (``method.uncertainty.kind``), in [0, 1]; NaN stays.

    >>> u_share(np.array([0.2, 1.0, 1.6]), "margin").round(2).tolist()
    [0.0, 0.5, 1.0]
    """
    low, high = U_COLOURS[kind]
    return np.clip((u_HW - low) / (high - low), 0, 1)


def heat(x_HW: np.ndarray) -> np.ndarray:
    """A map in [0, 1] in the colours of :data:`HEAT`, uint8 (H, W, 3)."""
    at = np.clip(x_HW, 0, 1) * (len(HEAT) - 1)
    stops = np.array(HEAT, np.float64)
    low = np.minimum(at.astype(int), len(HEAT) - 2)
    part = (at - low)[..., None]
    return (stops[low] * (1 - part) + stops[low + 1] * part).round().astype(np.uint8)


def _extended(base: tuple[str, ...], count: int) -> np.ndarray:
    """Black, ``count`` colours that begin with those of ``base`` (hexadecimal), and the one of ignored pixels."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    candidates_N3 = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    lightness = lab(candidates_N3)[:, 0]
    candidates_N3 = candidates_N3[(lightness > 25) & (lightness < 95)]
    first = [(0, 0, 0), *(tuple(bytes.fromhex(colour)) for colour in base)]
    seen_SN3 = seen(candidates_N3)
    apart_NN = _apart(seen_SN3, seen_SN3)
    least_N = _apart(seen(np.array(first, np.uint8)), seen_SN3).min(0)
    chosen: list[int] = []
    while len(first) + len(chosen) < count + 1:
        chosen.append(int(least_N.argmax()))
        least_N = np.minimum(least_N, apart_NN[chosen[-1]])
    return np.array([*first, *candidates_N3[chosen].tolist(), IGNORED], np.uint8)


def _apart(one_SN3: np.ndarray, other_SM3: np.ndarray) -> np.ndarray:
    """Distances of colours (N, M), for whoever sees them worst."""
    least = np.full((one_SN3.shape[1], other_SM3.shape[1]), np.inf)
    for one_N3, other_M3 in zip(one_SN3, other_SM3, strict=True):
        square = (one_N3[:, None, 0] - other_M3[None, :, 0]) ** 2
        for axis in (1, 2):
            square += (one_N3[:, None, axis] - other_M3[None, :, axis]) ** 2
        np.minimum(least, np.sqrt(square), out=least)
    return least


def seen(colours_N3: np.ndarray) -> np.ndarray:
    """L*a*b* of uint8 sRGB colours as each kind of sight has them, (S, N, 3)."""
    return np.stack([lab(colours_N3, sight) for sight in SIGHTS.values()])


def lab(colours_N3: np.ndarray, sight: np.ndarray | None = None) -> np.ndarray:
    """CIE 1976 L*a*b* of uint8 sRGB colours, (N, 3).

    >>> (lab(np.array([[255, 255, 255], [255, 0, 0]], np.uint8)).round(1) + 0.0).tolist()
    [[100.0, 0.0, 0.0], [53.2, 80.1, 67.2]]
    """
    c = colours_N3 / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    if sight is not None:
        linear = (linear @ sight.T).clip(0, 1)
    t = linear @ _XYZ.T / _WHITE
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[:, 0], f[:, 1], f[:, 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def least_distance(colours_N3: np.ndarray) -> float:
    """ΔE of the two colours that are nearest to each other, for whoever sees them worst."""
    points_SN3 = seen(colours_N3)
    return float(_apart(points_SN3, points_SN3)[np.triu_indices(len(colours_N3), 1)].min())
