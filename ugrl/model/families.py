"""From the name of a backbone to the encoder."""

from __future__ import annotations

from dataclasses import replace

from ugrl.errors import ConfigError
from ugrl.model.backbone import Backbone
from ugrl.model.encoder import MiT
from ugrl.model.specs import SPECS, TIMM, is_known, no_plain_vit
from ugrl.text import nearest


def make_backbone(
    name: str,
    *,
    drop_path: float = 0.0,
    output_stride: int | None = None,
    frozen: str = "none",
    aux: int | None = None,
) -> Backbone:
    """An encoder with fresh weights from torch's current random state.

    Args:
        name: A key of :data:`ugrl.model.specs.SPECS`, or ``timm/NAME``.
        drop_path: Drop rate of the last residual branch.
        output_stride: Of a convolutional network of timm.
        frozen: What has no gradient: see :data:`ugrl.model.backbone.FROZEN`.
        aux: Blocks before the last one, of a plain ViT, whose map is given as well.

    Raises:
        ConfigError: The name is unknown, or the model cannot be used.
    """
    if not is_known(name):
        raise ConfigError(f"model.backbone: got '{name}'{nearest(name, SPECS)}; or {TIMM}NAME, a model of timm")
    encoder: Backbone
    if aux is not None and not name.startswith(TIMM):
        raise ConfigError(no_plain_vit(name, aux))
    if name in SPECS:
        encoder = MiT(replace(SPECS[name], drop_path=drop_path), name)
    else:
        from ugrl.model.timm_backbone import TimmBackbone

        encoder = TimmBackbone(name, drop_path=drop_path, output_stride=output_stride, aux=aux)
    encoder.freeze(frozen)
    return encoder


def check_backbone(name: str, aux: int | None = None) -> None:
    """Refuse a model that timm does not have, or whose family cannot be used, before anything is built.

    Args:
        name: ``model.backbone``.
        aux: ``model.aux_classifier``.

    Raises:
        ConfigError: Names the nearest model, or the families.
    """
    if name.startswith(TIMM):
        from ugrl.model.timm_backbone import check_aux, family_of

        check_aux(name, family_of(name), aux)
