"""The CAM's passes as AFA's public code makes them (``method.cam.mode: train``).

Its network is in training mode there. Drop-path drops branches, other ones in each pass; and the decoder answers too,
though nobody reads it, so that the running statistics of its batch norm take in the images of each scale, together with
their mirror images. A MiT has no batch norm of its own: for it, the statistics are those of the decoder's one norm,
which only validation reads. The statistics of a convolutional encoder stay frozen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ugrl.method.cam import CamPass
from ugrl.model.backbone import Features
from ugrl.model.network import Encoded, UGRLNet
from ugrl.model.noise import Noise


class TrainingPasses:
    """Passes in training mode over the images of one step.

    Args:
        net: The network, not wrapped by DDP.
        noise: What is dropped in a pass.
        at_once: Most images that the encoder sees at a time; 0: all.
        mirror: Whether each scale has a second, mirrored pass. The statistics move after the last pass of a scale.
        moves: Whether the statistics move; they need not while nothing trains the decoder.
    """

    def __init__(
        self, net: UGRLNet, noise: Callable[[CamPass], Noise | None], *, at_once: int, mirror: bool, moves: bool
    ) -> None:
        self.net, self.noise, self.at_once, self.mirror, self.moves = net, noise, at_once, mirror, moves
        self._kept: list[Features] = []

    def __call__(
        self,
        images: Tensor,
        view: CamPass,
        *,
        affinity: bool,
        aux: bool = False,
        show: Callable[[Features], None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One pass; arguments and results as of :meth:`ugrl.model.network.UGRLNet.cam`."""
        noise, size = self.noise(view), self.at_once or images.shape[0]
        parts = []
        for start in range(0, images.shape[0], size):
            rows = slice(start, start + size)
            parts.append(Encoded(*self.net.encoder(images[rows], None if noise is None else noise.part(rows))))
        encoded = Encoded.of([torch.cat(tensors) for tensors in zip(*(p.tensors() for p in parts), strict=True)])
        if show is not None:
            show(encoded.features)
        if self.moves:
            self._move(encoded.features, last=view.mirrored or not self.mirror)
        return self.net.cam_of(encoded, affinity=affinity, aux=aux)

    def _move(self, features: Features, *, last: bool) -> None:
        self._kept.append(features)
        if last:
            f1, f2, f3, f4, *_ = (torch.cat(maps) for maps in zip(*self._kept, strict=True))
            self._kept = []
            self.net.decoder.fused((f1, f2, f3, f4))
