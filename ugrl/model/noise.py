"""Drop-path and dropout that follow the sample, not the process.

The network draws nothing itself: it is given one uniform number for every place where something may be dropped. They
are functions of (seed, step, sample id), so a sample loses the same branches whatever the batch around it, the rank or
the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ugrl.seeding import derive, hash_uniform


@dataclass(frozen=True, slots=True)
class Noise:
    """Uniform numbers in [0, 1); a part is dropped where its number lies below the rate.

    Attributes:
        drop_path_BL: One number for each residual branch of the encoder, or ``None`` for no drop-path.
        dropout_BD: One number for each channel of the decoder's fused map, or ``None`` for no dropout.
    """

    drop_path_BL: Tensor | None
    dropout_BD: Tensor | None

    def part(self, rows: slice) -> Noise:
        """Of some of the samples."""
        path, drop = self.drop_path_BL, self.dropout_BD
        return Noise(None if path is None else path[rows], None if drop is None else drop[rows])


def sample_noise(
    seed: int, step: int, ids: Sequence[str], *, layers: int, channels: int, device: torch.device | str
) -> Noise:
    """The noise of some samples at one step.

    Args:
        seed: Seed of the run.
        step: Number of the training step, counted from 0.
        ids: Names of the B samples.
        layers: Number L of residual branches, ``UGRLNet.layers``.
        channels: D, the decoder's width.
        device: Device of the result.

    Returns:
        float64 numbers; row b depends on ``(seed, step, ids[b])`` alone.

    >>> two = sample_noise(0, 7, ["a", "b"], layers=2, channels=3, device="cpu")
    >>> one = sample_noise(0, 7, ["b"], layers=2, channels=3, device="cpu")
    >>> bool((two.drop_path_BL[1] == one.drop_path_BL[0]).all())
    True
    """
    keys_B = torch.tensor([derive(seed, step, i) for i in ids], dtype=torch.int64).to(device, non_blocking=True)
    u = hash_uniform(keys_B, layers + channels)
    return Noise(drop_path_BL=u[:, :layers], dropout_BD=u[:, layers:])


def keep_scale(u: Tensor, rate: Tensor | float) -> Tensor:
    """0 where something is dropped and 1 / (1 - rate) where it is kept, so that the expectation is 1.

    Args:
        u: Uniform numbers, any shape.
        rate: Drop probabilities that broadcast to ``u``.

    >>> keep_scale(torch.tensor([0.1, 0.9]), 0.5)
    tensor([0., 2.])
    """
    return (u >= rate).to(u.dtype) / (1.0 - rate)
