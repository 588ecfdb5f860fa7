"""The network as one function from pixels to logits and scores, and that function as a program of ``torch.export``."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ugrl.bilinear import resize
from ugrl.errors import UgrlError
from ugrl.model.backbone import MEAN, STD
from ugrl.model.network import UGRLNet
from ugrl.text import line

#: Names of the input and of the outputs.
PIXELS, OUTPUTS = "pixels", ("logits", "scores")
#: Longest side that a program for any size is made for; it also bounds what the exporter has to reason about.
LONGEST = 8192
_MOST_IMAGES = 1024


class Graph(nn.Module):
    """Pixels as they are read → what the network says of them; the normalisation is inside.

    Args:
        net: Copied, on the CPU, in eval mode, without gradients.
    """

    def __init__(self, net: UGRLNet) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).cpu().eval().requires_grad_(False)
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
        self.factor_311: Tensor
        self.offset_311: Tensor
        self.register_buffer("factor_311", (1 / (255 * std)).float())
        self.register_buffer("offset_311", (mean / std).float())

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """One pass at the size of the images.

        Args:
            pixels: RGB, uint8 (B, H, W, 3).

        Returns:
            Segmentation logits float32 (B, C, H, W), class 0 is background; and probabilities (B, F) of the classes
            without background, from the classifier.
        """
        x_B3HW = pixels.permute(0, 3, 1, 2).float() * self.factor_311 - self.offset_311
        features, _ = self.net.encoder(x_B3HW)
        logits = self.net.decoder(features)[1]
        size = (pixels.shape[1], pixels.shape[2])
        return resize(logits.float(), size), self.net.scores(features[3]).sigmoid()


def capture(net: UGRLNet, size: tuple[int, int] | None) -> torch.export.ExportedProgram:
    """The network as a program.

    Args:
        net: The network.
        size: (H, W) of its images, one at a time; ``None``: any number of images, of any size that the encoder takes.

    Raises:
        UgrlError: The encoder cannot be captured so.
    """
    graph, least = Graph(net), smallest(net, size)
    shapes: dict[str, Any] | None = None
    if size is None:
        # Sides that no two axes share, and that are multiples of nothing.
        example = torch.zeros((2, least + 5, least * 2 + 1, 3), dtype=torch.uint8)
        batch = torch.export.Dim("batch", min=1, max=_MOST_IMAGES)
        height, width = (torch.export.Dim(n, min=least, max=LONGEST) for n in ("height", "width"))
        shapes = {PIXELS: {0: batch, 1: height, 2: width}}
    else:
        example = torch.zeros((1, *size, 3), dtype=torch.uint8)
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(graph, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever the exporter makes of a foreign model's code
        what = "images of any size" if size is None else f"images of {size[0]} × {size[1]} px"
        hint = "; one size may work: --size HEIGHT WIDTH" if size is None else ""
        raise UgrlError(f"{net.backbone} cannot be captured for {what} ({line(error, 160)}){hint}") from error


def smallest(net: UGRLNet, size: tuple[int, int] | None = None) -> int:
    """Shortest side of a program's images: of one for any size, every grid within has two cells a side or more.

    The exporter takes an axis of length one for a constant.
    """
    return net.min_size if size is not None else 2 * net.min_size


@contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of the exporter, which are for its authors."""
    names = ("torch.export", "torch.fx.experimental.symbolic_shapes", "torch.onnx", "onnxscript")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
