"""The runs that photographs are shown to, and how well they do on each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest
from ugrl.errors import CheckpointError, DataError
from ugrl.eval.looks import Look, Seer
from ugrl.eval.looks import looks as show
from ugrl.eval.metrics import Confusion
from ugrl.method.targets import TargetMaker
from ugrl.storage import Place, place
from ugrl.text import line
from ugrl.train.build import build_par
from ugrl.train.checkpoint import find
from ugrl.train.restore import Restored, restore


@dataclass(frozen=True, slots=True)
class Run:
    """A checkpoint that photographs are shown to.

    Attributes:
        name: Of the run folder, for people.
        checkpoint: Name of the checkpoint.
        got: What it holds.
        targets: Makes pseudo-labels as the run's training does.
        device: Where its network is.
    """

    name: str
    checkpoint: str
    got: Restored
    targets: TargetMaker
    device: torch.device

    @property
    def u_kind(self) -> str:
        """``distance`` or ``margin``."""
        return self.got.cfg.method.uncertainty.kind

    @property
    def seer(self) -> Seer:
        """Who looks at the photographs."""
        got = self.got
        return Seer(got.net, got.cfg, got.prototypes, self.targets, got.step, self.device)


@dataclass(frozen=True, slots=True)
class Marks:
    """How well a run does on one photograph.

    Attributes:
        iou: Class → IoU of the segmentation, over the classes of the photograph's mask.
        miou: Their mean; NaN without a mask.
        error: What photographs are sorted by: 1 − ``miou``, and without a mask the classifier's largest mistake.
        u: Largest uncertainty of the tags; NaN where none is known.
    """

    iou: dict[int, float]
    miou: float
    error: float
    u: float


def marks_of(look: Look) -> Marks:
    """The marks of one photograph."""
    iou: dict[int, float] = {}
    if look.truth_HW is not None:
        counts = Confusion(len(look.probs_F) + 1)
        counts.add(torch.from_numpy(look.predicted_HW), torch.from_numpy(look.truth_HW))
        iou = {c: v for c, v in enumerate(counts.iou_C.tolist()) if math.isfinite(v)}
    miou = sum(iou.values()) / len(iou) if iou else math.nan
    tagged = np.isin(np.arange(len(look.probs_F)) + 1, look.tags)
    mistake = float(np.abs(tagged - look.probs_F).max())
    u = max((v for c, v in look.u.items() if c), default=math.nan)
    return Marks(iou, miou, 1 - miou if iou else mistake, u)


def open_run(where: str | Path | Place, *, best: bool, device: torch.device) -> Run:
    """The newest (or best) checkpoint of a run folder, or a checkpoint by its own path.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    path = find(where, best=best)
    got = restore(path, device=device)
    folder = place(where)
    name = folder.parent.parent.name if folder.name == path.name else folder.name
    targets = TargetMaker(got.cfg, got.prototypes, build_par(got.cfg), stride=got.net.stride)
    return Run(line(name, 80), path.name, got, targets, device)


def check_classes(runs: Sequence[Run], manifest: Manifest) -> None:
    """Refuse runs of other classes than each other or the shards.

    Raises:
        CheckpointError: Names which.
    """
    first = runs[0].got.class_names
    for run in runs[1:]:
        if run.got.class_names != first:
            raise CheckpointError(
                f"{run.name} was trained on {_names(run.got.class_names)}, {runs[0].name} on {_names(first)}; "
                "expected two runs of the same classes"
            )
    if first != manifest.class_names:
        raise CheckpointError(
            f"{runs[0].name}: trained on {_names(first)}; {manifest.root} has {_names(manifest.class_names)}"
        )


def open_split(shards: str | Path, split: str) -> ShardReader:
    """The photographs of a split.

    Raises:
        DataError: No such shards or split, or a split without an image.
    """
    reader = ShardReader(shards, split, teacher=True)
    if not len(reader):
        raise DataError(f"{reader.manifest.root}: split '{line(split, 40)}' has no images; choose another --split")
    return reader


def _names(names: tuple[str, ...]) -> str:
    shown = ", ".join(line(n, 40) for n in names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} classes ({shown})"


def looks(run: Run, reader: ShardReader, indices: Sequence[int], *, embed: bool = False) -> Iterator[list[Look]]:
    """As :func:`ugrl.eval.looks.looks`, for a run whose classes are those of the reader (:func:`check_classes`)."""
    return show(run.seer, reader, indices, embed=embed)
