"""A search that was checked as a whole: what is searched, on which data, and where it is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tuning.space.options import Objective
from tuning.space.space import SearchSpace
from ugrl.config import Config
from ugrl.storage import Place


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

    def folder(self, number: int) -> Path:
        """Where the runs of a trial are written, one folder a seed."""
        return self.out / "trials" / f"{number:03d}"
