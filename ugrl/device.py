"""Which device a name stands for."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from ugrl.errors import ConfigError
from ugrl.text import brief

if TYPE_CHECKING:
    import torch


def resolve(name: str | None = None) -> torch.device:
    """The device of a name, known to be there; without a name a GPU where there is one.

    >>> resolve("cpu").type
    'cpu'
    >>> resolve("gpu")
    Traceback (most recent call last):
    ugrl.errors.ConfigError: --device 'gpu' is unknown; expected cpu, cuda, or cuda:N for the N-th GPU
    """
    import torch

    if name is None:
        # Ray and torchrun say which of the GPUs is this process's own.
        own = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", own) if torch.cuda.is_available() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps" and torch.backends.mps.is_available():
        return torch.device("mps")
    if not re.fullmatch(r"cuda(:\d{1,3})?", name):
        raise ConfigError(f"--device {brief(name)} is unknown; expected cpu, cuda, or cuda:N for the N-th GPU")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        why = "" if torch.backends.cuda.is_built() else " (this PyTorch is built without CUDA)"
        raise ConfigError(f"--device {name}: no GPU was found here{why}; expected cpu")
    if int(name.partition(":")[2] or 0) >= count:
        last = f" … cuda:{count - 1}" if count > 1 else ""
        raise ConfigError(f"--device {name}: is not there; expected cpu or cuda:0{last}")
    return torch.device(name)
