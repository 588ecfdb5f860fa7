"""Values as a person reads them."""

from __future__ import annotations

from typing import Any

from tuning.study.record import percent
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


def few(value: float) -> str:
    """A number in two or three digits, as a person writes it.

    >>> few(0.0471), few(12.34), few(3779.8), few(14527)
    ('0.047', '12', '3,800', '15,000')
    """
    digits = len(str(int(abs(value))))
    return f"{round(value, 2 - digits):,.0f}" if digits > 1 else f"{value:.2g}"


def hours(seconds: float) -> str:
    """Hours in few digits.

    >>> hours(360), hours(3600 * 12345.6)
    ('0.1', '12,000')
    """
    return few(seconds / 3600)


def span(seconds: float) -> str:
    """A time as a person says it.

    >>> [span(s) for s in (0.5, 42, 600, 9000, 86400 * 3.2, 86400 * 5000)]
    ['1 s', '42 s', '10 min', '2.5 h', '3.2 days', 'months']
    """
    for size, limit, name in ((1, 99, "s"), (60, 99, "min"), (3600, 47, "h"), (86400, 60, "days")):
        if (value := seconds / size) <= limit:
            return f"{max(1, round(value))} {name}" if size < 3600 else f"{value:.1f} {name}"
    return "months"


def plural(count: int, word: str) -> str:
    """A number of things.

    >>> plural(1, "trial"), plural(2, "trial")
    ('1 trial', '2 trials')
    """
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
