"""``model.safetensors`` with its configuration: what a hub upload holds, and a checkpoint that ``ugrl`` reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ugrl import config as config_mod
from ugrl.export.check import Runner, reference
from ugrl.export.facts import Facts
from ugrl.train import checkpoint
from ugrl.train.restore import Restored, restore


def write(got: Restored, folder: Path, facts: Facts) -> Runner:
    """Write ``model.safetensors``, ``prototypes.safetensors``, ``state.json`` and ``config.yaml``.

    Args:
        got: The trained network.
        folder: Where the files go.
        facts: Those of the run; the configuration holds no place of this machine.

    Returns:
        What runs them: the folder, read again.
    """
    parts = {"model": got.net.state_dict(), "prototypes": got.prototypes.state_dict()}
    config = config_mod.public_dict(facts.config)
    checkpoint.write_parts(folder, parts)
    checkpoint.write_state(
        folder, got.step, config=config, class_names=got.class_names, metrics=facts.metrics, data=facts.data
    )
    (folder / "config.yaml").write_text(config_mod.dump(config), encoding="utf-8")
    again = restore(folder, device=torch.device("cpu")).net

    def run(images_BHW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, scores = reference(again, images_BHW3)
        return logits.numpy(), scores.numpy()

    return run
