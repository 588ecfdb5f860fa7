"""The network of a configuration."""

from __future__ import annotations

import torch

from ugrl.config import Config
from ugrl.model.network import UGRLNet
from ugrl.model.weights import load_backbone_weights
from ugrl.seeding import derive


def build_net(cfg: Config, num_classes: int, *, pretrained: bool = True) -> UGRLNet:
    """A network with weights that are a function of ``cfg.seed`` (and ``model.weights``).

    Args:
        cfg: The run.
        num_classes: F, without background.
        pretrained: Whether to load ``model.weights``; a checkpoint's reader does not need them.

    Raises:
        CheckpointError: ``model.weights`` cannot be found or do not fit.
    """
    m = cfg.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(cfg.seed, "init"))
        net = UGRLNet(
            num_classes=num_classes,
            backbone=m.backbone,
            decoder_dim=m.decoder_dim,
            d_seg=cfg.method.contrast.d_seg,
            pooling=m.pooling,
            affinity=m.affinity,
            norm=m.norm,
            drop_path=m.drop_path,
            dropout=m.dropout,
        )
    if pretrained and m.weights:
        load_backbone_weights(net.encoder, m.weights)
    return net
