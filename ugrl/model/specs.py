"""The shapes of the encoders, as numbers: whoever checks a configuration needs no torch for them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

Four = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class MiTSpec:
    """The shape of an encoder; one entry per stage.

    Attributes:
        dims: Channels of the stage's map.
        depths: Number of transformer blocks.
        heads: Number of attention heads.
        sr_ratios: Side of the square of positions that share one key and value.
        mlp_ratio: Hidden width of the feed-forward part over the stage's width.
        strides: Factor of downsampling on entry to the stage.
        drop_path: Drop rate of the last block; the others rise to it linearly from 0.
    """

    dims: Four
    depths: Four
    heads: Four = (1, 2, 5, 8)
    sr_ratios: Four = (8, 4, 2, 1)
    mlp_ratio: int = 4
    strides: Four = (4, 2, 2, 1)
    drop_path: float = 0.1

    @property
    def min_size(self) -> int:
        """Shortest image side, in pixels, that leaves every stage a key."""
        return max(math.prod(self.strides[: i + 1]) * sr for i, sr in enumerate(self.sr_ratios))


_WIDE = (64, 128, 320, 512)

SPECS: dict[str, MiTSpec] = {
    "mit_b0": MiTSpec((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": MiTSpec(_WIDE, (2, 2, 2, 2)),
    "mit_b2": MiTSpec(_WIDE, (3, 4, 6, 3)),
    "mit_b3": MiTSpec(_WIDE, (3, 4, 18, 3)),
    "mit_b4": MiTSpec(_WIDE, (3, 8, 27, 3)),
    "mit_b5": MiTSpec(_WIDE, (3, 6, 40, 3)),
    # A CPU size: stride 8 at the end, so that a 96 px crop still has a 12 x 12 grid.
    "tiny": MiTSpec((32, 64, 128, 192), (1, 1, 1, 2), (1, 2, 4, 6), (4, 2, 1, 1), 3, (4, 2, 1, 1)),
}


def scaled(size: tuple[int, int], scale: float, least: int) -> tuple[int, int]:
    """Sides of a rescaled image: whole pixels, and no fewer than the encoder needs.

    >>> scaled((100, 40), 0.5, 32)
    (50, 32)
    """
    return max(least, round(size[0] * scale)), max(least, round(size[1] * scale))


#: What a backbone of timm is called in a configuration: ``timm/resnet50``.
TIMM = "timm/"
#: Shortest image side of a backbone of timm, in pixels: one cell of the coarsest stride there is.
TIMM_LEAST = 32


def no_plain_vit(backbone: str, aux: int) -> str:
    """What is said where an encoder cannot have an auxiliary classifier."""
    return (
        f"model.aux_classifier is {aux}: {backbone} is no plain ViT; expected null, or a backbone such as "
        f"{TIMM}vit_small_patch16_224"
    )


#: Repositories whose name tells which MiT is in them: ``nvidia/mit-b1``, ``nvidia/segformer-b1-finetuned-…``.
_MIT_REPOSITORY = re.compile(r"(?:[\w.-]+/)?(?:mit|segformer)-(b[0-5])(?![0-9a-z])[\w.-]*")


def wrong_weights(backbone: str, weights: str | None) -> str:
    """What is said where the name of the weights tells that they are another encoder's; empty where it does not.

    >>> wrong_weights("mit_b1", "nvidia/mit-b1"), wrong_weights("mit_b1", "weights/mine.pth")
    ('', '')
    >>> wrong_weights("mit_b0", "nvidia/mit-b1")
    'model.weights is nvidia/mit-b1, which holds mit_b1 while model.backbone is mit_b0; expected nvidia/mit-b0'
    """
    match = _MIT_REPOSITORY.fullmatch(weights or "")
    if match is None or backbone == (holds := f"mit_{match[1]}"):
        return ""
    if backbone.startswith(TIMM):
        expected = "timm (those that timm names), package (tf_efficientnet_lite0 to 2), a file, or null"
    elif backbone.startswith("mit_"):
        expected = f"nvidia/mit-{backbone.removeprefix('mit_')}"
    else:
        expected = "null or a file: there are none on a hub"
    return f"model.weights is {weights}, which holds {holds} while model.backbone is {backbone}; expected {expected}"


def is_known(backbone: str) -> bool:
    """Whether a name can be one of ``model.backbone``; whether timm has such a model is asked later."""
    return backbone in SPECS or (backbone.startswith(TIMM) and len(backbone) > len(TIMM))


def min_size(backbone: str) -> int:
    """Shortest image side that a backbone takes, in pixels.

    >>> min_size("mit_b1"), min_size("timm/resnet50")
    (32, 32)
    """
    return SPECS[backbone].min_size if backbone in SPECS else TIMM_LEAST


def crop_multiple(backbone: str) -> int:
    """What a training crop must be a multiple of, in pixels; other images are resized to the nearest multiple.

    A plain ViT takes whole patches. ConvNeXt, Swin and Hiera halve a grid of patches of 4 px three times.

    >>> crop_multiple("mit_b1"), crop_multiple("timm/vit_small_patch14_dinov2"), crop_multiple("timm/resnet50")
    (1, 14, 1)
    >>> crop_multiple("timm/swin_tiny_patch4_window7_224"), crop_multiple("timm/test_vit")
    (32, 16)
    """
    if not backbone.startswith(TIMM):
        return 1
    name = backbone.removeprefix(TIMM)
    if name.startswith(("swin_", "hiera_")) or "convnext" in name:
        return 32
    if patch := re.search(r"patch(\d+)", name):
        return int(patch[1])
    return 16 if name.startswith("test_vit") else 1


def fitted(side: int, multiple: int, least: int) -> int:
    """The multiple that is nearest to a side, and no smaller than the backbone takes.

    >>> fitted(100, 16, 32), fitted(375, 14, 28), fitted(333, 1, 32)
    (96, 378, 333)
    """
    return max(math.ceil(least / multiple), (2 * side + multiple) // (2 * multiple)) * multiple


def least_crop(backbone: str, scales: Sequence[float]) -> int:
    """The smallest crop whose smallest rescaled image still feeds every stage.

    >>> least_crop("mit_b1", (1.0, 0.5)), least_crop("tiny", (1.0,)), least_crop("timm/test_vit", (1.0, 0.5))
    (63, 16, 64)
    """
    least, smallest = min_size(backbone), max(1e-6, min(*scales, 1.0))
    crop = math.ceil((least - 0.5) / smallest)
    crop = crop if round(crop * smallest) >= least else crop + 1
    multiple = crop_multiple(backbone)
    return -(-crop // multiple) * multiple
