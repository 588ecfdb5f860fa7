"""State dicts of torchvision under timm's names, where timm has the same architecture.

ResNets have the same names in both. ViTs, ConvNeXts and Swins are renamed by tables. EfficientNets and MobileNets count
their layers through, where timm has stages: their tensors are matched in order, and every shape must agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ugrl.errors import CheckpointError
from ugrl.model.specs import TIMM

# Patterns at the beginning of a name → what stands there in timm; ``{0}`` is the first group.
_VIT = {
    r"class_token": "cls_token",
    r"pos_embedding": "pos_embed",
    r"conv_proj\.": "patch_embed.proj.",
    r"layers\.encoder_layer_(\d+)\.ln_(\d)\.": "blocks.{0}.norm{1}.",
    r"layers\.encoder_layer_(\d+)\.self_attention\.in_proj_": "blocks.{0}.attn.qkv.",
    r"layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.": "blocks.{0}.attn.proj.",
    r"layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.": "blocks.{0}.mlp.fc1.",
    r"layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.": "blocks.{0}.mlp.fc2.",
    r"ln\.": "norm.",
    r"heads\.": "head.",
}
_CONVNEXT = {
    r"features\.0\.(\d)\.": "stem.{0}.",
    **{rf"features\.{2 * k}\.(\d)\.": f"stages.{k}.downsample.{{0}}." for k in (1, 2, 3)},
    **{
        rf"features\.{2 * k + 1}\.(\d+)\.{theirs}": f"stages.{k}.blocks.{{0}}.{ours}"
        for k in range(4)
        for theirs, ours in (
            (r"block\.0\.", "conv_dw."),
            (r"block\.2\.", "norm."),
            (r"block\.3\.", "mlp.fc1."),
            (r"block\.5\.", "mlp.fc2."),
            ("layer_scale", "gamma"),
        )
    },
    r"classifier\.0\.": "head.norm.",
    r"classifier\.2\.": "head.fc.",
}


_SWIN = {
    r"features\.0\.0\.": "patch_embed.proj.",
    r"features\.0\.2\.": "patch_embed.norm.",
    **{rf"features\.{2 * k}\.": f"layers.{k}.downsample." for k in (1, 2, 3)},
    **{
        rf"features\.{2 * k + 1}\.(\d+)\.{theirs}": f"layers.{k}.blocks.{{0}}.{ours}"
        for k in range(4)
        for theirs, ours in ((r"mlp\.0\.", "mlp.fc1."), (r"mlp\.3\.", "mlp.fc2."), ("", ""))
    },
    r"head\.": "head.fc.",
}
#: Epsilon of timm's batch norms, and of torchvision's for the models where that is another one.
_EPSILON, _OTHER_EPSILON = 1e-5, {"mobilenetv3": 1e-3, **{f"efficientnet_b{k}": 1e-3 for k in (5, 6, 7)}}
_LEAVES = ("weight", "bias", "running_mean", "running_var")


def from_torchvision(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str, source: str
) -> dict[str, Tensor] | None:
    """Tensors by timm's names; ``None`` where the file is none of torchvision's, or needs no other names.

    Args:
        state: By the names of the file.
        own: Tensors of timm's model.
        name: Of the backbone, ``timm/NAME``.
        source: The file, for messages.

    Raises:
        CheckpointError: timm has no model that computes the same, or this is not the one.
    """
    if "class_token" in state and "conv_proj.weight" in state:
        return _by_table(state, _VIT)
    if "features.0.0.weight" not in state:
        return None
    if any(n.endswith(".layer_scale") for n in state):
        return _by_table(state, _CONVNEXT)
    if any(n.endswith(".logit_scale") for n in state):
        raise CheckpointError(f"{source}: is torchvision's Swin V2, which no backbone here is; expected Swin (V1)")
    if any(n.endswith(".relative_position_bias_table") for n in state):
        return _by_table({n: t for n, t in state.items() if not n.endswith("relative_position_index")}, _SWIN)
    return _by_order(state, own, name, source)


def _by_table(state: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, target in table.items():
            if m := re.match(pattern, name):
                name = target.format(*m.groups()) + name[m.end() :]
                break
        out[name] = tensor.flatten() if name.endswith(".gamma") else tensor
    return out


def _by_order(state: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str, source: str) -> dict[str, Tensor]:
    """EfficientNets and MobileNets: the same layers in the same order.

    A batch norm's epsilon that differs goes into its variance, to which it is added anyway.
    """
    bare = name.removeprefix(TIMM)
    if bare.startswith("tf_"):
        raise CheckpointError(
            f"{source}: is torchvision's, which pads on all sides; {name} pads on one side, so that its features would "
            f"be others; expected a model without tf_, such as {TIMM}efficientnet_b0"
        )
    theirs = sorted((n for n in state if n.startswith("features.") and n.endswith(_LEAVES)), key=_natural)
    ours = [n for n in own if n.endswith(_LEAVES)]
    for a, b in zip(theirs, ours, strict=False):
        if state[a].shape != own[b].shape:
            raise CheckpointError(
                f"{source}: is of another model of torchvision than {name}: {a} has the shape {list(state[a].shape)}, "
                f"expected {list(own[b].shape)} of {b}"
            )
    if len(theirs) != len(ours):
        raise CheckpointError(
            f"{source}: is of another model of torchvision than {name}: {len(theirs)} tensors, expected {len(ours)}"
        )
    out = {n: t for n, t in state.items() if not n.startswith("features.")}
    more = next((e - _EPSILON for known, e in _OTHER_EPSILON.items() if bare.startswith(known)), 0.0)
    for a, b in zip(theirs, ours, strict=True):
        out[b] = state[a] + more if more and b.endswith(".running_var") else state[a]
    return out


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts the names as the layers are: 2 before 10, and a layer's tensors as torch lists them.

    >>> sorted(["features.10.0.bias", "features.2.0.bias", "features.2.0.weight"], key=_natural)
    ['features.2.0.weight', 'features.2.0.bias', 'features.10.0.bias']
    """
    *places, leaf = name.split(".")
    return [(int(p), "") if p.isdigit() else (-1, p) for p in places] + [(_LEAVES.index(leaf), "")]
