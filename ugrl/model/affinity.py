"""The affinity head g_cls (Eq. 1)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ugrl.errors import ConfigError
from ugrl.model.backbone import Pairs
from ugrl.model.encoder import attention_logits, rows
from ugrl.precision import full_precision


class AffinityHead(nn.Module):
    """A = g_cls(S + Sᵀ): one logit for each pair of positions from the M attention logits of the pair.

    ``linear`` (AFA) weighs the maps and adds a bias; ``mlp`` puts a hidden layer of M units with ReLU between. The
    weights start such that A is the mean over maps of the *scaled* symmetrised logits: unsaturated under a sigmoid
    whatever the backbone's width.

    Args:
        maps: Number M of attention maps.
        kind: ``linear`` or ``mlp``.
        head_dim: Channels of one attention head, which set the scale of the logits.
        project: D of F4, where the encoder has no queries and keys of its own: the head makes one block of them then,
            by two 1×1 projections of F4 (normalised over its channels, since nothing else bounds them).

    Raises:
        ConfigError: The kind is unknown.
    """

    def __init__(self, maps: int, kind: str = "linear", *, head_dim: int = 64, project: int = 0) -> None:
        super().__init__()
        if kind not in ("linear", "mlp"):
            raise ConfigError(f"model.affinity: got '{kind}', expected linear or mlp")
        scale = 1.0 / math.sqrt(head_dim)
        self.maps = maps
        self.hidden: nn.Linear | None = None
        if kind == "mlp":
            self.hidden = nn.Linear(maps, maps)
            nn.init.normal_(self.hidden.weight, std=scale * math.sqrt(2.0 / maps))
            nn.init.zeros_(self.hidden.bias)
            scale = 1.0
        self.out = nn.Linear(maps, 1)
        nn.init.constant_(self.out.weight, scale / maps)
        nn.init.zeros_(self.out.bias)
        self.query = self.key = None
        if project:
            self.query, self.key = (nn.Linear(project, maps * head_dim, bias=False) for _ in range(2))
            for layer in (self.query, self.key):
                nn.init.normal_(layer.weight, std=1.0 / math.sqrt(project))

    def pairs(self, f4_BDhw: Tensor, pairs: Pairs) -> Pairs:
        """The encoder's queries and keys, or where it has none the head's own, of F4."""
        if self.query is None or self.key is None:
            return pairs
        x_BND = f4_BDhw.flatten(2).transpose(1, 2)
        x_BND = F.layer_norm(x_BND, x_BND.shape[-1:])
        return ((self.query(x_BND), self.key(x_BND)),)

    def forward(self, attn_BMNN: Tensor) -> Tensor:
        """Attention logits (B, M, N, N) → affinity logits (B, N, N), symmetric; float32 (float64 stays)."""
        with full_precision(attn_BMNN):
            s = attn_BMNN if attn_BMNN.dtype == torch.float64 else attn_BMNN.float()
            if self.hidden is None:
                return self._symmetric(torch.einsum("bmij,m->bij", s, self.out.weight[0].to(s.dtype)))
            # The hidden layer acts on S + Sᵀ; it is linear, so it may act on S first.
            s = torch.einsum("bmij,km->bkij", s, self.hidden.weight.to(s.dtype))
            s = F.relu(s + s.transpose(-1, -2) + self.hidden.bias.to(s.dtype)[:, None, None])
            return torch.einsum("bmij,m->bij", s, self.out.weight[0].to(s.dtype)) + self.out.bias.to(s.dtype)

    def from_pairs(self, pairs: Pairs, heads: int, tokens_Bn: Tensor | None = None) -> Tensor:
        """The same from queries and keys; the linear kind never builds the M maps.

        Σ_m w_m q_m·k_m is one product of all heads' channels, the queries scaled by their head's weight.

        Args:
            pairs: Queries and keys (B, N, D) of each block, heads side by side.
            heads: Heads of a block, ``maps = heads · len(pairs)``.
            tokens_Bn: int64 positions 0…N-1; only the logits between these are computed. They may repeat: a
                position that is used as padding counts like any other.

        Returns:
            Affinity logits (B, N, N), or (B, n, n) of the chosen positions.
        """
        if tokens_Bn is not None:
            pairs = tuple((rows(q, tokens_Bn), rows(k, tokens_Bn)) for q, k in pairs)
        if self.hidden is not None:
            return self(attention_logits(pairs, heads))
        per_block = self.out.weight.view(len(pairs), heads)
        q_BND = torch.cat(
            [
                (q.unflatten(-1, (heads, -1)) * w[:, None]).flatten(2)
                for (q, _), w in zip(pairs, per_block, strict=True)
            ],
            dim=-1,
        )
        k_BND = torch.cat([k for _, k in pairs], dim=-1)
        t_BNN = q_BND @ k_BND.transpose(1, 2)
        with full_precision(t_BNN):
            return self._symmetric(t_BNN if t_BNN.dtype == torch.float64 else t_BNN.float())

    def _symmetric(self, t_BNN: Tensor) -> Tensor:
        return t_BNN + t_BNN.transpose(1, 2) + self.out.bias.to(t_BNN.dtype)
