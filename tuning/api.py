"""A search from Python: what ``ugrl-tune`` does, and what it has found. :func:`ugrl.tune` calls it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuning.cli import build_parser, run
from ugrl.command import folder_for
from ugrl.errors import ConfigError
from ugrl.terminal import Terminal
from ugrl.text import nearest


@dataclass(frozen=True)
class Search:
    """A search that has ended.

    Attributes:
        path: Its folder.
        objective: Metric that it was judged by, the first one where there are several.
        values: Key of the configuration → value of the best trial; empty where no trial has ended.
        value: The best trial's objective on the split of the search, over the fresh seeds where it was run again; NaN
            where no trial has ended.
        final: The same on the untouched split; NaN where it was not measured.
        trials: Trials that have ended with a value.
    """

    path: Path
    objective: str
    values: dict[str, Any]
    value: float
    final: float
    trials: int

    @property
    def report(self) -> Path:
        """The page about it."""
        return self.path / "report.html"

    @property
    def best(self) -> Path:
        """The best trial's configuration, for :func:`ugrl.train`."""
        return self.path / "best.yaml"


def tune(
    space: str | Path = "shapes",
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    quiet: bool = False,
    **options: Any,
) -> Search:
    """Run a search to its end, see :func:`ugrl.tune`.

    Args:
        space: Name of a shipped search space, or a YAML file.
        overrides: Changes of its base configuration by their path.
        out: Folder of the search; ``runs/tune-<name of the space>`` by default.
        quiet: No progress and no tables.
        options: Of the command, by their names: ``data``, ``config``, ``trials``, ``workers``, ``concurrent``,
            ``storage``, ``warm_start``, ``warm_best``, ``resume``, ``address``, ``wait``, ``dashboard``.

    Raises:
        ConfigError: An option is unknown; as the command.
        KeyboardInterrupt: It was interrupted; ``resume=True`` runs what is left.
        UgrlError: As the command says it.
    """
    args = build_parser().parse_intermixed_args([])
    known = sorted(set(vars(args)) - {"space", "overrides", "out", "quiet", "dry_run", "step_s"})
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"tune has no option '{name}'{nearest(name, known)}")
        setattr(args, name, str(value) if isinstance(value, Path) else value)
    args.space, args.quiet = str(space), quiet
    args.out = folder_for(out or Path("runs") / f"tune-{Path(space).name.removesuffix('.yaml')}", "out").absolute()
    args.overrides = [f"{path}={json.dumps(value)}" for path, value in (overrides or {}).items()]
    status = run(args, Terminal(stderr=True, quiet=quiet))
    if status:
        raise KeyboardInterrupt
    return found_in(args.out, args.storage)


def found_in(out: Path, storage: str | None = None) -> Search:
    """What the search in a folder has found.

    Raises:
        ConfigError: The folder holds none.
    """
    from tuning.ledger.finals import open_finals
    from tuning.report.findings import contender
    from tuning.report.read import read_findings
    from tuning.study.search_folder import stored_search
    from tuning.study.store import quiet_optuna

    quiet_optuna()
    search, study = stored_search(out, storage)
    findings = read_findings(search, study, open_finals(search, study, create=False))
    ended = sum(row.value is not None and row.state == "COMPLETE" for row in findings.rows)
    best = contender(findings)
    if best is None:
        return Search(out, search.objective, {}, math.nan, math.nan, ended)
    row, tuned, final = best
    return Search(out, search.objective, dict(row.params), tuned.mean, final.mean, ended)
