"""Encoders of timm: convolutional networks, hierarchical transformers and plain ViTs.

timm is imported here and in :mod:`ugrl.model.timm_weights` alone, and both are imported only where a backbone is
called ``timm/NAME``: it takes seconds.

The body always computes in evaluation mode: batch norms keep their statistics (those of small crops, of one rank's
share and of the CAM's passes would be other ones), and nothing is drawn from torch's global random state. Drop-path
comes from the noise that every encoder is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
import torch
from timm.layers import DropPath, apply_rot_embed_cat
from timm.models import group_parameters
from torch import Tensor, nn

from ugrl.bilinear import resize
from ugrl.errors import ConfigError
from ugrl.model.backbone import MEAN, STD, Backbone, BackboneInfo, Features, Pairs
from ugrl.model.depthwise import quicken
from ugrl.model.noise import Noise, keep_scale
from ugrl.model.specs import TIMM, TIMM_LEAST, crop_multiple, fitted, no_plain_vit
from ugrl.model.timm_hiera import fit_hiera, prepare_hiera
from ugrl.text import nearest

CONVOLUTIONAL, HIERARCHICAL, PLAIN = "convolutional", "hierarchical", "plain ViT"
#: Kind of the models that a module of timm defines. What is not here was not tried.
FAMILIES = {
    "efficientnet": CONVOLUTIONAL,
    "mobilenetv3": CONVOLUTIONAL,
    "resnet": CONVOLUTIONAL,
    "byobnet": CONVOLUTIONAL,
    "convnext": CONVOLUTIONAL,
    "pvt_v2": HIERARCHICAL,
    "swin_transformer": HIERARCHICAL,
    "hiera": HIERARCHICAL,
    "vision_transformer": PLAIN,
    "deit": PLAIN,
    "eva": PLAIN,
}
#: The last blocks of a plain ViT whose queries and keys are caught.
AFFINITY_BLOCKS = 2


def family_of(backbone: str) -> str:
    """The module of timm that defines a model, a key of :data:`FAMILIES`.

    Args:
        backbone: ``timm/NAME``; the name may have a tag (``resnet50.a1_in1k``).

    Raises:
        ConfigError: timm has no such model, or it is of a family that cannot be used.
    """
    name = backbone.removeprefix(TIMM)
    bare = name.partition(".")[0]
    if not timm.is_model(bare):
        raise ConfigError(f"model.backbone: timm has no model '{bare}'{nearest(bare, timm.list_models())}")
    if not _has_tag(name):
        tags = [t.partition(".")[2] for t in timm.list_pretrained(bare)]
        raise ConfigError(f"model.backbone: {bare} has no weights '{name.partition('.')[2]}'{nearest(name, tags)}")
    family = timm.model_entrypoint(bare).__module__.rpartition(".")[2]
    if family not in FAMILIES:
        raise ConfigError(
            f"model.backbone: {backbone} is of timm's family {family}, which does not give the maps that are needed; "
            f"expected one of {', '.join(FAMILIES)}"
        )
    return family


def check_aux(name: str, family: str, aux: int | None) -> None:
    """Refuse an auxiliary classifier of an encoder that is no plain ViT.

    Raises:
        ConfigError: Names the encoder, and what to set.
    """
    if aux is not None and FAMILIES[family] != PLAIN:
        raise ConfigError(no_plain_vit(name, aux))


def _has_tag(name: str) -> bool:
    bare, _, tag = name.partition(".")
    return not tag or name in timm.list_pretrained(bare)


class SampleDropPath(nn.Module):
    """Drops a residual branch of the samples that it is told to.

    Attributes:
        rate: Probability of being dropped.
        scale_B: Factors of the samples, set for one pass; ``None``: nothing is dropped.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.scale_B: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) → the same."""
        if self.scale_B is None:
            return x
        return x * self.scale_B.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class _Catcher:
    """Keeps what one attention makes its logits of: queries and keys behind their norms and rotary positions."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.q: Tensor | None = None
        self.k: Tensor | None = None
        self.rope: Tensor | None = None
        attention.register_forward_pre_hook(self._before, with_kwargs=True)
        self.attention.q_norm.register_forward_hook(self._query)
        self.attention.k_norm.register_forward_hook(self._key)

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.rope = kwargs.get("rope")

    def _query(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.q = out

    def _key(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.k = out

    def take(self, prefix: int) -> tuple[Tensor, Tensor]:
        """(B, N, D) of the last pass, heads side by side, without prefix tokens; forgets them."""
        assert self.q is not None and self.k is not None
        pair = [t[:, :, prefix:] for t in (self.q, self.k)]
        if self.rope is not None:
            half = getattr(self.attention, "rotate_half", False)
            pair = [apply_rot_embed_cat(t, self.rope, half=half).type_as(t) for t in pair]
        self.q = self.k = self.rope = None
        q, k = (t.transpose(1, 2).flatten(2) for t in pair)
        return q, k


class TimmBackbone(Backbone):
    """A model of timm without its head.

    Args:
        name: ``timm/NAME``.
        drop_path: Drop rate of the last residual branch; the others rise to it as in timm.
        output_stride: Pixels per cell of F4 of a convolutional network; ``None``: 16 where it can be told.
        aux: Blocks before the last one, of a plain ViT, whose normalised tokens are a fifth map.

    Attributes:
        body: timm's model.
        kind: One of :data:`CONVOLUTIONAL`, :data:`HIERARCHICAL` and :data:`PLAIN`.

    Raises:
        ConfigError: timm has no such model, or it cannot be used.
    """

    def __init__(
        self, name: str, *, drop_path: float = 0.0, output_stride: int | None = None, aux: int | None = None
    ) -> None:
        super().__init__()
        family = family_of(name)
        check_aux(name, family, aux)
        self.family, self.kind = family, FAMILIES[family]
        self.body: Any = _body(name, family, drop_path, output_stride)
        quicken(self.body)
        self.prefix = int(getattr(self.body, "num_prefix_tokens", 0)) if self.kind == PLAIN else 0
        self.taken, dims, reductions = _maps(self.body, name, self.kind)
        self.aux_at = None if aux is None else _aux_block(self.body, name, aux)
        self.catchers = _catchers(self.body) if self.kind == PLAIN else []
        attention = self.catchers[0].attention if self.catchers else None
        cfg = self.body.pretrained_cfg
        self.info = BackboneInfo(
            name,
            dims,
            reductions,
            ups=(4, 2, 1, 1) if self.kind == PLAIN else (1, 1, 1, 1),
            min_size=TIMM_LEAST,
            multiple=reductions[0] if self.kind == PLAIN else crop_multiple(name),
            heads=0 if attention is None else attention.num_heads,
            blocks=len(self.catchers),
            head_dim=0 if attention is None else int(attention.head_dim),
            mean=tuple(cfg.get("mean") or MEAN),
            std=tuple(cfg.get("std") or STD),
            licence=cfg.get("license"),
        )
        mean, std, own_mean, own_std = (
            torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD, self.info.mean, self.info.std)
        )
        self.factor_311: Tensor
        self.offset_311: Tensor
        self.register_buffer("factor_311", std / own_std, persistent=False)
        self.register_buffer("offset_311", (mean - own_mean) / own_std, persistent=False)
        self.drops = [m for m in self.body.modules() if isinstance(m, SampleDropPath)]
        self.layers = len(self.drops)
        self.body.eval()

    def train(self, mode: bool = True) -> TimmBackbone:
        """The body stays in evaluation mode; see the module."""
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, images_B3HW: Tensor, noise: Noise | None = None) -> tuple[Features, Pairs]:
        """See :meth:`ugrl.model.backbone.Backbone.forward`; an image that is no multiple is resized to the nearest."""
        self.check_size(images_B3HW)
        x = self._prepared(images_B3HW)
        if noise is not None and noise.drop_path_BL is not None:
            for at, drop in enumerate(self.drops):
                drop.scale_B = keep_scale(noise.drop_path_BL[:, at], drop.rate)
        try:
            maps = tuple(self._features(x))
        finally:
            for drop in self.drops:
                drop.scale_B = None
        return maps, tuple(c.take(self.prefix) for c in self.catchers)

    def _prepared(self, images_B3HW: Tensor) -> Tensor:
        """Images as the weights know them: whole patches, and the statistics of their training."""
        info, x = self.info, images_B3HW
        if info.multiple > 1:
            height, width = (fitted(side, info.multiple, info.min_size) for side in x.shape[-2:])
            # A program for images of any size always resizes; to the same size that changes nothing.
            if torch.compiler.is_exporting() or (height, width) != tuple(x.shape[-2:]):
                x = resize(x, (height, width))
        if (info.mean, info.std) != (MEAN, STD):
            x = x * self.factor_311.to(x.dtype) + self.offset_311.to(x.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.kind == CONVOLUTIONAL else x

    def _features(self, x: Tensor) -> Sequence[Tensor]:
        if self.kind != CONVOLUTIONAL:
            if self.family == "hiera":
                fit_hiera(self.body, x.shape[-2], x.shape[-1])
            options = {} if self.family in ("pvt_v2", "hiera") else {"norm": True}  # these two have no last norm
            taken = self.taken
            if self.aux_at is not None and isinstance(taken, list):
                taken = sorted({*taken, self.aux_at})
            maps = self.body.forward_intermediates(x, indices=taken, intermediates_only=True, **options)
            if self.aux_at is None or not isinstance(taken, list):
                return cast("Sequence[Tensor]", maps)
            by_block = dict(zip(taken, maps, strict=True))
            return [by_block[k] for k in (*cast("list[int]", self.taken), self.aux_at)]
        if not hasattr(self.body, "forward_intermediates"):
            return cast("Sequence[Tensor]", self.body(x))
        # What the ImageNet classifier was trained on lies behind the last map of some: 1,280 channels of lite0.
        last, maps = self.body.forward_intermediates(x, indices=self.taken)
        return [*maps[:3], last]

    def layer_ids(self) -> Mapping[str, int]:
        """As timm groups the layers of its models."""
        matcher = (
            self.body.group_matcher(coarse=False)
            if hasattr(self.body, "group_matcher")
            else {"stem": r"^conv_stem|^bn1", "blocks": r"^blocks\.(\d+)\.(\d+)"}
        )
        groups = group_parameters(self.body, matcher, reverse=True)
        return {f"body.{name}": int(at) for name, at in groups.items()}

    def undecayed(self) -> frozenset[str]:
        """Biases, layer scales and position embeddings, as timm has it."""
        named = set(self.body.no_weight_decay()) if hasattr(self.body, "no_weight_decay") else set()
        return frozenset(f"body.{n}" for n, p in self.body.named_parameters() if p.ndim <= 1 or n in named)

    def largest_map(self, height: int, width: int) -> int:
        """Four times the widest of the four maps: expanded channels, or a feed-forward part."""
        info = self.info
        return max(4 * d * -(-height // r) * -(-width // r) for d, r in zip(info.dims, info.reductions, strict=True))


def _body(name: str, family: str, drop_path: float, output_stride: int | None) -> Any:
    """The model without head, with drop-path that is told what to drop."""
    kind, bare = FAMILIES[family], name.removeprefix(TIMM)
    options: dict[str, Any] = {"drop_path_rate": drop_path}
    if kind != CONVOLUTIONAL and output_stride is not None:
        raise ConfigError(f"model.output_stride is {output_stride}; expected null: {name} is a transformer")
    if kind == CONVOLUTIONAL:
        options["output_stride"] = output_stride or 16
    elif kind == PLAIN:
        options["dynamic_img_size"] = True
    elif family == "swin_transformer":
        options["strict_img_size"] = False
    if family == "mobilenetv3":  # only its form with maps can be told a stride
        options |= {"features_only": True, "out_indices": (1, 2, 3, 4)}
    else:
        options["num_classes"] = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = timm.create_model(bare, pretrained=False, **options)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise ConfigError(f"model.backbone: {name} cannot be built with maps and any input size ({text})") from None
    if hasattr(body, "forward_intermediates") and kind != PLAIN:
        final = kind == CONVOLUTIONAL and hasattr(body, "conv_head")
        body.prune_intermediate_layers(4, prune_norm=False, prune_head=not final)
    elif kind == PLAIN:
        body.prune_intermediate_layers([len(body.blocks) - 1], prune_norm=False, prune_head=True)
    if family == "hiera":
        prepare_hiera(body)
    for parent in list(body.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, DropPath) and getattr(parent, "has_skip", True):
                setattr(parent, child, SampleDropPath(float(module.drop_prob or 0.0)))
    return body


def _maps(body: Any, name: str, kind: str) -> tuple[list[int] | int, tuple, tuple]:
    """Which maps are taken, their channels and their strides."""
    if kind == PLAIN:
        depth, patch = len(body.blocks), body.patch_embed.patch_size
        if depth < 4 or patch[0] != patch[1]:
            raise ConfigError(f"model.backbone: {name} has {depth} blocks, patches {patch}; expected 4 or more, square")
        return [depth * i // 4 - 1 for i in (1, 2, 3, 4)], (body.embed_dim,) * 4, (patch[0],) * 4
    info = list(body.feature_info) if isinstance(body.feature_info, list) else list(body.feature_info.get_dicts())
    if len(info) < 4:
        raise ConfigError(f"model.backbone: {name} has {len(info)} maps; expected four")
    dims, reductions = [d["num_chs"] for d in info[-4:]], [d["reduction"] for d in info[-4:]]
    if kind == CONVOLUTIONAL and hasattr(body, "forward_intermediates"):
        dims[3] = body.num_features
    return 4, tuple(dims), tuple(reductions)


def _aux_block(body: Any, name: str, aux: int) -> int:
    """The block that lies so many before the last."""
    last = len(body.blocks) - 1
    if not 1 <= aux <= last:
        raise ConfigError(f"model.aux_classifier is {aux}: {name} has {last + 1} blocks; expected 1 to {last}")
    return last - aux


def _catchers(body: Any) -> list[_Catcher]:
    """Of the last blocks; none where an attention has no norms of queries and keys to listen at."""
    attentions = [getattr(block, "attn", None) for block in body.blocks[-AFFINITY_BLOCKS:]]
    if not all(hasattr(a, "q_norm") and hasattr(a, "k_norm") and hasattr(a, "num_heads") for a in attentions):
        return []
    return [_Catcher(a) for a in attentions]
