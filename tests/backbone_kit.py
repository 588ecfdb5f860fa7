"""What the tests of backbones share: a configuration for one, and a batch of shapes."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny import tiny_tree
from ugrl.config import Config, build
from ugrl.model.network import UGRLNet
from ugrl.train.build import build_net
from ugrl.types import Batch


def config(backbone: str, crop: int = 64, steps: int = 3, **model: Any) -> Config:
    tree = tiny_tree(steps=steps, lr=1e-3)
    tree["data"]["crop"] = crop
    tree["model"] |= {"backbone": backbone, **model}
    tree["method"]["setting"] = "IV"
    return build(tree)


def network(backbone: str, crop: int = 224, **model: Any) -> UGRLNet:
    tree = {"data": {"crop": crop}, "model": {"backbone": backbone, "decoder_dim": 16, **model}}
    return build_net(build(tree), 3, pretrained=False).eval()


def batch(crop: int, images: int = 2, step: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Coloured squares on noise; the colour is the class."""
    g = torch.Generator().manual_seed(step)
    x = torch.randn(images, 3, crop, crop, generator=g, dtype=torch.float64) * 0.3
    tags = torch.zeros(images, 3, dtype=torch.float64)
    for b in range(images):
        f = (b + step) % 3
        tags[b, f] = 1
        x[b, f, crop // 4 : crop // 2, crop // 4 : crop // 2] += 2
    return Batch(
        ids=tuple(f"{step}-{b}" for b in range(images)),
        images_B3HW=x.to(dtype),
        tags_BF=tags.to(dtype),
        masks_BHW=None,
        boxes_B4=torch.tensor([[0, crop, 0, crop]] * images),
        pairs_P2=tags.nonzero(),
    )
