"""Random states that are functions of names, never of history.

A sample's crop depends on (seed, epoch, id), its drop-path on (seed, step, id): no loader, number
of workers, rank or resume can change them.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def derive(*keys: int | str) -> int:
    """A 63-bit integer from any keys, the same on every machine.

    >>> derive(0, "a") == derive(0, "a"), derive(0, "a") == derive(0, "b")
    (True, False)
    """
    digest = hashlib.blake2b("\x1f".join(map(str, keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*keys: int | str) -> np.random.Generator:
    """A NumPy generator whose stream is a function of ``keys`` alone."""
    return np.random.Generator(np.random.Philox(derive(*keys)))


def hash_uniform(keys_B: Tensor, n: int) -> Tensor:
    """Uniform numbers in [0, 1) by counter, one row per key, computed on the keys' device.

    Args:
        keys_B: int64 keys (B,), e.g. ``derive(seed, step, id)``.
        n: Numbers per key.

    Returns:
        float64 (B, n). The same key gives the same row whatever the batch around it.
    """
    import torch  # here: processes that only read rows need none

    x = keys_B[:, None] + torch.arange(1, n + 1, device=keys_B.device) * -7046029254386353131
    # splitmix64's finaliser; >> is arithmetic on int64, so the sign bits are masked away.
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return ((x >> 11) & 0x1FFFFFFFFFFFFF).double() / float(1 << 53)
