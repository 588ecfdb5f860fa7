"""``model.onnx``: an ONNX graph, and onnxruntime to run it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ugrl.errors import UgrlError
from ugrl.export.check import Runner
from ugrl.export.graph import OUTPUTS, PIXELS, capture, quiet
from ugrl.text import line
from ugrl.train.restore import Restored

FILE = "model.onnx"


def write(got: Restored, folder: Path, size: tuple[int, int] | None) -> Runner:
    """Write the graph.

    Args:
        got: The trained network.
        folder: Where the file goes.
        size: (H, W) of the images, or ``None`` for any.

    Returns:
        What runs it.

    Raises:
        UgrlError: The network cannot be captured, or has an operation that ONNX lacks.
    """
    program = capture(got.net, size)
    file = folder / FILE
    try:
        with quiet():
            torch.onnx.export(
                program,
                (),
                str(file),
                input_names=[PIXELS],
                output_names=list(OUTPUTS),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # whatever the exporter makes of a foreign model's code
        raise UgrlError(f"{got.net.backbone} cannot be written as ONNX ({line(error, 160)})") from error
    _describe(file, got)
    return runner(file)


def _describe(file: Path, got: Restored) -> None:
    """Put the names of the classes and of the axes into the file: it is often all that is handed on."""
    import onnx

    model = onnx.load(str(file))
    model.producer_name = "ugrl"
    axes = [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim]
    names = {old: new for old, new in zip(axes, ("batch", "height", "width"), strict=False) if old}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), axis.dim_param)
    facts = {"classes": json.dumps(["background", *got.class_names]), "step": str(got.step)}
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, str(file))


def runner(file: Path) -> Runner:
    """What runs a graph, on the CPU by onnxruntime."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(images_BHW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, scores = session.run(list(OUTPUTS), {PIXELS: images_BHW3})
        return logits, scores

    return run
