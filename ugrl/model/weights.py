"""Public MiT weights, in each layout in which they are handed around.

========================  ==========================================================================================
layout                    example
========================  ==========================================================================================
``segformer``             ``block1.0.attn.kv.weight`` (the authors' ``mit_b1.pth``)
``huggingface``           ``segformer.encoder.block.0.0.attention.self.key.weight`` (``nvidia/mit-b1`` on the hub)
``transformers 5``        ``stages.0.blocks.0.attention.k_proj.weight`` (what transformers 5 holds in memory)
``ugrl``                  ``encoder.stages.0.blocks.0.attn.kv.weight`` (a network of this project)
========================  ==========================================================================================

Keys and values are one layer here; where a file has two, they are put side by side.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ugrl.errors import CheckpointError
from ugrl.model.encoder import SPECS, MiT

#: Where a hub repository or a folder keeps its weights, best first.
FILES = ("model.safetensors", "pytorch_model.bin")
#: How long the hub may take to say whether it has a file.
PATIENCE_S = 12.0

_PREFIXES = ("module.", "model.", "backbone.", "segformer.", "encoder.")
#: Heads on top of an encoder; what else a file may hold without being wrong.
_FOREIGN = ("head.", "classifier.", "decode_head.", "auxiliary_head.", "decoder.", "g_seg.", "g_cls.")

_SEGFORMER = {
    r"patch_embed(\d)\.(proj|norm)": "stages.{0}.embed.{1}",
    r"block(\d)\.(\d+)\.(norm1|norm2|attn\.(?:q|kv|proj|sr|norm)|mlp\.fc[12])": "stages.{0}.blocks.{1}.{2}",
    r"block(\d)\.(\d+)\.mlp\.dwconv\.dwconv": "stages.{0}.blocks.{1}.mlp.dwconv",
    r"norm(\d)": "stages.{0}.norm",
}
_PARTS = {
    "huggingface": {
        "layer_norm_1": "norm1",
        "layer_norm_2": "norm2",
        "attention.self.query": "attn.q",
        "attention.self.key": "attn.k",
        "attention.self.value": "attn.v",
        "attention.self.sr": "attn.sr",
        "attention.self.layer_norm": "attn.norm",
        "attention.output.dense": "attn.proj",
        "mlp.dense1": "mlp.fc1",
        "mlp.dense2": "mlp.fc2",
        "mlp.dwconv.dwconv": "mlp.dwconv",
    },
    "transformers 5": {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.q_proj": "attn.q",
        "attention.k_proj": "attn.k",
        "attention.v_proj": "attn.v",
        "attention.o_proj": "attn.proj",
        "attention.sequence_reduction.sequence_reduction": "attn.sr",
        "attention.sequence_reduction.layer_norm": "attn.norm",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "mlp.dwconv.dwconv": "mlp.dwconv",
    },
}
# layout → (pattern of a block's layer, patterns of the rest)
_STAGED: dict[str, tuple[str, dict[str, str]]] = {
    "huggingface": (
        r"block\.(\d)\.(\d+)\.(.+)",
        {
            r"patch_embeddings\.(\d)\.proj": "stages.{0}.embed.proj",
            r"patch_embeddings\.(\d)\.layer_norm": "stages.{0}.embed.norm",
            r"layer_norm\.(\d)": "stages.{0}.norm",
        },
    ),
    "transformers 5": (
        r"stages\.(\d)\.blocks\.(\d+)\.(.+)",
        {
            r"stages\.(\d)\.patch_embeddings\.proj": "stages.{0}.embed.proj",
            r"stages\.(\d)\.patch_embeddings\.layer_norm": "stages.{0}.embed.norm",
            r"stages\.(\d)\.layer_norm": "stages.{0}.norm",
        },
    ),
}
_OWN = re.compile(r"stages\.\d\.(embed\.(proj|norm)|norm|blocks\.\d+\.(norm[12]|attn\.\w+|mlp\.(fc1|fc2|dwconv)))")


# The same in the last two layouts, so it tells nothing about which one a file has.
_SHARED = re.compile(r"stages\.\d\.blocks\.\d+\.mlp\.fc[12]\.\w+")


@dataclass(frozen=True, slots=True)
class WeightReport:
    """What was loaded.

    Attributes:
        path: File of weights to read.
        layout: See the table above.
        tensors: How many of the encoder's tensors it filled: all of them.
        ignored: Names in the file that belong to a head.
        warning: Why these may not be weights of an ImageNet classifier, in one line; empty where nothing says so.
    """

    path: Path
    layout: str
    tensors: int
    ignored: tuple[str, ...]
    warning: str = ""

    @property
    def text(self) -> str:
        """In words, for the header of a run."""
        rest = f", {len(self.ignored)} of a head ignored" if self.ignored else ""
        return f"{self.path.name} ({self.layout}): all {self.tensors} tensors of the encoder{rest}"


def load_backbone_weights(encoder: MiT, source: str) -> WeightReport:
    """Fill an encoder from a weight file.

    Args:
        encoder: Filled in place; its dtype and device stay.
        source: A file (``.pth``, ``.pt``, ``.bin``, ``.safetensors``), a folder that holds ``model.safetensors`` or
            ``pytorch_model.bin``, or a repository of the Hugging Face hub such as ``nvidia/mit-b1``.

    Returns:
        What was loaded.

    Raises:
        CheckpointError: The source cannot be found, read or downloaded, or does not fit this encoder.
    """
    path = locate(source)
    found = read_tensors(path)
    state, layout, ignored = convert(found, str(path))
    own = encoder.state_dict()
    _check(own, state, str(path), str(encoder.spec.dims) + " x " + str(encoder.spec.depths))
    encoder.load_state_dict({name: state[name].to(own[name].dtype) for name in own})
    warning = "" if layout == "ugrl" else supervision(found, ignored)  # its own head has learned from tags
    return WeightReport(path, layout, len(own), ignored, warning)


# Parts of the names of heads that answer for every pixel.
_DENSE = re.compile(
    r"(?:^|\.)(decode_head|auxiliary_head|aux_head|aux_classifier|seg_head|segmentation_head|sem_seg_head|mask_head"
    r"|decoder|fcn_head)(?:\.|$)"
)
# The layer of a head that names the classes, as various programs call it.
_LAST = (r"\b(?:classifier|conv_seg|cls_seg|linear_pred)\b", r"\b(?:head|heads|fc)\b")
# Classes of ImageNet's lists, whole and as they were cleaned, with and without a background.
_IMAGENET = (1000, 1001, 10450, 11221, 11821, 12000, 21841, 21842, 21843)


def supervision(state: Mapping[str, Tensor], ignored: Sequence[str]) -> str:
    """Why an encoder may have been trained on masks, or on other classes than ImageNet's: one line, or nothing.

    Args:
        state: All tensors of a file.
        ignored: Names among them that belong to a head.

    >>> import torch
    >>> supervision({"decode_head.conv_seg.weight": torch.zeros(150, 8, 1, 1)}, ["decode_head.conv_seg.weight"])
    'carries a segmentation head (decode_head, 150 classes): trained on masks, so results are not those of tags alone'
    >>> supervision({"head.weight": torch.zeros(1000, 8)}, ["head.weight"])
    ''
    """
    heads = {n: state[n] for n in ignored if n in state and n.endswith("weight") and state[n].ndim in (2, 4)}
    named = [[t for n, t in heads.items() if re.search(pattern, n)] for pattern in _LAST]
    last = next((found[-1] for found in named if found), None)
    classes = 0 if last is None else int(last.shape[0])
    part = next((match[1] for n in heads if (match := _DENSE.search(n))), "")
    if not part and last is not None and last.ndim == 4 and classes not in _IMAGENET:
        part = "a convolution"  # behind pooling a classifier may be one, too, but of ImageNet's classes
    if part:
        count = f", {classes} classes" if classes else ""
        return f"carries a segmentation head ({part}{count}): trained on masks, so results are not those of tags alone"
    if classes and classes not in _IMAGENET:
        return f"carries a classifier of {classes} classes, not ImageNet's: results may not be those of tags alone"
    return ""


def locate(source: str) -> Path:
    """The weight file of a path or hub name; downloads it in the second case."""
    path = Path(source).expanduser()
    if path.is_dir():
        for name in FILES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path}: the folder holds no weights, expected {' or '.join(FILES)}")
    if path.is_file():
        return path
    looks_like_file = path.suffix in (".pth", ".pt", ".bin", ".safetensors") or not re.fullmatch(
        r"[\w.-]+/[\w.-]+", source
    )
    if looks_like_file:
        raise CheckpointError(
            f"{source}: no such file; expected a weight file, a folder or a hub name like nvidia/mit-b1"
        )
    return _download(source)


def _download(repo: str) -> Path:
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import EntryNotFoundError

        for name in FILES:
            if isinstance(kept := hub.try_to_load_from_cache(repo, name), str):
                return Path(kept)
        for name in FILES:
            try:
                # The download itself asks an unreachable hub again and again: one question first.
                _within(PATIENCE_S, partial(hub.get_hf_file_metadata, hub.hf_hub_url(repo, name), timeout=5))
            except EntryNotFoundError:
                continue  # older repositories have the other file
            return Path(hub.hf_hub_download(repo, name))
        raise EntryNotFoundError(f"neither {' nor '.join(FILES)} is in it")
    except Exception as error:
        raise CheckpointError(
            f"{repo}: cannot be downloaded from the Hugging Face hub ({_one_line(error)}); model.weights=null trains "
            f"without; or fetch https://huggingface.co/{repo}/resolve/main/{FILES[1]} where there is a network and "
            "set model.weights to the path of that file"
        ) from None


def _within(seconds: float, work: Callable[[], object]) -> None:
    """Do something that may hang, in a thread that is left behind when it does.

    Raises:
        TimeoutError: The work is not done in time.
        BaseException: Whatever it raised.
    """
    ended: Future[None] = Future()

    def body() -> None:
        try:
            work()
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=body, name="hub", daemon=True).start()
    try:
        ended.result(timeout=seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a file, unpacked from ``state_dict`` or ``model``; pickles are read as weights only.

    Raises:
        CheckpointError: Not such a file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read as weights ({_one_line(error)})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dictionary of tensors")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def convert(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """Rename tensors of any layout to this project's names.

    Args:
        state: Tensors by parameter name.
        source: Name of the file in error messages.

    Returns:
        Renamed tensors, the layout's name, and the names that belong to heads.

    Raises:
        CheckpointError: A name of no known layout, or of another layout than the names before it.
    """
    out: dict[str, Tensor] = {}
    halves: dict[str, dict[str, Tensor]] = {}
    layouts: dict[str, str] = {}
    ignored: list[str] = []
    unknown: list[str] = []
    for name, tensor in state.items():
        bare = _strip(name)
        if bare.startswith(_FOREIGN):
            ignored.append(name)
            continue
        found = _rename(bare)
        if found is None:
            unknown.append(name)
            continue
        layout, target = found
        if not _SHARED.fullmatch(bare):
            layouts.setdefault(layout, name)
        half = re.fullmatch(r"(.+\.attn\.)([kv])(\.\w+)", target)
        if half:
            halves.setdefault(f"{half[1]}kv{half[3]}", {})[half[2]] = tensor
        else:
            out[target] = tensor
    if not layouts:
        first = next(iter(state), "nothing")
        raise CheckpointError(f"{source}: no MiT weights in it (first name: '{first}'), expected e.g. {_EXAMPLES}")
    if unknown:
        raise CheckpointError(
            f"{source}: {len(unknown)} unexpected {_names(unknown)} beside the {next(iter(layouts))} layout"
        )
    if len(layouts) > 1:
        raise CheckpointError(f"{source}: mixes layouts ({', '.join(f'{k}: {v}' for k, v in layouts.items())})")
    for target, parts in halves.items():
        if set(parts) != {"k", "v"}:
            lone, other = ("key", "value") if "k" in parts else ("value", "key")
            raise CheckpointError(f"{source}: has the {lone} but not the {other} of {target}")
        out[target] = torch.cat([parts["k"], parts["v"]])
    return out, next(iter(layouts)), tuple(ignored)


_EXAMPLES = "'patch_embed1.proj.weight' or 'segformer.encoder.patch_embeddings.0.proj.weight'"


def _strip(name: str) -> str:
    """Without the prefixes of wrappers; ``model.`` and the like may be nested."""
    for prefix in _PREFIXES * 2:
        name = name.removeprefix(prefix)
    return name


def _rename(name: str) -> tuple[str, str] | None:
    """(layout, name here) of a stripped name, or ``None``."""
    base, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if _OWN.fullmatch(base):
        return "ugrl", name
    for pattern, target in _SEGFORMER.items():
        if m := re.fullmatch(pattern, base):
            return "segformer", target.format(int(m[1]) - 1, *m.groups()[1:]) + "." + leaf
    for layout, (block, rest) in _STAGED.items():
        if (m := re.fullmatch(block, base)) and m[3] in _PARTS[layout]:
            return layout, f"stages.{m[1]}.blocks.{m[2]}.{_PARTS[layout][m[3]]}.{leaf}"
        for pattern, target in rest.items():
            if m := re.fullmatch(pattern, base):
                return layout, target.format(*m.groups()) + "." + leaf
    return None


def _check(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, wanted: str) -> None:
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    if not (missing or extra or shapes):
        return
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing {_names(missing)}")
    if extra:
        problems.append(f"{len(extra)} unexpected {_names(extra)}")
    if shapes:
        name = shapes[0]
        problems.append(
            f"{len(shapes)} of another shape ({name}: got {list(state[name].shape)}, expected {list(own[name].shape)})"
        )
    guess = guess_backbone(state)
    hint = f"; the file looks like {guess}: set model.backbone to it" if guess else ""
    raise CheckpointError(f"{source}: does not fit the encoder of {wanted}: {', '.join(problems)}{hint}")


def guess_backbone(state: Mapping[str, Tensor]) -> str | None:
    """The name in :data:`ugrl.model.encoder.SPECS` whose widths and depths renamed tensors have, or ``None``."""
    dims, depths = [], []
    for stage in range(4):
        norm = state.get(f"stages.{stage}.norm.weight")
        dims.append(0 if norm is None else norm.shape[0])
        found = [re.match(rf"stages\.{stage}\.blocks\.(\d+)\.", name) for name in state]
        depths.append(len({m[1] for m in found if m}))
    for name, spec in SPECS.items():
        if spec.dims == tuple(dims) and spec.depths == tuple(depths):
            return name
    return None


def _names(names: list[str]) -> str:
    return "(" + ", ".join(names[:3]) + (", …" if len(names) > 3 else "") + ")"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:160]}"
