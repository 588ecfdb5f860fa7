"""How long ``make real`` says that the rest takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import real
from ugrl import config as configs


class _Seen(real.Arm):
    """An arm whose state is set here."""

    def steps(self) -> int:
        return STATE[self.name][0]

    def images(self) -> int:
        return STATE[self.name][1]


STATE: dict[str, tuple[int, int]] = {}


def test_what_is_left_is_told_by_what_was_seen(tmp_path: Path) -> None:
    cfg = configs.build({"train": {"steps": 100, "global_batch": 10, "cls_warmup_iters": 0, "lr_warmup_iters": 0}})
    arms = [_Seen(s, 0, cfg, tmp_path) for s in ("IV", "Base")]
    forecast = real.Forecast(arms, 50, 2)
    STATE.update({"IV-0": (0, 0), "Base-0": (0, 0)})
    assert forecast.left([(a, *forecast.see(a, 0.0)) for a in arms]) is None
    STATE.update({"IV-0": (10, 0), "Base-0": (20, 0)})
    seen = [(a, *forecast.see(a, 40.0)) for a in arms]
    # IV: 90 steps of 4 s; an image is taken as a tenth of a step until one is measured.
    assert forecast.left(seen) == pytest.approx(90 * 4.0 + 50 * 0.4)
    STATE["Base-0"] = (100, 0)
    forecast.see(arms[1], 200.0)
    STATE["Base-0"] = (100, 10)
    seen = [(a, *forecast.see(a, 220.0)) for a in arms]
    assert forecast.each("image") == pytest.approx(2.0)  # of measuring alone: not of the 200 s before
    assert forecast.left(seen) == pytest.approx(90 * forecast.each("step", "IV") + 50 * 2.0)
    # Killed behind its checkpoint, it begins again before where its log had come to.
    STATE.update({"IV-0": (90, 0), "Base-0": (100, 50)})
    again = real.Forecast(arms[:1], 50, 1)
    again.see(arms[0], 0.0)
    for now, steps in ((10.0, 50), (50.0, 60), (90.0, 70)):
        STATE["IV-0"] = (steps, 0)
        again.see(arms[0], now)
    assert again.each("step") == pytest.approx(4.0)
