"""The network's forward pass the way the public recipe computes it, on the parameters of a given network.

Attention is materialised in every block and its logits are copied; tokens and maps are transposed into one another;
the decoder upsamples every level and fuses the concatenation at a quarter of the resolution; the affinity goes through
2·heads full maps. Nothing is left out of a pass that nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ugrl.model.decoder import Decoder, ProjectionHead
from ugrl.model.encoder import AFFINITY_BLOCKS, Attention, Block, MixFFN, PatchEmbed, Stage
from ugrl.model.network import UGRLNet
from ugrl.model.noise import Noise, keep_scale


@dataclass(slots=True)
class PublicOutput:
    """What a pass of the whole network returns."""

    features: list[Tensor]
    attentions: list[Tensor]
    logits_BF: Tensor
    seg_BChw: Tensor
    affinity_BNN: Tensor
    emb_BDhw: Tensor | None


class PublicNet:
    """A :class:`UGRLNet`'s parameters under the public way of computing.

    Args:
        net: Owns parameters and statistics; its own ``forward`` is never called.
    """

    def __init__(self, net: UGRLNet) -> None:
        self.net = net

    def __call__(
        self, images_B3HW: Tensor, *, noise: Noise | None = None, boxes_B4: Tensor | None = None, embed: bool = False
    ) -> PublicOutput:
        """A training or segmentation pass: everything, embeddings where asked for."""
        features, attentions = self.encode(images_B3HW, noise)
        z_BDhw, seg_BChw = self.decode(features, noise)
        affinity_BNN = self.affinity(attentions)
        size = (images_B3HW.shape[-2], images_B3HW.shape[-1])
        logits_BF = self.scores(features[3], boxes_B4, size)
        emb_BDhw = self.embed(z_BDhw) if embed else None
        return PublicOutput(features, attentions, logits_BF, seg_BChw, affinity_BNN, emb_BDhw)

    def cam_only(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A CAM pass: the decoder and the affinity run although only the scores of all F classes are new.

        Returns:
            Raw class scores (B, F, h, w), F4, and affinity logits.
        """
        features, attentions = self.encode(images_B3HW, None)
        self.decode(features, None)
        affinity_BNN = self.affinity(attentions)
        return F.conv2d(features[3], self.net.classifier.weight), features[3], affinity_BNN

    # -- encoder ------------------------------------------------------------------------------

    def encode(self, images_B3HW: Tensor, noise: Noise | None) -> tuple[list[Tensor], list[Tensor]]:
        """F1…F4, contiguous, and a copy of every block's attention logits."""
        encoder = self.net.encoder
        drops: list[tuple[Tensor, Tensor] | None] = [None] * (encoder.layers // 2)
        if noise is not None and noise.drop_path_BL is not None and encoder.spec.drop_path > 0:
            u_BL = noise.drop_path_BL
            keep_BL = keep_scale(u_BL, encoder.rates_L.to(u_BL.dtype)).to(images_B3HW.dtype)
            for i in range(1, len(drops)):  # the first block's rate is 0
                drops[i] = keep_BL[:, 2 * i, None, None], keep_BL[:, 2 * i + 1, None, None]
        features: list[Tensor] = []
        attentions: list[Tensor] = []
        x, block_index = images_B3HW, 0
        for stage in cast("list[Stage]", encoder.stages):
            x_BND, h, w = patches(stage.embed, x)
            for block in cast("list[Block]", stage.blocks):
                x_BND, attention = transform(block, x_BND, h, w, drops[block_index])
                attentions.append(attention)
                block_index += 1
            x_BND = stage.norm(x_BND)
            x = x_BND.reshape(x_BND.shape[0], h, w, -1).permute(0, 3, 1, 2).contiguous()
            features.append(x)
        return features, attentions

    # -- heads --------------------------------------------------------------------------------

    def affinity(self, attentions: list[Tensor]) -> Tensor:
        """Eq. 1 over the materialised maps of the last two blocks: S + Sᵀ, then a 1×1 convolution."""
        head = self.net.g_cls
        maps_BMNN = torch.cat(attentions[-AFFINITY_BLOCKS:], dim=1)
        maps_BMNN = maps_BMNN + maps_BMNN.permute(0, 1, 3, 2)
        if head.hidden is not None:
            maps_BMNN = F.relu(F.conv2d(maps_BMNN, head.hidden.weight[:, :, None, None], head.hidden.bias))
        return F.conv2d(maps_BMNN, head.out.weight[:, :, None, None], head.out.bias)[:, 0]

    def scores(self, f4_BDhw: Tensor, boxes_B4: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Pooling of F4 over the cells inside the box, image by image, then the 1×1 classifier."""
        pooled = []
        h, w = f4_BDhw.shape[-2:]
        for b in range(f4_BDhw.shape[0]):
            part = f4_BDhw[b : b + 1]
            if boxes_B4 is not None:
                y0, y1, x0, x1 = (int(v) for v in boxes_B4[b])
                rows = [i for i in range(h) if y0 <= (2 * i + 1) * size[0] // (2 * h) < y1]
                cols = [j for j in range(w) if x0 <= (2 * j + 1) * size[1] // (2 * w) < x1]
                if rows and cols:
                    part = part[:, :, rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
            pool = F.adaptive_max_pool2d if self.net.pooling == "gmp" else F.adaptive_avg_pool2d
            pooled.append(pool(part, (1, 1)))
        return F.conv2d(torch.cat(pooled), self.net.classifier.weight).flatten(1)

    def decode(self, features: list[Tensor], noise: Noise | None) -> tuple[Tensor, Tensor]:
        """Every level at F1's size, concatenated, fused; z before dropout and the class logits."""
        decoder: Decoder = self.net.decoder
        size = features[0].shape[-2:]
        levels = []
        for feature, layer in zip(features[::-1], list(decoder.project)[::-1], strict=True):
            y = layer(feature.flatten(2).transpose(1, 2))
            y = y.permute(0, 2, 1).reshape(feature.shape[0], -1, *feature.shape[-2:])
            if feature is not features[0]:
                y = F.interpolate(y, size=size, mode="bilinear", align_corners=False)
            levels.append(y)
        z_BDhw = F.relu(decoder.norm(F.conv2d(torch.cat(levels, dim=1), decoder.fuse.weight)))
        y = z_BDhw
        if noise is not None and noise.dropout_BD is not None and decoder.dropout > 0:
            y = y * keep_scale(noise.dropout_BD, decoder.dropout).to(y.dtype)[:, :, None, None]
        return z_BDhw, F.conv2d(y, decoder.classify.weight, decoder.classify.bias)

    def embed(self, z_BDhw: Tensor) -> Tensor:
        """g_seg everywhere, unit length."""
        head: ProjectionHead = self.net.g_seg
        y = F.relu(head.norm(F.conv2d(z_BDhw, head.hidden.weight)))
        return F.normalize(F.conv2d(y, head.out.weight, head.out.bias), dim=1, eps=1e-6)


def patches(embed: PatchEmbed, x_BDhw: Tensor) -> tuple[Tensor, int, int]:
    """Overlapping patches of a contiguous map, as tokens."""
    y = embed.proj(x_BDhw)
    h, w = y.shape[-2:]
    return embed.norm(y.flatten(2).transpose(1, 2)), h, w


def transform(
    block: Block, x_BND: Tensor, h: int, w: int, drops: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """A block, and a copy of its attention logits."""
    y, attention = attend(block.attn, block.norm1(x_BND), h, w)
    x_BND = x_BND + (y if drops is None else y * drops[0])
    y = feed(block.mlp, block.norm2(x_BND), h, w)
    return x_BND + (y if drops is None else y * drops[1]), attention


def attend(attn: Attention, x_BND: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Attention through the whole matrix of logits; of these a copy, averaged to the grid of the keys, is kept."""
    b, n, d = x_BND.shape
    heads = attn.heads
    q = attn.q(x_BND).reshape(b, n, heads, d // heads).permute(0, 2, 1, 3)
    source, reduce = x_BND, 1
    if attn.sr is not None:
        reduce = int(attn.sr.stride[0])
        grid = attn.sr(x_BND.permute(0, 2, 1).reshape(b, d, h, w))
        source = attn.norm(grid.reshape(b, d, -1).permute(0, 2, 1))
    kv = attn.kv(source).reshape(b, -1, 2, heads, d // heads).permute(2, 0, 3, 1, 4)
    k, v = kv[0], kv[1]
    logits = q @ k.transpose(-2, -1)
    weight = (logits * (d // heads) ** -0.5).softmax(dim=-1)
    y = attn.proj((weight @ v).transpose(1, 2).reshape(b, n, d))
    keys = logits.shape[-1]
    copy = logits.clone().reshape(b, heads, h, w, keys)
    if reduce > 1:
        copy = F.avg_pool3d(copy, kernel_size=(reduce, reduce, 1), stride=(reduce, reduce, 1))
    return y, copy.reshape(b, heads, -1, keys)


def feed(mlp: MixFFN, x_BND: Tensor, h: int, w: int) -> Tensor:
    """Feed-forward part around a depthwise convolution."""
    b = x_BND.shape[0]
    y = mlp.fc1(x_BND)
    y = mlp.dwconv(y.transpose(1, 2).view(b, y.shape[-1], h, w)).flatten(2).transpose(1, 2)
    return mlp.fc2(F.gelu(y))
