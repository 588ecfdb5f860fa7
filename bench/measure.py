"""How two ways of computing the same thing are compared: interleaved rounds, ratios by round, peak memory.

Both sides run in one process, one after the other in every round, and who goes first alternates; the ratio is the
median of the rounds' own ratios, so that a machine that slows down for a while slows both sides.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from bench.apart import Remote
from bench.memory import LiveBytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One comparison.

    ``ours`` and ``baseline`` are in ``unit`` (medians over the rounds); ``ratio`` says how many times better ours is
    (a time: baseline / ours, a rate: ours / baseline), ``spread`` is the lowest and the highest ratio of a round.
    ``memory_ratio`` is the baseline's peak over ours. ``holds`` is None without a gate. ``limit`` is an upper bound of
    ``ours`` itself, for gates in absolute units.
    """

    name: str
    unit: str
    ours: float
    baseline: float
    ratio: float
    spread: tuple[float, float]
    memory_ratio: float | None
    gate: float | None
    memory_gate: float | None
    holds: bool | None
    note: str = ""
    rounds: int = 1
    limit: float | None = None
    ours_bytes: int | None = None
    baseline_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Growth:
    """How one thing grows: ``points`` are (x, seconds, peak bytes or None); exponents of a log-log fit."""

    name: str
    x: str
    points: list[tuple[float, float, int | None]]
    time_exponent: float | None
    memory_exponent: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """What this machine cannot run, and why."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Context:
    """What every module is given.

    ``tmp`` is a scratch folder that is removed afterwards; ``only`` are the entries asked for, by the beginnings of
    their names (none: all); ``until`` is when the module should be through, by ``time.perf_counter``.
    """

    quick: bool
    device: torch.device
    threads: int
    tmp: Path
    log: Callable[[str], None]
    only: tuple[str, ...] = ()
    until: float = math.inf

    @property
    def budget(self) -> float:
        """Seconds that the rounds of one entry may take."""
        return 8.0 if self.quick else 90.0

    @property
    def left(self) -> float:
        """Seconds that the module still has; at least 0."""
        return max(0.0, self.until - time.perf_counter())

    def wants(self, name: str) -> bool:
        """Whether an entry of this name was asked for."""
        return not self.only or any(matches(name, word) for word in self.only)


def matches(name: str, word: str) -> bool:
    """Whether a word of ``--only`` asks for an entry: its module, or a beginning of its name.

    >>> matches("step/512-base", "step"), matches("step/512-base", "step/512"), matches("stepping/1", "step")
    (True, True, False)
    """
    return name.startswith(word) if "/" in word else name.split("/")[0] == word


class Skip(Exception):  # noqa: N818
    """Raised by an entry that this machine cannot run; its text is the reason."""


class Different(Exception):  # noqa: N818
    """The two sides of a comparison do not compute the same."""


# --- clocks -----------------------------------------------------------------------------------------------------


def clock(ctx: Context) -> Callable[[], float]:
    """Process time on the CPU with one thread (other processes disturb it less), else wall time."""
    return time.process_time if ctx.device.type == "cpu" and ctx.threads == 1 else time.perf_counter


def seconds(step: Callable[[], object], ctx: Context, repeats: int = 1) -> float:
    """Some calls by ``clock``; on CUDA from an idle device to an idle device."""
    if isinstance(step, Remote):
        return step.seconds(repeats)
    cuda, now = ctx.device.type == "cuda", clock(ctx)
    if cuda:
        torch.cuda.synchronize(ctx.device)
    start = now()
    for _ in range(repeats):
        step()
    if cuda:
        torch.cuda.synchronize(ctx.device)
    return now() - start


# --- memory -----------------------------------------------------------------------------------------------------


def peak_bytes(step: Callable[[], object], ctx: Context) -> tuple[int, object]:
    """Peak of what lives beyond what lived before, and what the call returned."""
    if isinstance(step, Remote):
        return step.peak()
    gc.collect()
    if ctx.device.type == "cuda":
        torch.cuda.synchronize(ctx.device)
        torch.cuda.reset_peak_memory_stats(ctx.device)
        before = torch.cuda.memory_allocated(ctx.device)
        out = step()
        torch.cuda.synchronize(ctx.device)
        return torch.cuda.max_memory_allocated(ctx.device) - before, out
    with LiveBytes() as book:
        out = step()
    return book.peak, out


# --- comparisons ------------------------------------------------------------------------------------------------


def holds(ratio: float, gate: float | None, memory_ratio: float | None, memory_gate: float | None) -> bool | None:
    """Whether every gate that is set is met; None where none is set."""
    if gate is None and memory_gate is None:
        return None
    return (gate is None or ratio >= gate) and (
        memory_gate is None or (memory_ratio is not None and memory_ratio >= memory_gate)
    )


def entry(
    name: str,
    ours: Sequence[float],
    baseline: Sequence[float],
    *,
    unit: str = "s",
    gate: float | None = None,
    limit: float | None = None,
    ours_bytes: int | None = None,
    baseline_bytes: int | None = None,
    memory_gate: float | None = None,
    note: str = "",
) -> Entry:
    """The entry of measurements that were taken in pairs: ``ours[k]`` and ``baseline[k]`` belong to round k.

    A ``unit`` that ends in "/s" is a rate, where more is better; every other one is a time or a size, where less is.
    """
    rate = unit.endswith("/s")
    ratios = [a / b if rate else b / a for a, b in zip(ours, baseline, strict=True)]
    ratio, mine = statistics.median(ratios), statistics.median(ours)
    memory_ratio = baseline_bytes / ours_bytes if ours_bytes and baseline_bytes else None
    held = holds(ratio, gate, memory_ratio, memory_gate)
    if limit is not None:
        held = held is not False and (mine >= limit if rate else mine <= limit)
    return Entry(
        name=name,
        unit=unit,
        ours=mine,
        baseline=statistics.median(baseline),
        ratio=ratio,
        spread=(min(ratios), max(ratios)),
        memory_ratio=memory_ratio,
        gate=gate,
        memory_gate=memory_gate,
        holds=held,
        note=note,
        rounds=len(ratios),
        limit=limit,
        ours_bytes=ours_bytes,
        baseline_bytes=baseline_bytes,
    )


def another(one: float, done: int, budget: float) -> bool:
    """Whether a further round of ``one`` seconds, after ``done``, still lies within the budget.

    >>> another(2.0, 3, 8.0), another(2.0, 4, 8.0)
    (True, False)
    """
    return (done + 1) * one <= budget


def compare(
    name: str,
    ours: Callable[[], object],
    baseline: Callable[[], object],
    *,
    ctx: Context,
    rounds: int | None = None,
    gate: float | None = None,
    memory: bool = True,
    memory_gate: float | None = None,
    note: str = "",
    per: float = 1.0,
    unit: str = "s",
    limit: float | None = None,
    budget: float | None = None,
    check: Callable[[Any, Any], object] | None = None,
) -> Entry:
    """Measures both sides and returns the entry.

    A warm-up call of each side comes first, then peak memory by a call of its own (whose results go to ``check``,
    which raises where they differ), then ``rounds`` rounds of both sides (7, with ``--quick`` 5), each of several
    calls where a call is short. Rounds become fewer where they would take more than ``budget`` seconds, never fewer
    than 2, with ``--quick`` than 1. A side whose warm-up is long is not called again for its memory: the warm-up
    serves.

    Args:
        name: "module/what".
        ours: One call of our side; a :class:`bench.apart.Remote` measures itself.
        baseline: One call of the other side.
        ctx: Device, threads, whether quick.
        rounds: Instead of the default number of rounds.
        gate: The ratio to reach.
        memory: Whether to measure peak memory.
        memory_gate: The memory ratio to reach.
        note: One line: what exactly is compared.
        per: Times are divided by it (images, steps); in a rate, a call makes so many items.
        unit: "s", or a rate such as "crops/s": then values are ``per`` / seconds.
        limit: A bound on our own value.
        budget: Seconds for the rounds instead of ``ctx.budget``.
        check: Called with what one call of ours and one of the baseline returned.
    """
    budget = min(ctx.budget if budget is None else budget, ctx.left)
    sides = {"ours": ours, "baseline": baseline}
    results: dict[str, object] = {}
    cost: dict[str, float] = {}
    peaks: dict[str, int | None] = dict.fromkeys(sides)
    for side, step in sides.items():
        ctx.log(f"{name}: warm-up of {'our side' if side == 'ours' else 'the baseline'}")
        start = time.perf_counter()
        if memory:
            peaks[side], results[side] = peak_bytes(step, ctx)
        else:
            results[side] = step()
        if time.perf_counter() - start < min(5.0, budget / 4):  # again: now caches are filled
            if memory:
                peaks[side], results[side] = peak_bytes(step, ctx)
            start = time.perf_counter()
            seconds(step, ctx)
        cost[side] = time.perf_counter() - start
    if check is not None:
        check(results["ours"], results["baseline"])
    results.clear()
    budget = min(budget, ctx.left)
    wanted, least = rounds or (5 if ctx.quick else 7), 1 if ctx.quick else 2
    repeats = {side: max(1, min(50, int(0.05 / max(one, 1e-9)))) for side, one in cost.items()}
    taken: dict[str, list[float]] = {side: [] for side in sides}
    start = time.perf_counter()
    for k in range(wanted):
        if k >= least and not another((time.perf_counter() - start) / k, k, budget):
            break
        ctx.log(f"{name}: round {k + 1} of {wanted}")
        for side in ("ours", "baseline") if k % 2 == 0 else ("baseline", "ours"):
            spent = seconds(sides[side], ctx, repeats[side]) / repeats[side]
            taken[side].append(per / spent if unit.endswith("/s") else spent / per)
    return entry(
        name,
        taken["ours"],
        taken["baseline"],
        unit=unit,
        gate=gate,
        limit=limit,
        ours_bytes=peaks["ours"],
        baseline_bytes=peaks["baseline"],
        memory_gate=memory_gate,
        note=note,
    )


def same(name: str, ours: object, baseline: object, tolerance: float) -> float:
    """Largest difference of two tensors, or lists of them, relative to the baseline's largest value.

    Raises:
        Different: It is above ``tolerance``, or the shapes differ.
    """
    worst = 0.0
    pairs = zip(tree_leaves(ours), tree_leaves(baseline), strict=True)
    for a, b in pairs:
        if a.shape != b.shape:
            raise Different(f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
        a, b = a.detach().double(), b.detach().double()
        far = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) if a.numel() else 0.0
        if not far <= tolerance:
            raise Different(f"{name}: the sides differ by {far:.2e} of the largest value, allowed {tolerance:.0e}")
        worst = max(worst, far)
    return worst


def growth(
    name: str,
    x: str,
    sizes: Sequence[float],
    make: Callable[[Any], Callable[[], object]],
    *,
    ctx: Context,
    memory: bool = True,
    repeats: int = 3,
    budget: float | None = None,
    per: Callable[[Any], float] = lambda _: 1.0,
    note: str = "",
) -> Growth:
    """Time and peak memory of ``make(size)()`` over ``sizes``, with fitted exponents.

    A size whose time, by the growth so far, would not fit into what is left of ``budget`` ends the series.
    """
    budget = min(ctx.budget if budget is None else budget, ctx.left)
    points: list[tuple[float, float, int | None]] = []
    start = time.perf_counter()
    last = 0.0
    for k, size in enumerate(sizes):
        left = budget - (time.perf_counter() - start)
        if k >= 2 and 2.5 * last > left:
            note = f"{note}; ended before {x} = {size:g} for time" if note else f"ended before {x} = {size:g} for time"
            break
        ctx.log(f"{name}: {x} = {size:g}")
        began = time.perf_counter()
        step = make(size)
        step()
        peak = peak_bytes(step, ctx)[0] if memory else None
        one = seconds(step, ctx)
        times = [one]
        calls = max(1, min(50, int(0.05 / max(one, 1e-9))))
        for _ in range(repeats - 1):
            if time.perf_counter() - start > budget:
                break
            times.append(seconds(lambda: [step() for _ in range(calls)] and None, ctx) / calls)  # noqa: B023
        points.append((float(size), statistics.median(times) / per(size), peak))
        last = time.perf_counter() - began
    return Growth(
        name=name,
        x=x,
        points=points,
        time_exponent=exponent([(p[0], p[1]) for p in points]),
        memory_exponent=exponent([(p[0], p[2]) for p in points if p[2]]),
        note=note,
    )


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Slope of the least-squares line through the logarithms; None below two different x.

    >>> round(exponent([(1, 3), (2, 12), (4, 48)]), 6)
    2.0
    """
    if len({x for x, _ in points}) < 2 or any(y <= 0 for _, y in points):
        return None
    logs = torch.tensor(points, dtype=torch.float64).log()
    x, y = (logs - logs.mean(0)).T
    return float((x @ y) / (x @ x))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """``count`` threads inside an operator, and what it was before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
