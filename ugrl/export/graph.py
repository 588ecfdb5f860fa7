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
from ugrl.model.encoder import MiT
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
    graph, least, step = Graph(net), smallest(net, size), cell(net)
    shapes: dict[str, Any] | None = None
    if size is None:
        # Sides that no two axes share, and that are multiples of nothing.
        odd = 5 if step == 1 else step
        example = torch.zeros((2, least + odd, least * 2 + odd, 3), dtype=torch.uint8)
        batch = torch.export.Dim("batch", min=1, max=_MOST_IMAGES)
        height, width = (torch.export.Dim(n, min=least // step, max=LONGEST // step) for n in ("height", "width"))
        if step > 1:
            height, width = step * height, step * width
        shapes = {PIXELS: {0: batch, 1: height, 2: width}}
    else:
        example = torch.zeros((1, *size, 3), dtype=torch.uint8)
    try:
        with torch.no_grad(), quiet(), _whole_padding(net):
            return torch.export.export(graph, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever the exporter makes of a foreign model's code
        what = "images of any size" if size is None else f"images of {size[0]} × {size[1]} px"
        hint = "; one size may work: --size HEIGHT WIDTH" if size is None else ""
        raise UgrlError(f"{net.backbone} cannot be captured for {what} ({line(error, 160)}){hint}") from error


def smallest(net: UGRLNet, size: tuple[int, int] | None = None) -> int:
    """Shortest side of a program's images: of one for any size, every grid within has two cells a side or more.

    The exporter takes an axis of length one for a constant.
    """
    if size is not None:
        return net.min_size
    step = cell(net)
    return -(-2 * net.min_size // step) * step


def cell(net: UGRLNet) -> int:
    """What the sides of a program for any size must be multiples of, in px.

    1, but for models of timm whose layers ask whether a side is a multiple: those that resize to whole patches, and
    those that pad by the size of the image (TensorFlow's "same"). A program cannot ask.
    """
    if isinstance(net.encoder, MiT):
        return 1
    if net.encoder.info.multiple > 1:
        return net.encoder.info.multiple
    return 32 if any("Same" in type(m).__name__ for m in net.encoder.modules()) else 1


@contextmanager
def _whole_padding(net: UGRLNet) -> Iterator[None]:
    """Padding of timm's "same" convolutions in whole numbers: by way of fractions the exporter does not come to an end.

    The padding is kernel - stride + (-side mod stride), where the kernel, spread by its dilation, is no smaller than
    the stride.
    """
    if isinstance(net.encoder, MiT):
        yield
        return
    from timm.layers import padding

    def same(x: Any, kernel_size: int, stride: int, dilation: int) -> Any:
        return max(dilation * (kernel_size - 1) + 1 - stride + (-x) % stride, 0)

    before = padding.get_same_padding
    padding.get_same_padding = same
    try:
        yield
    finally:
        padding.get_same_padding = before


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
