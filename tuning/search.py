"""A search that was checked as a whole, and the sessions of its drivers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import optuna

from tuning.options import Objective
from tuning.space import SearchSpace
from ugrl.config import Config
from ugrl.storage import Place

# Attributes of a study that describe a driver's session begin so; their values are rewritten as a heartbeat.
SESSION = "session:"


@dataclass(frozen=True)
class Search:
    """A search.

    Attributes:
        space: What is searched, and how.
        base: The configuration that all trials share.
        shards: Prepared folder.
        objectives: What is optimised, by its real names: no ``auto``.
        out: The search's folder.
    """

    space: SearchSpace
    base: Config
    shards: Place
    objectives: tuple[Objective, ...]
    out: Path

    @property
    def objective(self) -> str:
        """The name of the first objective, which ranks."""
        return self.objectives[0].name

    @property
    def steps(self) -> int:
        """Of a whole run."""
        return self.base.train.steps


@dataclass(frozen=True)
class Session:
    """One driver's time with a study.

    Attributes:
        id: Of the driver.
        host: Where it ran.
        pid: Its process.
        slots: Trials side by side.
        started: Seconds since the epoch.
        seen: When it was last heard of.
        ended: Whether it said goodbye.
    """

    id: str
    host: str = ""
    pid: int = 0
    slots: int = 1
    started: float = 0.0
    seen: float = 0.0
    ended: bool = False

    @property
    def seconds(self) -> float:
        """Its length so far."""
        return max(0.0, self.seen - self.started)


def read_sessions(study: optuna.Study) -> tuple[Session, ...]:
    """The sessions of a study's drivers, by time."""
    found = [
        Session(**{k: v for k, v in attrs.items() if k in Session.__dataclass_fields__})
        for key, attrs in study.user_attrs.items()
        if key.startswith(SESSION)
    ]
    return tuple(sorted(found, key=lambda s: s.started))
