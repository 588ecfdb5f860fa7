"""``model.pt2``: a program of ``torch.export``, which runs without the code of this project."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from ugrl.export.check import Runner
from ugrl.export.graph import capture, quiet
from ugrl.train.restore import Restored

FILE = "model.pt2"


def write(got: Restored, folder: Path, size: tuple[int, int] | None) -> Runner:
    """Write the program, with ``classes.json`` inside.

    Args:
        got: The trained network.
        folder: Where the file goes.
        size: (H, W) of the images, or ``None`` for any.

    Returns:
        What runs it: the file, read again.

    Raises:
        UgrlError: The network cannot be captured.
    """
    program = capture(got.net, size)
    with quiet():
        torch.export.save(
            program,
            folder / FILE,
            extra_files={"classes.json": json.dumps(["background", *got.class_names])},
        )
    return runner(folder / FILE)


def runner(file: Path) -> Runner:
    """What runs a program, on the CPU."""
    with quiet():
        module = torch.export.load(file).module()

    def run(images_BHW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            logits, scores = module(torch.from_numpy(images_BHW3))
        return logits.numpy(), scores.numpy()

    return run
