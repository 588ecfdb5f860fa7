"""From rows to a batch, for any loader: slots that threads fill, in whichever form the device wants."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ugrl.data.augment import Augment, tags_vector
from ugrl.data.cache import Decoded, PixelCache
from ugrl.data.device import Labels, PixelBatch, RawBatch, cut_axes
from ugrl.data.images import decode_pixels
from ugrl.data.order import sample_rng
from ugrl.data.spec import NEEDS_TEACHER, LoaderSpec
from ugrl.data.spec import OnDevice as OnDevice
from ugrl.errors import DataError, HungError
from ugrl.types import Batch, Row, stack_masks


class Loaded(Protocol):
    """What a loader yields."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The batch, ready for a step on ``device``."""
        ...


# A step that waits this long for its batch says so.
WORD_S = 30.0


def awaited(ready: Callable[[float], bool], step: int, *, stall_s: float, say: Callable[[str], None]) -> None:
    """Wait for a batch that threads are making; a disk or a storage that hangs is not waited for without end.

    Args:
        ready: Waits for so many seconds at most, and says whether the batch is there.
        step: That needs it, counted from 0.
        stall_s: How long it is waited for.
        say: Told in one line that it is waited for, and that it has come.

    Raises:
        HungError: It has not come.
    """
    first = min(WORD_S, stall_s)
    if ready(first):
        return
    if stall_s > first:
        say(f"step {step + 1}: no batch for {first:g} s; waiting up to {stall_s:g} s (train.stall_s)")
    if stall_s == first or not ready(stall_s - first):
        raise HungError(
            f"step {step + 1}: no batch for {stall_s:g} s (train.stall_s): the disk or the storage of the shards "
            "hangs; continue with --resume once it answers"
        )
    say(f"step {step + 1}: its batch is here")


@dataclass(frozen=True, slots=True)
class Draft:
    """A batch in the making; slot k of everything belongs to sample k.

    Attributes:
        images: float32 (B, 3, crop, crop), uint8 (B, crop, crop, 3), or ``None`` where images stay raw.
        ids: Ids of the rows.
        tags_BF: float32 (B, F): 1 for each class that the image shows, else 0.
        boxes_B4: int64 (B, 4), see :class:`ugrl.types.Batch`.
        masks: uint8 (crop, crop) each, or ``None``.
        raw: Parts of the decoded images, uint8 (h, w, 3) each.
        axes_B23: float64, see :class:`ugrl.data.device.RawBatch`.
        with_masks: Whether masks are wanted.
        teachers: Teacher masks, as ``masks``.
    """

    images: Tensor | None
    ids: list[str]
    tags_BF: Tensor
    boxes_B4: Tensor
    masks: list[np.ndarray | None]
    raw: list[Tensor]
    axes_B23: Tensor
    with_masks: bool
    teachers: list[np.ndarray | None]


class BufferPool:
    """Memory for images that is used again once nothing refers to the tensor it was lent as.

    Fresh memory costs a fault for every 4 kB, a third of the time that a crop takes. Thread-safe.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque()

    def empty(self, shape: tuple[int, ...], dtype: type) -> Tensor:
        """A tensor of any content."""
        try:
            memory = self._free.pop()  # from the end: what was used last is in the processor's cache
        except IndexError:
            memory = np.empty(shape, dtype)
        if memory.shape != shape or memory.dtype != dtype:
            memory = np.empty(shape, dtype)
        loan = memory.view()
        # The tensor, its views and arrays made of them keep `loan` alive, and it alone tells when they end.
        weakref.finalize(loan, self._free.append, memory).atexit = False
        return torch.from_numpy(loan)


class BatchMaker:
    """Decodes, cuts and stacks.

    Args:
        augment: Draws the cuts and makes them.
        seed: Seed of the run, from which each cut is drawn.
        on_device: What is left to the device: nothing, normalising, or all but decoding.
        cache: Where decoded images are kept.
        pin_memory: Whether images lie in page-locked memory, for copies that overlap with a GPU's work.
        teacher: Whether batches have teacher masks, which all rows then need.
    """

    def __init__(
        self,
        augment: Augment,
        *,
        seed: int,
        on_device: OnDevice = "none",
        cache: PixelCache | None = None,
        pin_memory: bool = False,
        teacher: bool = False,
    ) -> None:
        self.augment, self.seed, self.on_device = augment, seed, on_device
        self.cache, self.pin_memory, self.with_teacher = cache, pin_memory, teacher
        self._memory = BufferPool()

    @classmethod
    def of(cls, spec: LoaderSpec, cache: PixelCache | None) -> BatchMaker:
        """The one that makes the batches that a loader is asked for."""
        return cls(
            Augment.of(spec.data, spec.num_classes),
            seed=spec.seed,
            on_device=spec.on_device,
            cache=cache,
            pin_memory=spec.pin_memory,
            teacher=spec.teacher,
        )

    def start(self, count: int, *, with_masks: bool = True) -> Draft:
        """An empty batch of ``count`` samples."""
        crop, images = self.augment.crop, None
        if self.on_device == "none":
            images = self._images((count, 3, crop, crop), np.float32)
        elif self.on_device == "normalize":
            images = self._images((count, crop, crop, 3), np.uint8)
        return Draft(
            images=images,
            ids=[""] * count,
            tags_BF=torch.empty(count, self.augment.num_classes, pin_memory=self.pin_memory),
            boxes_B4=torch.empty(count, 4, dtype=torch.int64),
            masks=[None] * count,
            raw=[torch.empty(0, 0, 3, dtype=torch.uint8)] * count,
            axes_B23=torch.empty(count, 2, 3, dtype=torch.float64),
            with_masks=with_masks,
            teachers=[None] * count,
        )

    def _stacked(self, masks: list[np.ndarray | None]) -> Tensor | None:
        masks_BHW = stack_masks(masks)
        return masks_BHW.pin_memory() if masks_BHW is not None and self.pin_memory else masks_BHW

    def _images(self, shape: tuple[int, ...], dtype: type) -> Tensor:
        if self.pin_memory:  # torch recycles page-locked memory, and knows when copies from it have ended
            return torch.empty(shape, dtype=torch.uint8 if dtype is np.uint8 else torch.float32, pin_memory=True)
        return self._memory.empty(shape, dtype)

    def kept(self, id: str) -> Decoded | None:
        """A row that need not be read, since it was decoded before."""
        return None if self.cache is None else self.cache.get(id)

    def fill(self, draft: Draft, k: int, row: Row, epoch: int, kept: Decoded | None = None) -> None:
        """Make sample k; from any thread.

        Args:
            draft: The batch in the making.
            k: The sample's slot in it.
            row: Of the shards; its image is not looked at where ``kept`` is given.
            epoch: Decides the cut, with the seed and the row's id.
            kept: The decoded row of :meth:`kept`, if there is one.

        Raises:
            DataError: The image or a mask is broken, or the teacher's is wanted and missing.
        """
        image_HW3 = decode_pixels(row.image, f"row {row.id}") if kept is None else kept.image_HW3
        cut = self.augment.cut(image_HW3.shape[0], image_HW3.shape[1], sample_rng(self.seed, epoch, row.id))
        draft.ids[k] = row.id
        draft.tags_BF.numpy()[k] = tags_vector(row.tags, self.augment.num_classes)
        draft.boxes_B4.numpy()[k] = cut.box_4
        if draft.with_masks:
            draft.masks[k] = self.augment.mask(row, cut)
        if self.with_teacher:
            draft.teachers[k] = self.augment.teacher(row, cut)
            if draft.teachers[k] is None:
                raise DataError(f"row {row.id}: no teacher mask; {NEEDS_TEACHER}")
        if draft.images is None:
            (rows, columns), axes = cut_axes(cut)
            part_hw3 = torch.from_numpy(image_HW3[rows, columns])
            draft.raw[k] = part_hw3.contiguous().pin_memory() if self.pin_memory else part_hw3
            draft.axes_B23.numpy()[k] = axes
        elif draft.images.dtype == torch.uint8:
            self.augment.pixels(image_HW3, cut, draft.images[k].numpy())
        else:
            self.augment.floats(image_HW3, cut, draft.images[k].numpy())
        if kept is None and self.cache is not None:  # only what was used without an error
            self.cache.put(row, image_HW3)

    def finish(self, draft: Draft) -> Loaded:
        """The batch, once every slot is filled; it has masks only if every sample has one."""
        labels = Labels(
            ids=tuple(draft.ids),
            tags_BF=draft.tags_BF,
            boxes_B4=draft.boxes_B4,
            masks_BHW=self._stacked(draft.masks),
            pairs_P2=draft.tags_BF.nonzero(),
            teachers_BHW=self._stacked(draft.teachers) if self.with_teacher else None,
        )
        if draft.images is None:
            return RawBatch(labels, tuple(draft.raw), draft.axes_B23, self.augment.crop, self.augment.pad)
        if draft.images.dtype == torch.uint8:
            return PixelBatch(labels, draft.images, self.augment.pad)
        return labels.batch(draft.images)
