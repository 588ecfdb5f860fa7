"""What the network asks of an encoder, whatever family it is of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ugrl.errors import UgrlError
from ugrl.model.noise import Noise
from ugrl.model.specs import Four

#: F1…F4; behind them the map that an auxiliary classifier reads, where there is one.
Features = tuple[Tensor, ...]
#: Queries and keys (B, N, D) of some blocks, heads side by side.
Pairs = tuple[tuple[Tensor, Tensor], ...]

#: ImageNet statistics of RGB in [0, 1]: those that every image of this project is normalised with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Parts of an encoder that can be told to keep their weights: ``f2`` is all that the map F2 is made of.
FROZEN = ("none", "stem", "f1", "f2", "f3", "all")


@dataclass(frozen=True, slots=True)
class BackboneInfo:
    """The facts of an encoder.

    Attributes:
        name: As ``model.backbone`` says it.
        dims: Channels of F1…F4.
        reductions: Pixels per cell of F1…F4.
        ups: Factors by which the decoder enlarges F1…F4 first: 1 but for plain ViTs, whose maps have one size.
        min_size: Shortest image side, in pixels.
        multiple: Images whose sides are no multiples of it are resized to the nearest ones within the encoder.
        heads: Heads of a block whose queries and keys are given; 0: none are.
        blocks: Blocks whose queries and keys are given.
        head_dim: Channels of a head.
        mean: Of RGB in [0, 1], that its weights were trained with.
        std: Of RGB in [0, 1], that its weights were trained with.
        licence: Of its published weights, where it is known.
    """

    name: str
    dims: Four
    reductions: Four
    ups: Four = (1, 1, 1, 1)
    min_size: int = 32
    multiple: int = 1
    heads: int = 0
    blocks: int = 0
    head_dim: int = 0
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    licence: str | None = None

    @property
    def affinity(self) -> str:
        """``attention`` where the encoder has square self-attention, else ``projection``: g_cls makes its own."""
        return "attention" if self.heads else "projection"

    @property
    def stride(self) -> float:
        """Pixels of the image per cell of the decoder's map."""
        step, rest = divmod(self.reductions[0], self.ups[0])
        return step if rest == 0 else self.reductions[0] / self.ups[0]


class Backbone(nn.Module):
    """An encoder: images → four maps, and the queries and keys of its last blocks where they are of use.

    Attributes:
        info: Its facts.
        layers: L, residual branches that drop-path may drop.
    """

    info: BackboneInfo
    layers: int

    def forward(self, images_B3HW: Tensor, noise: Noise | None = None) -> tuple[Features, Pairs]:
        """Features of four scales, and what attention logits are made of.

        Args:
            images_B3HW: Images normalised with :data:`MEAN` and :data:`STD`, any size from ``info.min_size`` on.
            noise: Drop-path numbers; without them nothing is dropped, whatever the mode.

        Returns:
            F1…F4, (B, D_i, h_i, w_i), with an auxiliary map of F4's shape behind them where the encoder was told to
            give one (``model.aux_classifier``); and for each of ``info.blocks`` blocks its queries and keys
            (B, N, D) on F4's grid, heads side by side: see :func:`ugrl.model.encoder.attention_logits`.

        Raises:
            UgrlError: An image side is too short.
        """
        raise NotImplementedError

    def layer_ids(self) -> Mapping[str, int]:
        """The layer of each parameter, by name: 0 is the stem, the last ones are next to F4."""
        raise NotImplementedError

    def undecayed(self) -> frozenset[str]:
        """Names of parameters, other than those of norms, that weight decay leaves alone."""
        return frozenset()

    def largest_map(self, height: int, width: int) -> int:
        """About how many numbers the largest map of one image has."""
        raise NotImplementedError

    def check_size(self, images_B3HW: Tensor) -> None:
        """Refuse images that are too small.

        Raises:
            UgrlError: An image side is too short.
        """
        if min(images_B3HW.shape[-2:]) < self.info.min_size:
            raise UgrlError(
                f"images of {images_B3HW.shape[-2]}x{images_B3HW.shape[-1]} px are too small for this backbone, "
                f"expected sides of at least {self.info.min_size} px"
            )

    def freeze(self, part: str) -> None:
        """Let a part (one of :data:`FROZEN`) have no gradient.

        Raises:
            UgrlError: There is no such part.
        """
        if part not in FROZEN:
            raise UgrlError(f"model.frozen: got '{part}', expected {', '.join(FROZEN)}")
        if part == "stem":
            kept = {name for name, layer in self.layer_ids().items() if layer == 0}
        elif part.startswith("f"):
            kept = self._behind(int(part[1]) - 1)
        else:
            kept = set(dict(self.named_parameters())) if part == "all" else set()
        for name, p in self.named_parameters():
            p.requires_grad_(name not in kept)

    def _behind(self, at: int) -> set[str]:
        """The parameters that a map, counted from 0, is made of: those that have a gradient of it."""
        named = dict(self.named_parameters())
        weight = next(iter(named.values()))
        side = self.info.min_size
        with torch.enable_grad():
            (maps, _) = self(torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype))
            grads = torch.autograd.grad(maps[at].sum(), list(named.values()), allow_unused=True)
        return {name for name, grad in zip(named, grads, strict=True) if grad is not None}


def depth_ids(names: list[str], depths: tuple[int, ...]) -> dict[str, int]:
    """Layer ids of parameters named ``stages.S.embed.…``, ``stages.S.blocks.I.…`` and ``stages.S.norm.…``.

    >>> depth_ids(["stages.0.embed.proj.bias", "stages.1.embed.norm.bias", "stages.1.blocks.1.q"], (2, 2))
    {'stages.0.embed.proj.bias': 0, 'stages.1.embed.norm.bias': 3, 'stages.1.blocks.1.q': 4}
    """
    found: dict[str, int] = {}
    for name in names:
        match = re.match(r"stages\.(\d+)\.(embed|norm|blocks\.(\d+))", name)
        assert match is not None, name
        stage = int(match[1])
        first = 1 + sum(depths[:stage])
        at = {"embed": first, "norm": first + depths[stage] - 1}.get(match[2])
        found[name] = first + int(match[3]) if at is None else 0 if stage == 0 and match[2] == "embed" else at
    return found
