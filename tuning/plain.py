"""Values as a person reads them."""

from __future__ import annotations

from typing import Any

from tuning.record import percent
from ugrl.text import line

# Characters of a value in a table.
LONGEST = 48


def score_text(name: str, value: float) -> str:
    """A metric in percent, a cost as it is.

    >>> score_text("seg_miou", 0.25), score_text("step_s", 0.12345)
    ('25.0 %', '0.123')
    """
    return f"{100 * value:.1f} %" if percent(name) else f"{value:.3g}"


def short(value: Any) -> str:
    """A value in a few characters, the middle of a long text left out; empty where it is missing.

    >>> short(0.123456), short(256), short(None)
    ('0.123', '256', '')
    """
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else line(value, LONGEST)


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    >>> clock(3725)
    '1:02:05'
    """
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
