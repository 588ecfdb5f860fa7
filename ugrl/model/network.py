"""The network: encoder, class scores, affinity, decoder and embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ugrl.errors import ConfigError
from ugrl.grid import inside_cells
from ugrl.model.affinity import AffinityHead
from ugrl.model.backbone import Features, Pairs
from ugrl.model.decoder import Decoder, ProjectionHead
from ugrl.model.encoder import CPU_BYTES, attention_logits
from ugrl.model.families import make_backbone
from ugrl.model.initial import init_as_afa
from ugrl.model.noise import Noise
from ugrl.precision import full_precision
from ugrl.types import Focus, ModelOutput

#: Heads of the affinity's own queries and keys, and their channels, where the encoder has none that are of use.
OWN_HEADS, OWN_HEAD_DIM = 8, 32
_NORMS = (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm)


class Encoded(NamedTuple):
    """What the encoder gives: F1…F4 (and the auxiliary classifier's map), and the queries and keys of its last blocks,
    where it has any.
    """

    features: Features
    pairs: Pairs

    @property
    def f4(self) -> Tensor:
        """(B, D, h, w)."""
        return self.features[3]

    def detached(self) -> Encoded:
        """The same without gradients."""
        return Encoded.of([x.detach() for x in self.tensors()])

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        return [*self.features, *(x for pair in self.pairs for x in pair)]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Encoded:
        """The inverse of :meth:`tensors`."""
        maps = 4 + len(tensors) % 2  # queries and keys come in twos: one more is the auxiliary classifier's
        rest = tensors[maps:]
        return cls(tuple(tensors[:maps]), tuple(zip(rest[::2], rest[1::2], strict=True)))


class UGRLNet(nn.Module):
    """Everything with learned weights.

    Attributes:
        encoder: What ``model.backbone`` names.
        classifier: 1×1 without bias from F4 to the F classes; its weights on F4 are the raw CAM.
        aux_classifier: The same for the map of an earlier block, where ``model.aux_classifier`` asks for it.
        g_cls: Affinity head (Eq. 1).
        decoder: Fused map z and class logits.
        g_seg: Embeddings of z (Eq. 9).
        layers: L, branches that drop-path may drop.
        dim: D, channels of F4.
        stride: Pixels of the image per cell of the decoder's map (F1's grid, but for plain ViTs).
        loaded: What ``model.weights`` filled, in words; empty without.
        doubt: Why these may not be weights of an ImageNet classifier, in one line; empty where nothing says so.
        min_size: Shortest image side that the encoder takes.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: str,
        decoder_dim: int = 256,
        d_seg: int = 512,
        pooling: str = "gmp",
        affinity: str = "linear",
        norm: str = "sync_batch",
        drop_path: float = 0.1,
        dropout: float = 0.1,
        output_stride: int | None = None,
        frozen: str = "none",
        aux_classifier: int | None = None,
        init: str = "own",
    ) -> None:
        """Builds the network with fresh weights from torch's current random state.

        Args:
            num_classes: Number of foreground classes F (without background).
            backbone: A key of :data:`ugrl.model.specs.SPECS`, or ``timm/NAME``.
            decoder_dim: Channels of z.
            d_seg: Channels of an embedding.
            pooling: ``gmp`` (maximum) or ``gap`` (mean) of F4 over positions.
            affinity: ``linear`` or ``mlp``.
            norm: ``sync_batch`` or ``group``, in decoder and g_seg.
            drop_path: Drop rate of the last block.
            dropout: Drop rate of z's channels.
            output_stride: Pixels per cell of F4, where the encoder is a convolutional network of timm.
            frozen: Part of the encoder without gradient: see :data:`ugrl.model.backbone.FROZEN`.
            aux_classifier: Blocks before the last one, of a plain ViT, that a second classifier reads.
            init: First weights of the heads: ``own``, or those of AFA's public code (``afa``).

        Raises:
            ConfigError: A name is unknown.
        """
        super().__init__()
        if pooling not in ("gmp", "gap"):
            raise ConfigError(f"model.pooling: got '{pooling}', expected gmp or gap")
        self.backbone = backbone
        self.pooling = pooling
        self.loaded = self.doubt = ""
        self.encoder = make_backbone(
            backbone, drop_path=drop_path, output_stride=output_stride, frozen=frozen, aux=aux_classifier
        )
        info = self.encoder.info
        self.dim, self.stride, self.min_size = info.dims[3], info.stride, info.min_size
        self.layers = self.encoder.layers
        self.classifier = nn.Conv2d(self.dim, num_classes, 1, bias=False)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        self.heads = info.heads or OWN_HEADS
        if info.heads:
            self.g_cls = AffinityHead(info.heads * info.blocks, affinity, head_dim=info.head_dim)
        else:
            self.g_cls = AffinityHead(OWN_HEADS, affinity, head_dim=OWN_HEAD_DIM, project=self.dim)
        self.decoder = Decoder(info.dims, num_classes + 1, dim=decoder_dim, norm=norm, dropout=dropout, ups=info.ups)
        self.g_seg = ProjectionHead(decoder_dim, d_seg, norm=norm)
        self.aux_classifier: nn.Conv2d | None = None
        if aux_classifier is not None:  # the last to be drawn: all others are those of a network without
            self.aux_classifier = nn.Conv2d(self.dim, num_classes, 1, bias=False)
            nn.init.trunc_normal_(self.aux_classifier.weight, std=0.02)
        if init == "afa":
            init_as_afa(self.classifier, self.g_cls, self.decoder)

    def forward(
        self,
        images: Tensor,
        *,
        noise: Noise | None = None,
        decode: bool = True,
        affinity: bool = True,
        embed: bool = True,
        boxes: Tensor | None = None,
        attention: bool = False,
        focus: Callable[[Encoded], Focus] | None = None,
        encode_only: bool = False,
    ) -> ModelOutput | Encoded:
        """The training pass.

        Args:
            images: Normalised (B, 3, H, W), any size from 32 px on.
            noise: Numbers for drop-path and dropout; without them nothing is dropped, whatever the mode.
            decode: Whether segmentation logits are wanted.
            affinity: Whether the affinity is wanted.
            embed: Whether embeddings are wanted.
            boxes: int64 (B, 4) on the CPU, half-open ``(y0, y1, x0, x1)``: class scores pool only the positions whose
                centre lies in the box. An image whose box holds no centre pools all of them.
            attention: Whether the attention logits themselves are wanted: M·N² numbers an image.
            focus: Told what the encoder gave, without gradients, once it is through; says where affinity and
                embeddings are wanted.
            encode_only: Stop after the encoder and return its output, for :meth:`heads_of`.

        Returns:
            What was asked for; ``seg_BChw`` and ``emb_BDhw`` on F1's grid, unless ``focus`` named positions.
        """
        encoded = Encoded(*self.encoder(images, noise))
        if encode_only:
            return encoded
        where = Focus()
        if focus is not None:
            with torch.no_grad():
                where = focus(encoded.detached())
        size = (images.shape[-2], images.shape[-1])
        return self.heads_of(
            encoded,
            size,
            noise=noise,
            decode=decode,
            affinity=affinity,
            embed=embed,
            boxes=boxes,
            attention=attention,
            where=where,
        )

    def heads_of(
        self,
        encoded: Encoded,
        size: tuple[int, int],
        *,
        noise: Noise | None = None,
        decode: bool = True,
        affinity: bool = True,
        embed: bool = True,
        boxes: Tensor | None = None,
        attention: bool = False,
        where: Focus | None = None,
    ) -> ModelOutput:
        """Everything behind the encoder; arguments as of :meth:`forward`, with ``size`` (H, W) of the images."""
        features, pairs = encoded
        where = where or Focus()
        out = ModelOutput(features=features[:4], logits_BF=self.scores(features[3], boxes, size))
        if self.aux_classifier is not None:
            out.aux_BF = self.scores(features[4], boxes, size, self.aux_classifier)
        if attention or affinity:
            pairs = self.g_cls.pairs(features[3], pairs)
        if attention:
            out.attn_BMNN = attention_logits(pairs, self.heads)
        if affinity:
            out.affinity_BNN = self.g_cls.from_pairs(pairs, self.heads, where.affinity_Bn)
        if decode or embed:
            z_BDhw = self.decoder.fused(features)
            out.seg_BChw = self.decoder.logits(z_BDhw, noise) if decode else None
            out.emb_BDhw = self.g_seg(z_BDhw, where.embed_Bn) if embed else None
        return out

    def scores(
        self,
        f4_BDhw: Tensor,
        boxes_B4: Tensor | None = None,
        size: tuple[int, int] | None = None,
        classifier: nn.Conv2d | None = None,
    ) -> Tensor:
        """Class scores of F4.

        Args:
            f4_BDhw: Features of the encoder's last stage.
            boxes_B4: Valid boxes in pixels of an image of ``size``, on the CPU; ``None`` pools every position.
            size: ``(H, W)`` of the images, needed with boxes.
            classifier: Another one than that of F4.

        Returns:
            logits_BF, float32 (float64 stays).
        """
        with full_precision(f4_BDhw):
            x = f4_BDhw if f4_BDhw.dtype == torch.float64 else f4_BDhw.float()
            outside = None
            if boxes_B4 is not None and size is not None:
                grid = (x.shape[-2], x.shape[-1])
                outside = _outside(boxes_B4, size, grid).to(x.device, non_blocking=True)[:, None]
            if self.pooling == "gmp":
                pooled_BD = (x if outside is None else x.masked_fill(outside, -torch.inf)).amax((2, 3))
            elif outside is None:
                pooled_BD = x.mean((2, 3))
            else:
                pooled_BD = x.masked_fill(outside, 0).sum((2, 3)) / (~outside).sum((2, 3))
            weight = (classifier or self.classifier).weight
            return F.linear(pooled_BD, weight.flatten(1).to(x.dtype))

    def raw_from(self, f4_BDhw: Tensor, classifier: nn.Conv2d | None = None) -> Tensor:
        """Raw CAM: classifier weights · F4, (B, F, h, w), before ReLU; float32 (float64 stays)."""
        weight = (classifier or self.classifier).weight
        with full_precision(f4_BDhw):
            x = f4_BDhw if f4_BDhw.dtype == torch.float64 else f4_BDhw.float()
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1).to(x.dtype)).permute(0, 3, 1, 2)

    def cam(
        self,
        images: Tensor,
        *,
        affinity: bool,
        at_once: int = 0,
        aux: bool = False,
        show: Callable[[Features], None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The CAM pass: no decoder, nothing dropped, no norm that keeps statistics (so the mode does not matter).

        The caller switches gradients off.

        Args:
            images: Normalised (B, 3, H, W).
            affinity: Whether the affinity is wanted.
            at_once: Most images that pass at a time; 0: as many as suit the device.
            aux: Whether the auxiliary classifier's raw CAM is wanted: F more maps behind the F.
            show: Shown the features of the images, part by part.

        Returns:
            raw_BFhw, f4_BDhw, and affinity_BNN if asked for.
        """
        n = self._at_once(images)
        n = min(n, at_once) if at_once > 0 else n
        if n < images.shape[0]:
            parts = (self.cam(part, affinity=affinity, at_once=n, aux=aux, show=show) for part in images.split(n))
            raws, f4s, affinities = zip(*parts, strict=True)
            return torch.cat(raws), torch.cat(f4s), torch.cat(affinities) if affinity else None
        encoded = Encoded(*self.encoder(images))
        if show is not None:
            show(encoded.features)
        return self.cam_of(encoded, affinity=affinity, aux=aux)

    def cam_of(self, encoded: Encoded, *, affinity: bool, aux: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """What :meth:`cam` returns, from a pass that was made already."""
        f4_BDhw, pairs = encoded.f4, encoded.pairs
        affinity_BNN = self.g_cls.from_pairs(self.g_cls.pairs(f4_BDhw, pairs), self.heads) if affinity else None
        raw_BFhw = self.raw_from(f4_BDhw)
        if aux:
            raw_BFhw = torch.cat([raw_BFhw, self.raw_from(encoded.features[4], self.aux_classifier)], dim=1)
        return raw_BFhw, f4_BDhw, affinity_BNN

    def _at_once(self, images: Tensor) -> int:
        """How many images the encoder should see at a time where no gradient binds them together.

        On a CPU, few enough for the largest map to stay small (:data:`ugrl.model.encoder.CPU_BYTES`); a GPU takes all.
        """
        if images.device.type != "cpu":
            return max(1, images.shape[0])
        numbers = self.encoder.largest_map(images.shape[-2], images.shape[-1])
        return max(1, CPU_BYTES // (numbers * images.element_size()))

    def probabilities(self, features: Features) -> Tensor:
        """The decoder's probabilities (B, C, h, w) on F1's grid, in float32 (float64 stays), whatever the mode.

        Running statistics serve its norm, and nothing is dropped. The caller switches gradients off.
        """
        trained = self.decoder.training
        self.decoder.eval()
        try:
            _, seg_BChw = self.decoder(features)
        finally:
            self.decoder.train(trained)
        return (seg_BChw if seg_BChw.dtype == torch.float64 else seg_BChw.float()).softmax(1)

    def segment(self, images: Tensor) -> Tensor:
        """Segmentation logits (B, C, h, w) on F1's grid, for evaluation."""
        features, _ = self.encoder(images)
        return self.decoder(features)[1]

    def parameter_groups(
        self,
        lr: float,
        head_ratio: float,
        weight_decay: float,
        norm_lr_mult: float,
        layer_decay: float = 1.0,
        head_decay: str = "weights",
    ) -> list[dict[str, object]]:
        """Optimiser groups; every parameter that is not frozen is in exactly one.

        Args:
            lr: Learning rate of the backbone.
            head_ratio: Learning rate of the heads over that of the backbone.
            weight_decay: Weight decay of all parameters but norms, the heads' biases, and what the encoder exempts.
            norm_lr_mult: Backbone norms over backbone; the public code has 0.
            layer_decay: Rate of a layer of the backbone over that of the next deeper one.
            head_decay: Parameters of the heads with weight decay: ``weights``, or ``all``.

        Returns:
            Groups ``backbone``, ``backbone_no_decay`` (of timm's encoders alone), ``backbone_norm``, ``head`` and
            ``head_no_decay``, with ``name``, ``params``, ``lr`` and ``weight_decay``. With a layer decay the first
            three are one for each layer.
        """
        settings = {
            "backbone": (lr, weight_decay),
            "backbone_no_decay": (lr, 0.0),
            "backbone_norm": (lr * norm_lr_mult, 0.0),
            "head": (lr * head_ratio, weight_decay),
            "head_no_decay": (lr * head_ratio, 0.0),
        }
        norms = {id(p) for m in self.modules() if _is_norm(m) for p in m.parameters(recurse=False)}
        exempt = self.encoder.undecayed()
        layers = self.encoder.layer_ids() if layer_decay < 1.0 else {}
        deepest = max(layers.values(), default=0)
        # The four groups of a run without layers are always there, also empty.
        members: dict[tuple[str, int], list[nn.Parameter]] = {
            (name, deepest): [] for name in settings if name != "backbone_no_decay"
        }
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue
            own = name.removeprefix("encoder.")
            if own != name:
                kind = "backbone_norm" if id(p) in norms else "backbone_no_decay" if own in exempt else "backbone"
                key = (kind, layers.get(own, deepest))
            else:
                exempted = head_decay != "all" and (id(p) in norms or name.endswith(".bias"))
                key = ("head_no_decay" if exempted else "head", deepest)
            members.setdefault(key, []).append(p)
        return [
            {
                "name": kind if layer == deepest else f"{kind}/{layer}",
                "params": params,
                "lr": settings[kind][0] * layer_decay ** (deepest - layer),
                "weight_decay": settings[kind][1],
            }
            for (kind, layer), params in members.items()
        ]


def _is_norm(module: nn.Module) -> bool:
    """Norms of torch, and those that timm derives from no norm of torch."""
    return isinstance(module, _NORMS) or "Norm" in type(module).__name__


def _outside(boxes_B4: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Which cells have their centre outside of the box, bool (B, h, w); none where all would have."""
    inside = inside_cells(boxes_B4, size, grid)
    return ~(inside | ~inside.flatten(1).any(1)[:, None, None])
