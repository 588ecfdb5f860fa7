"""What a search has spent, and what it may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import TrialState

from tuning.space.options import Budget
from tuning.study.record import HELD, Session, read_sessions


@dataclass(frozen=True)
class Spent:
    """Costs so far.

    Attributes:
        trials: Trials that were begun.
        hours: Of the clock, while at least one driver was there.
        gpu_hours: Hours of GPUs that trials held.
        cpu_hours: Hours of CPUs that trials held.
    """

    trials: int = 0
    hours: float = 0.0
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0

    def over(self, budget: Budget) -> str | None:
        """Which limit is reached, in words.

        >>> Spent(hours=2.0).over(Budget(hours=1.5))
        'budget.hours is spent: 2.00 of 1.5'
        """
        for name in ("hours", "gpu_hours", "cpu_hours"):
            limit, so_far = getattr(budget, name), getattr(self, name)
            if limit and so_far >= limit:
                return f"budget.{name} is spent: {so_far:.2f} of {limit:g}"
        return None


def spent(study: optuna.Study) -> Spent:
    """What a study has cost, by its storage."""
    trials = study.get_trials(deepcopy=False)
    held = [t.user_attrs.get(HELD, {}) for t in trials]
    return Spent(
        trials=sum(t.state != TrialState.WAITING for t in trials),
        hours=covered(read_sessions(study)) / 3600,
        gpu_hours=sum(h.get("seconds", 0.0) * h.get("gpus", 0.0) for h in held) / 3600,
        cpu_hours=sum(h.get("seconds", 0.0) * h.get("cpus", 0.0) for h in held) / 3600,
    )


def covered(sessions: Sequence[Session]) -> float:
    """Seconds during which at least one of the sessions was there.

    >>> covered([Session("a", started=0, seen=10), Session("b", started=5, seen=12), Session("c", started=20, seen=21)])
    13.0
    """
    total, until = 0.0, float("-inf")
    for session in sorted(sessions, key=lambda s: s.started):
        total += max(0.0, session.seen - max(session.started, until))
        until = max(until, session.seen)
    return total
