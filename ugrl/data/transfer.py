"""Batches on their way to the device, beside the step that is running there."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ugrl.data.make import Loaded
from ugrl.types import Batch


class Transfer:
    """A loader's batches on a device.

    On CUDA a batch is copied (from page-locked memory, where the loader uses it), and normalised or cut, on a stream of
    its own: the host asks for it as soon as it has queued the step before, so that the copy runs while that step does.
    The consumer's stream then waits for the copy alone.

    Args:
        batches: What a loader yields.
        device: Device to which batches are moved.
        dtype: Of their images and tags.
    """

    def __init__(self, batches: Iterator[Loaded], device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.batches, self.device, self.dtype = batches, device, dtype
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        loaded = next(self.batches)
        if self._stream is None:
            return loaded.to(self.device, self.dtype)
        with torch.cuda.stream(self._stream):
            batch = loaded.to(self.device, self.dtype)
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_stream(self._stream)
        for tensor in (batch.images_B3HW, batch.tags_BF, batch.masks_BHW, batch.teachers_BHW):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(consumer)  # its memory is not given away before the consumer is through
        return batch

    def close(self) -> None:
        """Stop the loader."""
        close = getattr(self.batches, "close", None)
        if close is not None:
            close()
