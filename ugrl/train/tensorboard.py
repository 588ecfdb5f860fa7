"""Scalars and pictures for TensorBoard, through tensorboardX where it is installed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ugrl.eval.evaluate import EvalResult
from ugrl.eval.looks import Look
from ugrl.eval.palette import denormalize
from ugrl.eval.palettes import u_share
from ugrl.eval.sheet import Row, draw, row_of
from ugrl.train.background import BackgroundWriter, Say
from ugrl.train.observer import Observer
from ugrl.train.tracking import Scalar, points_of, scalars_of
from ugrl.types import IGNORE, Batch


@dataclass(frozen=True, slots=True)
class Picture:
    """One image of one step, uint8 (H, W, 3)."""

    name: str
    pixels_HW3: np.ndarray
    step: int
    at: float


class TensorBoard(Observer):
    """A run in TensorBoard. Writing is done by a thread; a full disk never stops the training.

    Without tensorboardX nothing is written (``ugrl`` runs without it).

    Args:
        folder: For TensorBoard's files: ``OUT/tb``.
        step: Steps done before: what TensorBoard knows of later ones is hidden, for they are written again.
        names: Of the classes 1…F, for pictures.
        u_kind: ``method.uncertainty.kind``, which decides the colours of u.
        say: Told in one line of trouble; by default it goes to stderr.

    Attributes:
        writer: Background writer of the event files; ``None`` without tensorboardX.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int = 0,
        names: Sequence[str] = (),
        u_kind: str = "distance",
        say: Say | None = None,
    ) -> None:
        self.names, self.u_kind = tuple(names), u_kind
        self.writer: BackgroundWriter[Scalar | Picture] | None = None
        try:
            import tensorboardX  # noqa: F401
        except ImportError:
            return
        self.writer = BackgroundWriter(f"TensorBoard in {folder}", EventFileWriter(folder, step), say)
        self.draws = True

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """One point per value under ``group/``; TensorBoard warns of what is not finite, so that is left out."""
        if self.writer:
            self.writer.put([point for point in scalars_of(group, values, step) if math.isfinite(point.value)])

    def on_log(self, done: int, values: Mapping[str, float]) -> None:
        """Points under ``train/``."""
        self.scalars("train", values, done)

    def on_eval(self, done: int, result: EvalResult) -> None:
        """Points under ``val/``, and one for each class."""
        for group, values in points_of(result).items():
            self.scalars(group, values, done)

    def on_pictures(self, done: int, batch: Batch, views: Mapping[str, Tensor]) -> None:
        """``train/walk``: crops of this batch, and what the step made of them."""
        self._draw("train/walk", f"step {done}: crops of a training batch", walk_rows(batch, views, self.u_kind), done)

    def on_looks(self, done: int, looks: Sequence[Look]) -> None:
        """``val/walk``: photographs of the validation split, the same ones each time."""
        self._draw(
            "val/walk",
            f"step {done}: the same images of the validation split",
            [look_row(look, self.u_kind) for look in looks],
            done,
        )

    def _draw(self, name: str, title: str, rows: Iterable[Row], step: int) -> None:
        if self.writer:
            self.writer.put([Picture(name, draw(title, list(rows), self.names, self.u_kind), step, time.time())])

    def leave(self, status: str) -> None:
        """Have the rest written."""
        if self.writer:
            self.writer.leave(status)

    def close(self) -> None:
        """Wait for it."""
        if self.writer:
            self.writer.close()


class EventFileWriter:
    """Event files as TensorBoard reads them; belongs to one :class:`ugrl.train.background.BackgroundWriter`.

    tensorboardX's own writer thread ends at the first error of a disk, and later points then wait for it without end.
    Every file begins with the step from which TensorBoard is to forget what older files say.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.since, self.files = folder, step + 1, 0
        self._file: Any = None
        with suppress(OSError):  # tried again with the first points
            self._opened()

    def write(self, items: Sequence[Scalar | Picture]) -> None:
        """Write and flush; after a failure it goes on in a new file, as the old one may end in half a record."""
        from tensorboardX.proto.event_pb2 import Event

        events = [Event(wall_time=item.at, step=item.step, summary=_summary(item)) for item in items]
        try:
            file = self._opened()
            for event in events:
                file.write_event(event)
            file.flush()
        except OSError:
            self._drop()
            self.since = items[0].step
            raise

    def close(self, status: str) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _opened(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Files are read in the order of their names; two starts within a second need different ones.
            self._file = EventsWriter(str(self.folder / "events"), f".{self.since:08d}.{self.files}")
            self.files += 1
            log = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(wall_time=time.time(), step=self.since, session_log=log))
        return self._file

    def _drop(self) -> None:
        broken, self._file = self._file, None
        if broken is not None:
            with suppress(OSError):  # what it still held is sent again
                broken.close()


def _summary(item: Scalar | Picture) -> Any:
    from tensorboardX.summary import image, scalar

    if isinstance(item, Picture):
        return image(item.name, item.pixels_HW3, dataformats="HWC")
    return scalar(f"{item.group}/{item.name}", item.value)


def walk_rows(batch: Batch, views: Mapping[str, Tensor], u_kind: str, most: int = 4) -> list[Row]:
    """The first images of a training batch, as crops, and what the step made of them."""
    rows, pairs = [], batch.pairs_P2
    for k in range(min(most, len(batch.ids))):
        image_HW3 = denormalize(batch.images_B3HW[k].float().cpu().numpy())
        h, w = image_HW3.shape[:2]
        own = (pairs[:, 0] == k).nonzero().flatten()
        layers: dict[str, np.ndarray] = {}
        if "cam" in views:
            cam = views["cam"][own.to(views["cam"].device)].float()
            layers["CAM of its tags"] = cam.amax(0).cpu().numpy() if len(own) else np.zeros((h, w))
        if "labels" in views:
            layers["pseudo-label"] = _labels(views["labels"][k])
        if "u" in views:
            undecided = views["labels"][k] == IGNORE
            u_HW = views["u"][k].float().masked_fill(undecided, math.nan).cpu().numpy()
            layers["uncertainty u"] = u_share(u_HW, u_kind)
        if "prediction" in views:
            logits = views["prediction"][k : k + 1].float()
            full = torch.nn.functional.interpolate(logits, size=(h, w), mode="bilinear", align_corners=False)
            layers["prediction"] = _labels(full.argmax(1)[0])
        if batch.masks_BHW is not None:
            layers["true mask"] = _labels(batch.masks_BHW[k])
        rows.append(row_of(batch.ids[k], [f + 1 for f in pairs[own, 1].tolist()], image_HW3, layers))
    return rows


def look_row(look: Look, u_kind: str) -> Row:
    """A whole photograph of a validation, and what the network makes of it; ``method.uncertainty.kind`` colours u."""
    layers = {"CAM of its tags": look.cam_HW, "pseudo-label": look.pseudo_HW}
    layers["uncertainty u"] = u_share(look.u_HW, u_kind)
    layers["prediction"] = look.predicted_HW
    if look.truth_HW is not None:
        layers["true mask"] = look.truth_HW
    return row_of(look.id, look.tags, look.image_HW3, layers)


def _labels(labels_HW: Tensor) -> np.ndarray:
    return labels_HW.to(torch.uint8).cpu().numpy()
