"""A trained network from its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ugrl.config import Config
from ugrl.method.prototypes import Prototypes
from ugrl.model.network import UGRLNet
from ugrl.storage import Place
from ugrl.train import checkpoint
from ugrl.train.build import build_net, build_prototypes


@dataclass(slots=True)
class Restored:
    """What a checkpoint holds, ready to evaluate or predict with."""

    cfg: Config
    class_names: tuple[str, ...]
    step: int
    net: UGRLNet
    prototypes: Prototypes


def restore(where: str | Path | Place, *, device: torch.device, best: bool = False) -> Restored:
    """Read a checkpoint folder, or the newest (or best) one of a run folder.

    Raises:
        CheckpointError: Nothing there, or it cannot be read.
    """
    path = checkpoint.find(where, best=best)
    state = checkpoint.read_state(path)
    net = build_net(state.config, len(state.class_names), pretrained=False)
    checkpoint.load_module(net, checkpoint.read_part(path, "model"), path)
    prototypes = build_prototypes(state.config, len(state.class_names), net.dim)
    checkpoint.load_module(prototypes, checkpoint.read_part(path, "prototypes"), path)
    return Restored(state.config, state.class_names, state.step, net.to(device).eval(), prototypes.to(device))
