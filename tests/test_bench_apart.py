"""Sides of a comparison in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.apart import Remote
from bench.measure import Context, compare


def squares(n: int) -> Callable[[], float]:
    """Made in another process."""
    if n < 0:
        raise ValueError(f"no {n} squares")
    x = torch.arange(float(n))
    return lambda: float((x * x).sum())


def test_a_remote_side_measures_itself(tmp_path: Path) -> None:
    ctx = Context(quick=True, device=torch.device("cpu"), threads=1, tmp=tmp_path, log=lambda text: None)
    with Remote(squares, 100, threads=1) as a, Remote(squares, 400, threads=1) as b:
        assert a() == 328350.0
        assert a.seconds(3) > 0
        assert a.peak()[0] == 404 and b.peak()[0] == 1604  # the squares and their sum
        seen: list[object] = []
        made = compare("x/remote", a, b, ctx=ctx, rounds=2, check=lambda *r: seen.extend(r))
    assert seen[0] == 328350.0 and made.memory_ratio == pytest.approx(1604 / 404)
    assert made.rounds == 2 and made.ours > 0


def test_a_remote_side_that_fails_says_why() -> None:
    with Remote(squares, -1, threads=1) as side, pytest.raises(RuntimeError, match="no -1 squares"):
        side()
    with Remote(squares, 4, threads=1) as side:
        side()
        side.process.kill()
        with pytest.raises(RuntimeError, match="exit code -9"):
            side()
