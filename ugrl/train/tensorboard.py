"""Scalars and pictures for TensorBoard, through tensorboardX where it is installed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ugrl.eval.evaluate import EvalResult
from ugrl.eval.palette import PALETTE, denormalize
from ugrl.train.background import BackgroundWriter, Say
from ugrl.train.observer import Observer
from ugrl.train.tracking import Scalar, points_of, scalars_of
from ugrl.types import Batch


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
        say: Told in one line of trouble; by default it goes to stderr.

    Attributes:
        writer: Background writer of the event files; ``None`` without tensorboardX.
    """

    def __init__(self, folder: Path, *, step: int = 0, say: Say | None = None) -> None:
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
        """One row per image: image, CAM of its classes, pseudo-label, prediction, uncertainty (and mask)."""
        if self.writer:
            self.writer.put([Picture("train/walk", sheet(batch, views), done, time.time())])

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


def heat(x_HW: np.ndarray) -> np.ndarray:
    """A map in [0, 1] as blue–yellow–red, uint8 (H, W, 3)."""
    x = np.clip(x_HW, 0.0, 1.0)[..., None]
    stops = np.array([[13, 8, 80], [60, 120, 200], [250, 230, 90], [200, 20, 20]], dtype=np.float64)
    at = x[..., 0] * (len(stops) - 1)
    low = np.minimum(at.astype(int), len(stops) - 2)
    part = (at - low)[..., None]
    return (stops[low] * (1 - part) + stops[low + 1] * part).astype(np.uint8)


def sheet(batch: Batch, views: Mapping[str, Tensor], most: int = 4) -> np.ndarray:
    """The picture of :meth:`TensorBoard.on_pictures`, uint8 (rows·H, columns·W, 3)."""
    rows = []
    pairs = batch.pairs_P2
    for k in range(min(most, len(batch.ids))):
        image = denormalize(batch.images_B3HW[k].float().cpu().numpy())
        h, w = image.shape[:2]
        columns = [image]
        if "cam" in views:
            own = (pairs[:, 0] == k).nonzero().flatten()
            cam = views["cam"][own.to(views["cam"].device)].float()
            top = cam.amax(0).cpu().numpy() if len(own) else np.zeros((h, w))
            columns.append((0.4 * image + 0.6 * heat(top)).astype(np.uint8))
        if "labels" in views:
            columns.append(PALETTE[views["labels"][k].cpu().numpy()])
        if "prediction" in views:
            logits = views["prediction"][k : k + 1].float()
            full = torch.nn.functional.interpolate(logits, size=(h, w), mode="bilinear", align_corners=False)
            columns.append(PALETTE[full.argmax(1)[0].cpu().numpy()])
        if "u" in views:
            columns.append(heat(views["u"][k].float().cpu().numpy()))
        if batch.masks_BHW is not None:
            columns.append(PALETTE[batch.masks_BHW[k].cpu().numpy()])
        rows.append(np.concatenate(columns, axis=1))
    return np.concatenate(rows, axis=0)
