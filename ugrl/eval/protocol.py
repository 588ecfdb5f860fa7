"""How others measure: named sets of options, so that a number can be set beside a printed one.

``native``: each image at its own size, one scale, no CRF, as the UGRL authors' public code validates.
``afa``, ``toco``, ``seco``: what the public code of AFA (CVPR 2022), ToCo (CVPR 2023) and SeCo (CVPR 2024) does for
the segmentation scores that their papers print.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ugrl.config import EvalConfig

_PLAIN: dict[str, Any] = {
    "seg_scales": (1.0,),
    "mirror": False,
    "mirror_by": "mean",
    "combine": "mean",
    "combine_of": "probabilities",
    "combine_at": "image",
    "resize": "native",
    "side": 512,
    "rounding": "nearest",
    "tag_prior": 0.0,
    "cam_side": 0,
    "cam_scales": None,
    "crf": False,
}
_FIELD: dict[str, Any] = {
    **_PLAIN,
    "mirror": True,
    "combine": "max",
    "combine_of": "logits",
    "rounding": "floor",
    "crf": True,
    "crf_iterations": 10,
    "crf_bi_w": 4.0,
    "crf_bi_rgb_std": 5.0,
}
_TOCO: dict[str, Any] = {
    **_FIELD,
    "seg_scales": (1.0, 1.5, 1.25),
    "mirror_by": "sum",
    "cam_side": 448,
    "crf_pos_w": 1.0,
    "crf_pos_std": 1.0,
    "crf_bi_xy_std": 121.0,
}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "native": _PLAIN,
    "afa": {
        **_FIELD,
        "resize": "long_side",
        "side": 512,
        "seg_scales": (1.0, 0.5, 0.75),
        "combine_at": "decoder",
        "crf_pos_w": 3.0,
        "crf_pos_std": 3.0,
        "crf_bi_xy_std": 64.0,
    },
    "toco": _TOCO,
    "seco": {**_TOCO, "resize": "square", "side": 448, "seg_scales": (1.0, 1.25, 1.5)},
}
"""Options of ``eval`` by the name of a protocol."""


def choose(own: EvalConfig, name: str | None, given: Mapping[str, Any]) -> tuple[EvalConfig, list[str]]:
    """The options of an evaluation.

    Args:
        own: What the run's configuration says.
        name: A protocol, or ``None``.
        given: Options that were asked for one by one; they win over those of the protocol.

    Returns:
        The options, and what to tell of them: what the protocol sets, and which of it was overruled.
    """
    if name is None:
        return replace(own, **given), []
    preset = PROTOCOLS[name]
    told = [f"protocol {name}: {words({k: v for k, v in preset.items() if k not in given})}"]
    beaten = {k: given[k] for k in preset if k in given and given[k] != preset[k]}
    if beaten:
        instead = words({k: preset[k] for k in beaten})
        told.append(f"given, so not as in protocol {name}: {words(beaten)} (instead of {instead})")
    return replace(own, **{**preset, **given}), told


def words(options: Mapping[str, Any]) -> str:
    """Options as they are written in a configuration.

    >>> words({"seg_scales": (1.0, 0.5), "mirror": True, "crf_pos_w": 3.0})
    'seg_scales=[1,0.5] mirror=true crf_pos_w=3'
    """
    return " ".join(f"{key}={_word(value)}" for key, value in options.items())


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return f"[{','.join(_word(v) for v in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
