"""How much memory a computation takes: the bytes of the tensors that live at a time."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators return while they live; ``peak``, ``largest`` and ``now`` in bytes.

    Sees forward and backward alike, custom autograd functions included: the engine runs a CPU graph's backward pass
    in the calling thread. A storage that an operator was given is not counted when the operator returns it, so inputs
    and views of them are free. Composite operators are taken apart, also under inference mode, where they would
    otherwise arrive whole. Blind to what is not an operator's result: a workspace that a kernel allocates and frees
    inside (a convolution's patches, packed GEMM operands), NumPy, other threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and book its results."""
        kwargs = kwargs or {}
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._book(x.untyped_storage(), given)
        return out

    def _book(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self.live or key in given:
            return
        size = storage.nbytes()
        self.live[key] = size
        self.now += size
        self.largest = max(self.largest, size)
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)
