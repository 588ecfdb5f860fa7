"""MiT, SegFormer's Mix Transformer (Xie et al., NeurIPS 2021), as AFA uses it: the last stage does not downsample.

Tokens are (B, N, D) from end to end; a token tensor seen as an image is a channels-last (B, D, h, w) tensor on the same
memory, so that going from attention to convolution and back copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ugrl.errors import UgrlError
from ugrl.model.backbone import Backbone, BackboneInfo, Pairs, depth_ids
from ugrl.model.backbone import Features as Features
from ugrl.model.linear import linear
from ugrl.model.noise import Noise, keep_scale
from ugrl.model.specs import SPECS as SPECS
from ugrl.model.specs import MiTSpec as MiTSpec

#: The last two blocks of the last stage: the affinity reads their attention logits (AFA).
AFFINITY_BLOCKS = 2

#: Largest map that a pass without gradients makes on a CPU, in bytes. Above twice this size the C library fetches fresh
#: pages for every tensor; that took half of the time of the widest layers.
CPU_BYTES = 2**24

#: Drop-path factors (B, 1, 1) of a block's two branches.
Scales = tuple[Tensor, Tensor]


def to_tokens(x_BDhw: Tensor) -> Tensor:
    """(B, D, h, w) → (B, N, D); a view where ``x_BDhw`` is channels-last."""
    return x_BDhw.flatten(2).transpose(1, 2)


def to_grid(x_BND: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, D) → channels-last (B, D, h, w) on the same memory."""
    return x_BND.unflatten(1, size).permute(0, 3, 1, 2)


def rows(x_BND: Tensor, at_Bn: Tensor) -> Tensor:
    """Chosen positions (B, n, D) of (B, N, D)."""
    flat_n = (at_Bn + torch.arange(x_BND.shape[0], device=at_Bn.device)[:, None] * x_BND.shape[1]).flatten()
    return x_BND.flatten(0, 1).index_select(0, flat_n).unflatten(0, (x_BND.shape[0], -1))


class PatchEmbed(nn.Module):
    """Overlapping patches: strided convolution, then LayerNorm (eps 1e-5, as published)."""

    def __init__(self, in_dim: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_BDhw: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, D', h', w') → tokens (B, N, D) and their grid (h, w)."""
        y_BDhw = self.proj(x_BDhw.contiguous(memory_format=torch.channels_last))
        return self.norm(to_tokens(y_BDhw)), (y_BDhw.shape[-2], y_BDhw.shape[-1])


class Attention(nn.Module):
    """Attention whose keys and values come from a grid reduced by ``sr_ratio``."""

    def __init__(self, dim: int, heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr: nn.Conv2d | None = None
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x_BND: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens → attended tokens (B, N, D), and the queries (B, N, D) and keys (B, N', D) of all heads."""
        q_BND = linear(x_BND, self.q)
        if self.sr is not None:
            x_BND = self.norm(to_tokens(self.sr(to_grid(x_BND, size))))
        k_BND, v_BND = linear(x_BND, self.kv).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q_BND, k_BND, v_BND))
        y_BND = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return linear(y_BND, self.proj), q_BND, k_BND


class MixFFN(nn.Module):
    """Feed-forward part with a 3×3 depthwise convolution, which is all the position there is."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_BND: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens → tokens."""
        rows = self._strip(x_BND, size)
        if rows < size[0]:
            return self._in_strips(x_BND, size, rows)
        y_BDhw = self.dwconv(to_grid(linear(x_BND, self.fc1), size))
        return linear(F.gelu(to_tokens(y_BDhw)), self.fc2)

    def _strip(self, x_BND: Tensor, size: tuple[int, int]) -> int:
        """Rows of the grid to work on at a time: all, except where a CPU keeps nothing of the wide map."""
        if x_BND.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return size[0]
        row = x_BND.shape[0] * size[1] * self.fc1.out_features * x_BND.element_size()
        strips = math.ceil(size[0] * row / CPU_BYTES)
        return max(1, math.ceil(size[0] / max(1, strips)))

    def _in_strips(self, x_BND: Tensor, size: tuple[int, int], rows: int) -> Tensor:
        """The same in strips of rows; the convolution sees one row beyond a strip on either side."""
        x_BhwD = x_BND.unflatten(1, size)
        out_BhwD = torch.empty_like(x_BhwD)
        for top in range(0, size[0], rows):
            bottom = min(size[0], top + rows)
            first, last = max(0, top - 1), min(size[0], bottom + 1)
            part_BND = x_BhwD[:, first:last].flatten(1, 2)
            y_BDhw = self.dwconv(to_grid(linear(part_BND, self.fc1), (last - first, size[1])))
            y_BhwD = y_BDhw.permute(0, 2, 3, 1)[:, top - first : bottom - first]
            out_BhwD[:, top:bottom] = linear(F.gelu(y_BhwD), self.fc2)
        return out_BhwD.flatten(1, 2)


class Block(nn.Module):
    """Attention and feed-forward branches around one stream (pre-norm, eps 1e-6)."""

    def __init__(self, dim: int, heads: int, sr_ratio: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, sr_ratio)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MixFFN(dim, dim * mlp_ratio)

    def forward(self, x_BND: Tensor, size: tuple[int, int], scales: Scales | None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens → tokens, queries, keys; ``scales`` are drop-path factors (B, 1, 1) of the two branches."""
        y_BND, q_BND, k_BND = self.attn(self.norm1(x_BND), size)
        x_BND = x_BND + (y_BND if scales is None else y_BND * scales[0])
        y_BND = self.mlp(self.norm2(x_BND), size)
        return x_BND + (y_BND if scales is None else y_BND * scales[1]), q_BND, k_BND


class Stage(nn.Module):
    """Patch embedding, blocks, and the norm (eps 1e-6) that yields the stage's features."""

    def __init__(self, spec: MiTSpec, index: int) -> None:
        super().__init__()
        dim = spec.dims[index]
        in_dim, kernel = (spec.dims[index - 1], 3) if index else (3, 7)
        self.embed = PatchEmbed(in_dim, dim, kernel, spec.strides[index])
        self.blocks = nn.ModuleList(
            Block(dim, spec.heads[index], spec.sr_ratios[index], spec.mlp_ratio) for _ in range(spec.depths[index])
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x_BDhw: Tensor, scales: Sequence[Scales | None]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Map → features, and queries and keys of the stage's last blocks; one entry of ``scales`` for each block."""
        x_BND, size = self.embed(x_BDhw)
        pairs: list[tuple[Tensor, Tensor]] = []
        for block, scale in zip(self.blocks, scales, strict=True):
            x_BND, q_BND, k_BND = block(x_BND, size, scale)
            pairs = [*pairs[1 - AFFINITY_BLOCKS :], (q_BND, k_BND)]
        return to_grid(self.norm(x_BND), size), pairs


class MiT(Backbone):
    """The encoder.

    Attributes:
        spec: Shape of the encoder.
        info: What the network asks of any encoder.
        layers: L, residual branches that drop-path may drop: two for each block, as published.
        maps: M, attention maps of the last two blocks.

    Raises:
        UgrlError: The last stage has fewer than two blocks or reduces its keys, and so has no N×N maps.
    """

    def __init__(self, spec: MiTSpec, name: str = "mit") -> None:
        super().__init__()
        if spec.depths[3] < AFFINITY_BLOCKS or spec.sr_ratios[3] != 1:
            raise UgrlError(
                f"encoder: last stage has depth {spec.depths[3]} and sr_ratio {spec.sr_ratios[3]}, "
                f"expected at least {AFFINITY_BLOCKS} and 1"
            )
        self.spec = spec
        self.stages = nn.ModuleList(Stage(spec, i) for i in range(4))
        self.layers = 2 * sum(spec.depths)
        self.maps = AFFINITY_BLOCKS * spec.heads[3]
        r1, r2, r3, r4 = accumulate(spec.strides, mul)
        self.info = BackboneInfo(
            name,
            spec.dims,
            (r1, r2, r3, r4),
            min_size=spec.min_size,
            heads=spec.heads[3],
            blocks=AFFINITY_BLOCKS,
            head_dim=spec.dims[3] // spec.heads[3],
        )
        # Computed on the CPU: the meta device would load torch's compiler for it.
        rates = torch.linspace(0, spec.drop_path, sum(spec.depths), device="cpu").repeat_interleave(2)
        self.rates_L: Tensor
        self.register_buffer("rates_L", rates, persistent=False)
        self.apply(init_weights)

    def layer_ids(self) -> Mapping[str, int]:
        """Blocks count from 1; a later stage's patch embedding goes with its first block."""
        return depth_ids([name for name, _ in self.named_parameters()], self.spec.depths)

    def largest_map(self, height: int, width: int) -> int:
        """That of the first stage's feed-forward parts."""
        return height * width // self.spec.strides[0] ** 2 * self.spec.dims[0] * self.spec.mlp_ratio

    def forward(self, images_B3HW: Tensor, noise: Noise | None = None) -> tuple[Features, Pairs]:
        """Features of four stages, and what the attention logits of the last two blocks are made of.

        Args:
            images_B3HW: Normalised images, of any size from ``spec.min_size`` on.
            noise: Drop-path numbers; without them nothing is dropped, whatever the mode.

        Returns:
            F1…F4, each channels-last (B, D_i, h_i, w_i), and for each of the last two blocks its queries and keys
            (B, N, D), heads side by side: see :func:`attention_logits`.

        Raises:
            UgrlError: An image side is too short.
        """
        self.check_size(images_B3HW)
        scales: list[Scales | None] = [None] * (self.layers // 2)
        if noise is not None and noise.drop_path_BL is not None and self.spec.drop_path > 0:
            u_BL = noise.drop_path_BL
            scale_LB11 = keep_scale(u_BL, self.rates_L.to(u_BL.dtype)).to(images_B3HW.dtype).T[:, :, None, None]
            parts = scale_LB11.unbind(0)
            # The first block's rate is 0.
            scales[1:] = list(zip(parts[2::2], parts[3::2], strict=True))
        features: list[Tensor] = []
        pairs: list[tuple[Tensor, Tensor]] = []
        x_BDhw, first = images_B3HW, 0
        for stage, depth in zip(self.stages, self.spec.depths, strict=True):
            x_BDhw, pairs = stage(x_BDhw, scales[first : first + depth])
            features.append(x_BDhw)
            first += depth
        f1, f2, f3, f4 = features
        return (f1, f2, f3, f4), tuple(pairs)


def attention_logits(pairs: tuple[tuple[Tensor, Tensor], ...], heads: int) -> Tensor:
    """Pre-softmax, unscaled attention logits q·kᵀ of some blocks.

    Args:
        pairs: Queries and keys (B, N, D) of each block, heads side by side.
        heads: Heads of a block.

    Returns:
        attn_BMNN with M = heads · blocks, block by block; rows are queries.
    """
    q, k = (torch.cat([p[i].unflatten(-1, (heads, -1)) for p in pairs], dim=2) for i in (0, 1))
    return q.transpose(1, 2) @ k.permute(0, 2, 3, 1)


def init_weights(module: nn.Module) -> None:
    """MiT's initialisation: truncated normal 0.02 for linear layers, He by fan-out for convolutions, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
