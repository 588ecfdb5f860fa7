"""Where the numbers are too delicate for mixed precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of ``x``; the meta device, where operations are only counted, knows none."""
    return nullcontext() if x.is_meta else torch.autocast(device_type=x.device.type, enabled=False)
