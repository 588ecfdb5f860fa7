"""SegFormer's all-MLP head (Xie et al., 2021), and the embedding head g_seg beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ugrl.bilinear import resize
from ugrl.model.backbone import Features
from ugrl.model.encoder import init_weights, rows
from ugrl.model.noise import Noise, keep_scale
from ugrl.model.norm import make_norm
from ugrl.model.specs import Four
from ugrl.precision import full_precision


def per_position(x_BDhw: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1×1 convolution as a matrix product: without a copy on channels-last maps.

    Args:
        x_BDhw: Map.
        weight: (D', D).
        bias: (D',) or ``None``.

    Returns:
        Channels-last (B, D', h, w).
    """
    return F.linear(x_BDhw.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def _init_last(layer: nn.Conv2d, std: float) -> None:
    nn.init.trunc_normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class Enlarge(nn.Module):
    """A level of the simple feature pyramid: every doubling halves the channels (Li et al., ViTDet, ECCV 2022).

    Args:
        dim: Channels D, a multiple of ``up``.
        up: Factor of the grid's sides: 1, 2 or 4.
    """

    def __init__(self, dim: int, up: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while up > 1:
            if layers:
                layers += [ChannelNorm(dim), nn.GELU()]
            layers.append(nn.ConvTranspose2d(dim, dim // 2, 2, 2))
            dim, up = dim // 2, up // 2
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) → (B, D / up, up·h, up·w)."""
        y: Tensor = self.layers(x_BDhw)
        return y


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, D, h, w) → the same."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Decoder(nn.Module):
    """Project F1…F4 to one width, upsample to F1's grid, concatenate, fuse (1×1, norm, ReLU) → z → class logits.

    Everything up to the norm is linear, and a 1×1 convolution commutes with bilinear upsampling (whose weights sum to
    one). So the projection's and the fusion's weights are multiplied first, levels of one size are added up before they
    are upsampled together, and the concatenated 4·D map never exists. Parameters stay in their published form.

    Attributes:
        dropout: Rate of channel dropout on z.
    """

    def __init__(
        self,
        dims: Four,
        num_logits: int,
        *,
        dim: int = 256,
        norm: str = "sync_batch",
        dropout: float = 0.1,
        ups: Four = (1, 1, 1, 1),
    ) -> None:
        super().__init__()
        self.dropout = dropout
        # Of a plain ViT, whose four maps have one size.
        self.pyramid = nn.ModuleList(Enlarge(d, up) for d, up in zip(dims, ups, strict=True)) if max(ups) > 1 else None
        if max(ups) > 1:
            d1, d2, d3, d4 = (d // up for d, up in zip(dims, ups, strict=True))
            dims = (d1, d2, d3, d4)
        self.project = nn.ModuleList(nn.Linear(d, dim) for d in dims)
        # Its input channels are those of F4, F3, F2, F1, in this order (as published).
        self.fuse = nn.Conv2d(4 * dim, dim, 1, bias=False)
        self.norm = make_norm(norm, dim)
        self.classify = nn.Conv2d(dim, num_logits, 1)
        self.project.apply(init_weights)
        nn.init.kaiming_normal_(self.fuse.weight, mode="fan_out", nonlinearity="relu")
        _init_last(self.classify, std=0.01)

    def composed(self) -> tuple[list[Tensor], Tensor]:
        """The matrices (D, D_i) from F_i to the fused map, and their common bias (D,)."""
        with full_precision(self.fuse.weight):
            parts = self.fuse.weight.flatten(1).chunk(4, dim=1)[::-1]
            layers = list(zip(parts, cast(Iterable[nn.Linear], self.project), strict=True))
            weights = [part @ layer.weight for part, layer in layers]
            biases = [part @ layer.bias for part, layer in layers]
        return weights, torch.stack(biases).sum(0)

    def fused(self, features: Features) -> Tensor:
        """F1…F4 → z (B, D, h, w) on the grid of the (enlarged) F1."""
        features = features[:4]  # a fifth is that of the auxiliary classifier
        if self.pyramid is not None:
            features = tuple(enlarge(f) for enlarge, f in zip(self.pyramid, features, strict=True))
        weights, bias_D = self.composed()
        full = (features[0].shape[-2], features[0].shape[-1])
        maps = [per_position(features[0], weights[0], bias_D)]
        for feature, weight in zip(features[1:], weights[1:], strict=True):
            y = per_position(feature, weight)
            # A program for images of any size does not know which maps have one size.
            if not torch.compiler.is_exporting() and maps[-1].shape[-2:] == y.shape[-2:]:
                maps[-1] = maps[-1] + y
            else:
                maps.append(y)
        total = maps[0]
        for y in maps[1:]:
            total = total + resize(y, full)
        return F.relu(self.norm(total))

    def logits(self, z_BDhw: Tensor, noise: Noise | None = None) -> Tensor:
        """Class logits (B, C, h, w) of z; channels of z are dropped where ``noise`` says so."""
        if noise is not None and noise.dropout_BD is not None and self.dropout > 0:
            z_BDhw = z_BDhw * keep_scale(noise.dropout_BD, self.dropout).to(z_BDhw.dtype)[:, :, None, None]
        return per_position(z_BDhw, self.classify.weight.flatten(1), self.classify.bias)

    def forward(self, features: Features, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """F1…F4 → z before dropout (B, D, h, w) and class logits (B, C, h, w)."""
        z_BDhw = self.fused(features)
        return z_BDhw, self.logits(z_BDhw, noise)


class ProjectionHead(nn.Module):
    """g_seg: 1×1 → norm → ReLU → 1×1, then unit length (Eq. 9)."""

    def __init__(self, dim: int, d_seg: int, *, norm: str = "sync_batch") -> None:
        super().__init__()
        self.hidden = nn.Conv2d(dim, dim, 1, bias=False)
        self.norm = make_norm(norm, dim)
        self.out = nn.Conv2d(dim, d_seg, 1)
        nn.init.kaiming_normal_(self.hidden.weight, mode="fan_out", nonlinearity="relu")
        _init_last(self.out, std=0.02)

    def forward(self, z_BDhw: Tensor, at_Bn: Tensor | None = None) -> Tensor:
        """Unit embeddings of z, float32 (float64 stays); a zero vector stays zero.

        Only the norm needs every position: what follows it is done at the positions asked for.

        Args:
            z_BDhw: The decoder's fused map.
            at_Bn: int64 positions of its grid, or ``None`` for all.

        Returns:
            (B, d_seg, h, w), or (B, d_seg, 1, n).
        """
        y_BDhw = F.relu(self.norm(per_position(z_BDhw, self.hidden.weight.flatten(1))))
        y_BhwD = y_BDhw.permute(0, 2, 3, 1)
        if at_Bn is not None:
            y_BhwD = rows(y_BhwD.flatten(1, 2), at_Bn)[:, None]
        e_BhwD = F.linear(y_BhwD, self.out.weight.flatten(1), self.out.bias)
        with full_precision(e_BhwD):
            e_BhwD = e_BhwD if e_BhwD.dtype == torch.float64 else e_BhwD.float()
            return unit(e_BhwD).permute(0, 3, 1, 2)


class _Unit(torch.autograd.Function):
    """x / max(‖x‖, eps) over the last axis, keeping the result and the norms instead of five maps of their size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=eps).reciprocal_()
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        y, inverse = ctx.saved_tensors
        # Below eps the factor is a constant, and no direction is projected out.
        along = (grad * y).sum(-1, keepdim=True).masked_fill_(inverse >= 1.0 / ctx.eps, 0.0)
        return torch.addcmul(grad, y, along, value=-1.0).mul_(inverse), None


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Unit length over the last axis (Eq. 9), as :func:`torch.nn.functional.normalize`; zero stays zero."""
    y: Tensor = _Unit.apply(x, eps)
    return y
