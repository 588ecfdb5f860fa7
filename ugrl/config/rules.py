"""Rules between keys: what each value allows alone is not always possible together."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from ugrl.config.keys import show
from ugrl.config.tree import Config
from ugrl.model.specs import SPECS, TIMM, crop_multiple, is_known, least_crop, min_size, no_plain_vit, wrong_weights
from ugrl.text import nearest

# Smallest side of a square for a CAM, in pixels; that of ``eval.side`` is the same.
LEAST_SIDE = 32


class Rule(NamedTuple):
    """A rule between keys.

    Attributes:
        keys: That it reads; where one of them cannot be used, the rule says nothing.
        holds: Whether a configuration keeps it.
        message: What is said where it does not, after "config key".
    """

    keys: tuple[str, ...]
    holds: Callable[[Config], bool]
    message: Callable[[Config], str]


def _least_crop(cfg: Config) -> int:
    """0 for a backbone that another rule refuses."""
    return least_crop(cfg.model.backbone, cfg.method.cam.scales) if is_known(cfg.model.backbone) else 0


def _backbone_text(cfg: Config) -> str:
    name = cfg.model.backbone
    hint = nearest(name, SPECS)
    return f"model.backbone is {show(name)}{hint}; models of timm are called {TIMM}NAME, such as {TIMM}resnet50"


def _multiple_text(cfg: Config) -> str:
    crop, multiple = cfg.data.crop, crop_multiple(cfg.model.backbone)
    below = crop // multiple * multiple
    sizes = f"{below} or {below + multiple}" if below >= _least_crop(cfg) else f"{below + multiple}"
    return f"data.crop is {crop}: {cfg.model.backbone} takes multiples of {multiple} px; expected {sizes}"


def _crop_text(cfg: Config) -> str:
    backbone = cfg.model.backbone
    return (
        f"data.crop is {cfg.data.crop}: at {min(cfg.method.cam.scales):g}, the smallest of method.cam.scales, it is "
        f"smaller than the {min_size(backbone)} px that {backbone} needs; expected data.crop ≥ {_least_crop(cfg)}"
    )


def _warmup(key: str) -> Rule:
    """A warm-up ends before the run does."""

    def holds(cfg: Config) -> bool:
        return cfg.train.at(getattr(cfg.train, key)) < max(2, cfg.train.steps)

    def message(cfg: Config) -> str:
        return f"train.{key} is {getattr(cfg.train, key)}; expected < train.steps {cfg.train.steps}"

    return Rule((f"train.{key}", "train.steps"), holds, message)


def _is_folder_name(cfg: Config) -> bool:
    name = cfg.name
    return bool(name) and "/" not in name and name not in (".", "..") and len(name.encode()) <= 200


RULES = (
    Rule(("model.backbone",), lambda cfg: is_known(cfg.model.backbone), _backbone_text),
    Rule(
        ("model.backbone", "model.output_stride"),
        lambda cfg: cfg.model.output_stride in ((None,) if cfg.model.backbone in SPECS else (None, 8, 16, 32)),
        lambda cfg: (
            f"model.output_stride is {cfg.model.output_stride}; expected "
            + (f"null: {cfg.model.backbone} has its own" if cfg.model.backbone in SPECS else "8, 16, 32 or null")
        ),
    ),
    Rule(
        ("model.backbone", "model.weights"),
        lambda cfg: not is_known(cfg.model.backbone) or not wrong_weights(cfg.model.backbone, cfg.model.weights),
        lambda cfg: wrong_weights(cfg.model.backbone, cfg.model.weights),
    ),
    Rule(
        ("model.backbone", "model.aux_classifier"),
        lambda cfg: cfg.model.aux_classifier is None or cfg.model.backbone.startswith(TIMM),
        lambda cfg: no_plain_vit(cfg.model.backbone, cfg.model.aux_classifier or 0),
    ),
    Rule(
        ("method.cam.affinity_from", "model.aux_classifier"),
        lambda cfg: cfg.method.cam.affinity_from == "main" or cfg.model.aux_classifier is not None,
        lambda cfg: "method.cam.affinity_from is aux; expected main, or model.aux_classifier=2: there is none now",
    ),
    Rule(
        ("data.crop", "model.backbone"),
        lambda cfg: cfg.data.crop % crop_multiple(cfg.model.backbone) == 0,
        _multiple_text,
    ),
    Rule(
        ("data.scale_min", "data.scale_max"),
        lambda cfg: cfg.data.scale_min <= cfg.data.scale_max,
        lambda cfg: f"data.scale_min is {cfg.data.scale_min}; expected ≤ data.scale_max {cfg.data.scale_max}",
    ),
    Rule(
        ("method.cam.low", "method.cam.high"),
        lambda cfg: cfg.method.cam.low <= cfg.method.cam.high,
        lambda cfg: f"method.cam.low is {cfg.method.cam.low}; expected ≤ method.cam.high {cfg.method.cam.high}",
    ),
    Rule(
        ("method.cam.propagate", "method.loss.lambda3", "method.setting"),
        lambda cfg: cfg.method.cam.propagate == "none" or cfg.method.loss.lambda3 > 0 or cfg.method.setting == "Full",
        lambda cfg: (
            f"method.cam.propagate is {cfg.method.cam.propagate}, and method.loss.lambda3 is 0: nothing trains the "
            "affinity along which the CAM would walk; expected none, or a larger lambda3"
        ),
    ),
    Rule(
        ("eval.cam_side",),
        lambda cfg: not 0 < cfg.eval.cam_side < LEAST_SIDE,
        lambda cfg: f"eval.cam_side is {cfg.eval.cam_side}; expected 0 or ≥ {LEAST_SIDE}",
    ),
    Rule(
        ("eval.cam_scales",),
        lambda cfg: cfg.eval.cam_scales is None or 1.0 in cfg.eval.cam_scales,
        lambda cfg: f"eval.cam_scales is {list(cfg.eval.cam_scales or ())}; expected 1.0 among them, or null",
    ),
    Rule(
        ("method.cam.scales",),
        lambda cfg: 1.0 in cfg.method.cam.scales,
        lambda cfg: (
            f"method.cam.scales is {list(cfg.method.cam.scales)}; expected 1.0 among them: it carries the affinity"
        ),
    ),
    Rule(
        ("method.cam.mode", "method.cam.share"),
        lambda cfg: cfg.method.cam.mode == "eval" or cfg.method.cam.share in ("exact", "never"),
        lambda cfg: (
            f"method.cam.share is {cfg.method.cam.share}; expected exact or never where method.cam.mode is train: "
            "each of its passes drops other branches"
        ),
    ),
    Rule(
        ("method.cam.propagate", "method.cam.refine"),
        lambda cfg: cfg.method.cam.propagate != "afa" or cfg.method.cam.refine == "par",
        lambda cfg: (
            f"method.cam.propagate is afa, which refines what it propagates, and method.cam.refine is "
            f"{cfg.method.cam.refine}; expected par, or method.cam.propagate affinity"
        ),
    ),
    Rule(
        (
            "method.uncertainty.background_prototypes",
            "method.uncertainty.class_prototypes",
            "method.uncertainty.votes",
            "method.uncertainty.encoding",
        ),
        lambda cfg: (
            max(cfg.method.uncertainty.background_prototypes, cfg.method.uncertainty.class_prototypes) == 1
            or (cfg.method.uncertainty.votes, cfg.method.uncertainty.encoding) == ("position", "linear")
        ),
        lambda cfg: (
            f"method.uncertainty.background_prototypes is {cfg.method.uncertainty.background_prototypes} and "
            f"class_prototypes {cfg.method.uncertainty.class_prototypes}; expected 1 of each, or "
            "method.uncertainty.votes position and encoding linear"
        ),
    ),
    Rule(
        ("method.uncertainty.classifier_weight", "method.uncertainty.decoder_weight"),
        lambda cfg: cfg.method.uncertainty.classifier_weight + cfg.method.uncertainty.decoder_weight < 1,
        lambda cfg: (
            f"method.uncertainty.classifier_weight is {cfg.method.uncertainty.classifier_weight:g} and decoder_weight "
            f"{cfg.method.uncertainty.decoder_weight:g}; expected a sum below 1, of which the prototypes have the rest"
        ),
    ),
    Rule(
        ("method.pseudo.decoder_weight", "method.pseudo.source"),
        lambda cfg: cfg.method.pseudo.decoder_weight == 0 or cfg.method.pseudo.source == "cam+prototypes",
        lambda cfg: (
            f"method.pseudo.decoder_weight is {cfg.method.pseudo.decoder_weight:g}, and method.pseudo.source "
            f"{cfg.method.pseudo.source}, where the decoder has no say; expected 0, or cam+prototypes"
        ),
    ),
    Rule(
        ("method.pseudo.source", "method.cam.propagate"),
        lambda cfg: cfg.method.pseudo.source not in ("teacher", "agree") or cfg.method.cam.propagate != "afa",
        lambda cfg: (
            f"method.pseudo.source is {cfg.method.pseudo.source}, and method.cam.propagate is afa, which walks for "
            "labels of the CAM alone; expected none or affinity"
        ),
    ),
    Rule(
        ("method.pseudo.source", "method.setting"),
        lambda cfg: cfg.method.pseudo.source not in ("teacher", "agree") or cfg.method.setting != "Full",
        lambda cfg: (
            f"method.pseudo.source is {cfg.method.pseudo.source}, and method.setting Full learns from the true masks; "
            "expected cam, or another setting"
        ),
    ),
    Rule(
        ("name",),
        _is_folder_name,
        lambda cfg: f"name is {show(cfg.name)}; expected a name that a folder can have",
    ),
    Rule(
        ("data.crop", "model.backbone", "method.cam.scales"),
        lambda cfg: cfg.data.crop >= _least_crop(cfg),
        _crop_text,
    ),
    _warmup("cls_warmup_iters"),
    _warmup("lr_warmup_iters"),
)


def broken_rules(cfg: Config, unusable: Collection[str]) -> list[str]:
    """What the rules say against a configuration.

    Args:
        cfg: The configuration; keys that cannot be used have their defaults.
        unusable: Paths of those keys, and of sections, which end in a dot.

    Returns:
        One line for each broken rule that reads none of those keys.
    """

    def readable(key: str) -> bool:
        return not any(key == bad or (bad.endswith(".") and key.startswith(bad)) for bad in unusable)

    return [
        f"config key {rule.message(cfg)}" for rule in RULES if all(map(readable, rule.keys)) and not rule.holds(cfg)
    ]
