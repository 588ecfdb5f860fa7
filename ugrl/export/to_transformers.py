r"""A SegFormer folder of ``transformers``, for MiT encoders: the same logits from ``SegformerForSemanticSegmentation``.

The two architectures are one, but for the norms of the residual stream: eps is 1e-6 here (as the authors have it), and
1e-5 there, whatever ``layer_norm_eps`` says. A LayerNorm of √10·x with eps 1e-5 is one of x with eps 1e-6, since
√10·(x - m) / √(10·v + 1e-5) = (x - m) / √(v + 1e-6). So everything that is added to a stage's stream (the patch
embedding's norm and the last layers of both branches) is multiplied by √10, and the norms that read it are exact. The
other norms have 1e-5 in both. Names are those of the hub (``segformer.encoder.block.0.0…``), which transformers 4
and 5 read.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ugrl.bilinear import resize
from ugrl.data.augment import normalize
from ugrl.errors import ConfigError
from ugrl.export.check import Runner
from ugrl.model.backbone import MEAN, STD
from ugrl.model.encoder import MiT
from ugrl.model.network import UGRLNet
from ugrl.train.restore import Restored

#: √(1e-5 / 1e-6), see the module.
STREAM = math.sqrt(10.0)

_BLOCK = {
    "norm1": "layer_norm_1",
    "norm2": "layer_norm_2",
    "attn.q": "attention.self.query",
    "attn.sr": "attention.self.sr",
    "attn.norm": "attention.self.layer_norm",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.dense1",
    "mlp.dwconv": "mlp.dwconv.dwconv",
    "mlp.fc2": "mlp.dense2",
}
_STAGE = {"embed.proj": "patch_embeddings.{}.proj", "embed.norm": "patch_embeddings.{}.layer_norm"}
_STAGE["norm"] = "layer_norm.{}"
#: Layers whose outputs make up a stage's stream.
_INTO_STREAM = ("embed.norm", "attn.proj", "mlp.fc2")


def refuse_others(net: UGRLNet) -> None:
    """Refuse a network that SegFormer's classes cannot hold.

    Raises:
        ConfigError: Says what does not fit, and what to do.
    """
    others = "; expected --to onnx, torch or safetensors"
    if not isinstance(net.encoder, MiT):
        raise ConfigError(f"--to transformers: {net.backbone} is no MiT, and SegFormer has no other encoder{others}")
    if not isinstance(net.decoder.norm, nn.BatchNorm2d):
        raise ConfigError(
            f"--to transformers: model.norm is group, and SegFormer's decoder has a batch norm{others} "
            "(or train with model.norm=sync_batch)"
        )


def write(got: Restored, folder: Path) -> Runner:
    """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``.

    Args:
        got: The trained network.
        folder: Where the files go.

    Returns:
        What runs them: the folder, read by transformers.

    Raises:
        ConfigError: See :func:`refuse_others`.
    """
    refuse_others(got.net)
    save_file(weights(got.net), folder / "model.safetensors", metadata={"format": "pt"})
    config = configuration(got.net, ("background", *got.class_names))
    for name, tree in {"config.json": config, "preprocessor_config.json": _PIXELS}.items():
        (folder / name).write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return runner(folder)


def configuration(net: UGRLNet, names: tuple[str, ...]) -> dict[str, Any]:
    """The text of ``config.json``; ``names`` begin with the background."""
    assert isinstance(net.encoder, MiT)
    spec = net.encoder.spec
    return {
        "architectures": ["SegformerForSemanticSegmentation"],
        "model_type": "segformer",
        "num_channels": 3,
        "num_encoder_blocks": 4,
        "depths": list(spec.depths),
        "sr_ratios": list(spec.sr_ratios),
        "hidden_sizes": list(spec.dims),
        "patch_sizes": [7, 3, 3, 3],
        "strides": list(spec.strides),
        "num_attention_heads": list(spec.heads),
        "mlp_ratios": [spec.mlp_ratio] * 4,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout_prob": net.decoder.dropout,
        "drop_path_rate": spec.drop_path,
        "decoder_hidden_size": net.decoder.classify.in_channels,
        "reshape_last_stage": True,
        "semantic_loss_ignore_index": 255,
        "id2label": {str(k): name for k, name in enumerate(names)},
        "label2id": {name: k for k, name in enumerate(names)},
        "torch_dtype": "float32",
    }


#: Pixels are normalised, and keep their size.
_PIXELS = {
    "image_processor_type": "SegformerImageProcessor",
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(MEAN),
    "image_std": list(STD),
    "do_reduce_labels": False,
}


def weights(net: UGRLNet) -> dict[str, Tensor]:
    """Tensors by the hub's names, float32 on the CPU."""
    out: dict[str, Tensor] = {}
    for name, tensor in net.encoder.state_dict().items():
        out |= _encoder_tensors(name, tensor.detach().cpu().double())
    decoder = net.decoder
    for k, layer in enumerate(decoder.project):
        out |= {f"decode_head.linear_c.{k}.proj.{n}": t for n, t in layer.state_dict().items()}
    for part, module in (("linear_fuse", decoder.fuse), ("batch_norm", decoder.norm), ("classifier", decoder.classify)):
        out |= {f"decode_head.{part}.{n}": t for n, t in module.state_dict().items()}
    # Copies: two names may share a storage, which safetensors refuses.
    return {n: (t.float() if t.is_floating_point() else t).detach().cpu().contiguous().clone() for n, t in out.items()}


def _encoder_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor under the hub's name; keys and values are two layers there."""
    found = re.fullmatch(r"stages\.(\d)\.(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", name)
    assert found is not None, name
    stage, block, layer, leaf = found[1], found[2], found[3], found[4]
    if layer in _INTO_STREAM:
        tensor = tensor * STREAM
    if block is None:
        return {f"segformer.encoder.{_STAGE[layer].format(stage)}.{leaf}": tensor}
    at = f"segformer.encoder.block.{stage}.{block}."
    if layer == "attn.kv":
        key, value = tensor.chunk(2)
        return {f"{at}attention.self.key.{leaf}": key, f"{at}attention.self.value.{leaf}": value}
    return {f"{at}{_BLOCK[layer]}.{leaf}": tensor}


def runner(folder: Path) -> Runner:
    """What runs a folder: transformers, on the CPU; its logits are enlarged to the images' size as usual there."""
    from transformers import SegformerForSemanticSegmentation
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: Any = SegformerForSemanticSegmentation.from_pretrained(str(folder)).eval()
    finally:
        if shown:
            logging.enable_progress_bar()

    def run(images_BHW3: np.ndarray) -> tuple[np.ndarray, None]:
        x_B3HW = torch.from_numpy(np.stack([normalize(image) for image in images_BHW3]))
        with torch.no_grad():
            logits = model(pixel_values=x_B3HW).logits
        return resize(logits, (x_B3HW.shape[-2], x_B3HW.shape[-1])).numpy(), None

    return run
