"""Contrastive loss, forward and backward: the N×N matrix against tiles, in one run.

    python -m bench.contrast --anchors 2048 5734 --dim 512 --threads 1 --device cpu

One image of N anchors in ``--classes`` classes. Time is the best of ``--repeats`` alternating runs after a
warm-up: process time on the CPU (the sum over threads), wall time on CUDA.
Memory is the peak of live tensor bytes that the call adds to its inputs: on the CPU every storage
an operator returns is counted until it is freed; on CUDA it is the allocator's own peak.
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ugrl.method.contrast import contrastive_loss


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators return while they live; ``peak`` and ``largest`` in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run the operator and book its results."""
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._book(x.untyped_storage(), known)
        return out

    def _book(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in self.live or key in known:
            return
        size = storage.nbytes()
        self.live[key] = size
        self.now += size
        self.largest = max(self.largest, size)
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def naive(emb: Tensor, labels: Tensor, pool: Tensor, tau: float) -> Tensor:
    """The loss of one image as one would write it: the whole matrix and masks."""
    chosen = pool[0].flatten()
    x, c = emb[0].flatten(1).T[chosen], labels[0].flatten()[chosen]
    s = x @ x.T / tau
    other = ~torch.eye(len(c), dtype=torch.bool, device=c.device)
    pos = (c[:, None] == c[None]) & other
    everything = s.masked_fill(~other, float("-inf")).logsumexp(1)
    return (everything - s.masked_fill(~pos, float("-inf")).logsumexp(1)).mean()


def seconds(step: Callable[[], Tensor], device: str) -> float:
    """Wall time on CUDA, process time on the CPU, which other processes disturb less."""
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak_bytes(step: Callable[[], Tensor], device: str) -> int:
    """Peak of what lives beyond what lived before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as book:
        step()
    return book.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", type=int, nargs="+", default=[2048, 5734])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--tau", type=float, default=0.1)
    parser.add_argument("--tile", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(
        f"dim {args.dim}, {args.classes} classes, tau {args.tau}, tile {args.tile or 'default'}, {args.device}, float32"
    )
    names = ("N", "naive s", "tiled s", "time", "naive MB", "tiled MB", "memory", "grad diff")
    print(" ".join(f"{name:>9}" for name in names))
    for n in args.anchors:
        emb = F.normalize(torch.randn(1, args.dim, 1, n, device=args.device), dim=1).requires_grad_()
        labels = torch.randint(0, args.classes, (1, 1, n), device=args.device)
        pool = torch.ones_like(labels, dtype=torch.bool)

        def plain(emb: Tensor = emb, labels: Tensor = labels, pool: Tensor = pool) -> Tensor:
            return torch.autograd.grad(naive(emb, labels, pool, args.tau), emb)[0]

        def tiled(emb: Tensor = emb, labels: Tensor = labels, pool: Tensor = pool) -> Tensor:
            loss = contrastive_loss(emb, labels, pool, tau=args.tau, tile=args.tile)
            return torch.autograd.grad(loss, emb)[0]

        g0, g1 = plain(), tiled()  # warm-up
        diff = ((g0 - g1).abs().max() / g0.abs().max()).item()
        del g0, g1
        runs = [(seconds(plain, args.device), seconds(tiled, args.device)) for _ in range(args.repeats)]
        t0, t1 = (min(column) for column in zip(*runs, strict=True))
        m0, m1 = peak_bytes(plain, args.device), peak_bytes(tiled, args.device)
        times, memory = f"{t0:9.4f} {t1:9.4f} {t0 / t1:8.2f}x", f"{m0 / 1e6:9.1f} {m1 / 1e6:9.1f} {m0 / m1:8.1f}x"
        print(f"{n:9} {times} {memory} {diff:9.1e}")


if __name__ == "__main__":
    main()
