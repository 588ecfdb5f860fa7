"""``model.weights``: which reader fills which encoder."""

from __future__ import annotations

from ugrl.errors import CheckpointError
from ugrl.model.backbone import Backbone
from ugrl.model.encoder import MiT
from ugrl.model.specs import TIMM
from ugrl.model.weights import WeightReport, load_backbone_weights, locate

#: Sources that are no file and no repository of the hub; only timm's encoders know them.
WORDS = ("timm", "package")


def load_weights(encoder: Backbone, source: str) -> WeightReport:
    """Fill an encoder from what ``model.weights`` names.

    Raises:
        CheckpointError: The source cannot be found, read or downloaded, or does not fit this encoder.
    """
    if isinstance(encoder, MiT):
        _refuse_word(encoder.info.name, source)
        return load_backbone_weights(encoder, source)
    from ugrl.model.timm_backbone import TimmBackbone
    from ugrl.model.timm_weights import load_timm_weights

    assert isinstance(encoder, TimmBackbone)
    return load_timm_weights(encoder, source)


def check_weights(backbone: str, source: str) -> None:
    """Refuse weights that are not at hand.

    Raises:
        CheckpointError: They cannot be found or downloaded.
    """
    if not backbone.startswith(TIMM):
        _refuse_word(backbone, source)
        locate(source)
        return
    from ugrl.model.timm_weights import locate_timm

    locate_timm(backbone, source)


def _refuse_word(backbone: str, source: str) -> None:
    if source in WORDS:
        raise CheckpointError(
            f"model.weights is {source}: that is for backbones of timm; expected for {backbone} a file, a folder or a "
            "hub name such as nvidia/mit-b1"
        )
