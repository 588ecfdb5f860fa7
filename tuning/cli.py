"""``ugrl-tune``: a hyperparameter search, and its report."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ugrl.hear
from ugrl import config as configs
from ugrl.command import Parser, enter, folder_for, pasted, shipped
from ugrl.errors import ConfigError

if TYPE_CHECKING:
    import optuna
    from rich.console import Console

    from cluster.capacity import Capacity
    from tuning.space.search import Search
    from tuning.space.space import SearchSpace

# Values of a search that ask more of the data than others.
DEMANDING = {("method.setting", "Full"), ("method.pseudo.source", "teacher"), ("method.pseudo.source", "agree")}

SUMMARY = """\
examples:
  ugrl-tune --space shapes                              the demo: generated images, minutes on two cores
  ugrl-tune --space voc --data DIR --out runs/voc       prepared shards with a split to tune on
  ugrl-tune --space voc --dry-run                       what it would try and cost; needs no data
  ugrl-tune --space shapes --out runs/a --resume        run the rest of a search; also beside its other drivers
  ugrl-tune --space shapes --trials 4 train.steps=300   other budget, other base configuration
  ugrl-tune --space coco --data DIR --warm-start runs/voc    begin with what was best elsewhere
  ugrl-tune --space shapes --dashboard                  with a live page on this machine (pip install 'ugrl[dashboard]')
  ugrl-tune --space table3 --config shapes              a table of the paper on other data
  ugrl-tune report runs/voc                             table, plots, report.html, report.md, best.yaml, at any time
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``ugrl-tune``."""
    parser = Parser(
        prog="ugrl-tune",
        description="Search hyperparameters. Shipped spaces: " + ", ".join(shipped("tuning")) + ".",
        epilog=SUMMARY,
    )
    parser.add_argument("--space", metavar="NAME|FILE", help="a shipped search space or a YAML file (default: shapes)")
    parser.add_argument("--config", metavar="NAME|FILE", help="another base configuration than the space names")
    parser.add_argument("--data", metavar="DIR|URI", help="prepared shards; shapes are generated without it")
    parser.add_argument(
        "--out", type=folder_for, metavar="DIR", help="names the search (default: runs/tune-<name of the space>)"
    )
    parser.add_argument("--trials", type=int, metavar="N", help="trials that are to end")
    parser.add_argument("--workers", type=int, metavar="N", help="training workers of one trial")
    parser.add_argument("--concurrent", type=int, metavar="N", help="trials side by side; 0 for as many as fit")
    parser.add_argument("--storage", metavar="URL", help="database of the study (default: a journal file in --out)")
    parser.add_argument("--warm-start", metavar="DIR", help="begin with the best points of another search")
    parser.add_argument("--warm-best", type=int, metavar="N", default=5, help="how many of them (default: 5)")
    parser.add_argument("--resume", action="store_true", help="run what is left of the search in --out")
    parser.add_argument("--dry-run", action="store_true", help="say what would be tried and what it would cost")
    parser.add_argument("--step-s", type=float, metavar="S", help="seconds of a training step, for --dry-run")
    parser.add_argument("--address", metavar="ADDR", help="of a running Ray cluster (default: start Ray here)")
    parser.add_argument("--wait", action="store_true", help="wait for room on it as long as it takes")
    parser.add_argument("--dashboard", action="store_true", help="serve optuna-dashboard here while the search runs")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the base configuration")
    return parser


def build_report_parser() -> argparse.ArgumentParser:
    """The parser of ``ugrl-tune report``."""
    parser = Parser(
        prog="ugrl-tune report",
        description="Write the report of a search, running or not, from its storage.",
        epilog="example:\n  ugrl-tune report runs/voc      report.html, report.md, plots, best.yaml in runs/voc\n",
    )
    parser.add_argument("study", type=Path, metavar="DIR", help="the search's folder")
    parser.add_argument("--storage", metavar="URL", help="the study's database, where its URL has a password")
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    return parser


# -- plans -----------------------------------------------------------------------------------------


def read_space(args: argparse.Namespace, known: Path | None = None) -> SearchSpace:
    """The space that the command line asks for; with ``known`` that of a search which is resumed without one."""
    from tuning.space.space_file import load_space

    name = args.space or (known if known is not None else "shapes")
    return load_space(
        name,
        overrides=configs.parse_overrides(args.overrides),
        trials=args.trials,
        workers=args.workers,
        concurrent=args.concurrent,
        storage=args.storage,
        config=args.config,
    )


def plan_search(args: argparse.Namespace, console: Console) -> Search:
    """Check everything that can be checked without Ray; creates nothing but generated shards.

    Raises:
        UgrlError: The space, the name of the run, the shards or the objective cannot be used.
    """
    from tuning.space.search import Search
    from tuning.study.search_folder import SPACE, being_written, check_same, exists_already
    from ugrl.train.run import ensure_shards

    out = args.out or Path("runs") / f"tune-{Path(args.space or 'shapes').name.removesuffix('.yaml')}"
    out = folder_for(out.absolute())
    known = out / SPACE
    if out.is_dir() and any(out.iterdir()):
        if not args.resume:
            raise exists_already(out)
        if not known.is_file() and not all(being_written(p) for p in out.iterdir()):
            raise ConfigError(f"{out}: holds no search to resume; expected {SPACE} in it")
    resumed = args.resume and known.is_file()
    space = read_space(args, known if resumed else None)
    base = space.base()
    configs.check_revealed(base, args.space or known)
    if resumed:
        check_same(space, base, out)
    shards = ensure_shards(base, args.data, console=console)
    return check_data(Search(space, base, shards, space.objectives, out), fresh=not resumed)


def check_data(search: Search, *, fresh: bool = True) -> Search:
    """The search with its objectives by their real names; ``fresh`` as :func:`ugrl.train.check.check_run` has it.

    Raises:
        UgrlError: The shards lack a split, or cannot supply an objective.
    """
    from tuning.space.options import COSTS, Objective
    from ugrl.data.shards import Manifest
    from ugrl.train.check import check_run

    space, base = search.space, search.base
    # The values that ask most of the data are checked for all.
    asked = [{axis.path: value} for axis in space.search for value in axis.edges if (axis.path, value) in DEMANDING]
    bases = [configs.build(configs.override(configs.to_dict(base), values)) for values in asked] or [base]
    manifest = Manifest.load(search.shards)
    found = []
    for o in space.objectives:
        name = None if o.name in COSTS else o.name
        for each in bases:
            real = check_run(each, manifest, split=space.split, objective=name, fresh=fresh)
            if space.final.best or space.final.every:  # measured there too, by the same metric
                check_run(each, manifest, split=space.final.split, objective=real)
        found.append(Objective(real) if name else o)
    return replace(search, objectives=tuple(found))


# -- commands --------------------------------------------------------------------------------------


def run(args: argparse.Namespace, console: Console) -> int:
    """Check, search, run the best again, report."""
    if args.dry_run:
        if args.dashboard:
            raise ConfigError("--dashboard shows a search that runs; --dry-run runs none")
        from ugrl.terminal import Terminal

        return run_dry(args, Terminal())
    if args.warm_best < 1:
        raise ConfigError(f"--warm-best is {args.warm_best}; expected at least 1")
    if args.warm_start and args.resume:
        raise ConfigError("--warm-start is for a new search; with --resume its points are there already")
    from cluster.connect import check

    if not args.resume:  # what is resumed may have ended, and then needs no cluster
        check(args.address)
    search = plan_search(args, console)
    from tuning.space.advice import remarks

    for text in () if args.quiet else remarks(search):
        console.print(f"warning: {text}", highlight=False, soft_wrap=True, markup=False)
    if args.warm_start and search.space.sampler.name == "grid":
        raise ConfigError("--warm-start: a grid has all of its own points")
    from tuning.study.search_folder import ended_search, warm_points

    warm = warm_points(search, args.warm_start, args.warm_best) if args.warm_start else []
    from tuning.ledger.finals import nothing_left, open_finals
    from tuning.report.files import write_report
    from tuning.report.read import read_findings
    from tuning.study.store import quiet_optuna

    quiet_optuna()
    study, interrupted, halted = ended_search(search) if args.resume else None, 0, ""
    if study is None or not nothing_left(search, study, open_finals(search, study, create=False)):
        study, interrupted, halted = _run_on_ray(args, search, warm, console, study)
    elif args.dashboard:
        from tuning.dashboard import by_hand

        text = f"dashboard: the search has ended; look at it with: {by_hand(search.space, search.out)}"
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    finals = open_finals(search, study, create=False)
    if not interrupted:  # whoever sends a signal does not wait for pictures
        write_report(read_findings(search, study, finals), console)
    return _ended(args, search, study, finals, interrupted, halted, console)


def _run_on_ray(
    args: argparse.Namespace,
    search: Search,
    warm: list[tuple[str, dict[str, Any]]],
    console: Console,
    known: optuna.Study | None,
) -> tuple[optuna.Study, int, str]:
    """Run what is left of a study, which may be open already.

    Returns:
        The study, the signal that interrupted it (0 for none), and why it stopped early, if it did.
    """
    from cluster.connect import start_ray, stop_ray
    from cluster.stop import run_in_thread
    from tuning.run.placement import concurrent_trials
    from tuning.study.search_folder import begin

    try:
        have = run_in_thread(lambda: start_ray(args.address))
        side_by_side = concurrent_trials(search, have)
        study = begin(search, resume=args.resume, known=known)
        return study, *_run_parts(args, search, study, have, side_by_side, warm, console)
    finally:
        stop_ray()


def _run_parts(
    args: argparse.Namespace,
    search: Search,
    study: optuna.Study,
    have: Capacity,
    slots: int,
    warm: list[tuple[str, dict[str, Any]]],
    console: Console,
) -> tuple[int, str]:
    """The search and its final runs; the signal that interrupted them (0 for none), and why they stopped early."""
    from cluster.watchdog import head_watched
    from tuning.ledger.finals import open_finals
    from tuning.run.driver import run_finals, run_search
    from tuning.run.progress import TrialProgress
    from tuning.study.lease import Lease, once
    from tuning.study.store import retry_storage
    from tuning.study.study import PLANNED, is_spent, plan

    ended = sum(is_spent(t) for t in study.get_trials(deepcopy=False))
    shown = "" if args.quiet else f"{search.out.name}: {search.space.trials} trials ({ended} have ended), {slots} at a "
    names = ", ".join(o.name for o in search.objectives)
    if shown:
        console.print(
            f"{shown}time on {have}, objective {names} on '{search.space.split}'", highlight=False, soft_wrap=True
        )
    with ExitStack() as stack:
        enabled = not args.quiet

        def say(text: str) -> None:
            if enabled:
                console.print(text, highlight=False, soft_wrap=True)

        stack.enter_context(head_watched(search.base.cluster.head_s, say))
        if args.dashboard:
            from tuning.dashboard import Dashboard

            tell = partial(console.print, highlight=False, soft_wrap=True, markup=False)
            stack.enter_context(Dashboard(search.space, search.out, tell))
        patience_s = math.inf if args.wait else search.base.cluster.busy_s
        lease = stack.enter_context(Lease(study, slots=slots))
        stack.enter_context(ugrl.hear.owning(lambda: lease.__exit__(None, None, None)))
        once(
            search.out,
            lambda check: plan(study, search.space, warm, check),
            lambda: study.user_attrs.get(PLANNED) == search.space.trials,
        )
        more: dict[str, Any] = {"say": say, "patience_s": patience_s}
        with TrialProgress(search.objectives, search.steps, console, enabled=enabled, title=search.out.name) as bar:
            ledger, number = _until_interrupted(
                lambda: run_search(search, study, have, lease, observers=[bar], **more), bar
            )
        ugrl.hear.say_then("interrupted")
        if ledger is None or search.space.final.best == 0:
            return number, ledger.halted if ledger is not None else ""
        if (halted := ledger.halted) and not halted.startswith("budget."):
            return 0, halted
        finals = retry_storage(lambda: open_finals(search, study), search.base.data.storage_patience_s)
        assert finals is not None
        with TrialProgress(
            search.objectives, search.steps, console, enabled=enabled, title="final runs", word="final run"
        ) as bar:
            again, number = _until_interrupted(
                lambda: run_finals(search, study, finals, have, lease, observers=[bar], **more), bar
            )
        return number, halted or again.halted if again is not None else halted


def _until_interrupted(work: Callable[[], Any], bar: Any) -> tuple[Any, int]:
    """What the work returns, and 0; or ``None``, its trials back in the queue, and the signal that interrupted it."""
    try:
        return work(), 0
    except KeyboardInterrupt as stopped:
        if bar.ledger is not None:
            bar.ledger.leave()
        return None, getattr(stopped, "number", None) or signal.SIGINT


def _ended(
    args: argparse.Namespace,
    search: Search,
    study: optuna.Study,
    finals: optuna.Study | None,
    interrupted: int,
    halted: str,
    console: Console,
) -> int:
    from tuning.study.study import is_spent

    if halted and not halted.startswith("budget."):
        raise ConfigError(f"{search.out.name}: {halted}")
    if halted:
        console.print(halted, highlight=False, soft_wrap=True)
    left = max(0, search.space.trials - sum(is_spent(t) for t in study.get_trials(deepcopy=False)))
    again = sum(not is_spent(t) for t in finals.get_trials(deepcopy=False)) if finals is not None else 0
    if not interrupted:
        if left:
            console.print(f"{left} trials were not run; --resume runs them", highlight=False)
        return 0
    words = ["ugrl-tune", "--out", str(search.out), "--resume"]
    for name in ("data", "storage", "address"):
        words += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    command, note = pasted([*words, *(["--quiet"] if args.quiet else [])])
    more = f" and {again} final runs" if again else ""
    for text in (f"interrupted with {left} trials{more} left; continue with: {command}", note):
        if text:
            console.print(text, soft_wrap=True)
    console.print(f"the report so far: {pasted(['ugrl-tune', 'report', str(search.out)])[0]}", soft_wrap=True)
    return 128 + interrupted


def run_dry(args: argparse.Namespace, console: Console) -> int:
    """Say what a search would try and cost, and with ``--data`` what steers it; writes nothing."""
    from tuning.dryrun import dry_run, machine
    from tuning.space.search import Search
    from tuning.study.store import quiet_optuna
    from ugrl.storage import place

    if args.step_s is not None and not 0 < args.step_s < float("inf"):
        raise ConfigError(f"--step-s is {args.step_s:g}; expected a number > 0")
    quiet_optuna()
    space = read_space(args)
    search = Search(space, space.base(), place(args.data or "data"), space.objectives, Path("dry-run"))
    if args.data:
        search = check_data(search, fresh=False)
    if not args.address:
        here = "this machine; --address asks a cluster"
        dry_run(search, machine(), console, step_s=args.step_s, where=here, data=bool(args.data))
        return 0
    from cluster.connect import start_ray, stop_ray

    try:
        dry_run(search, start_ray(args.address), console, step_s=args.step_s, data=bool(args.data))
    finally:
        stop_ray()
    return 0


def run_report(args: argparse.Namespace, console: Console) -> int:
    """``ugrl-tune report``."""
    from tuning.ledger.finals import open_finals
    from tuning.report.files import write_report
    from tuning.report.read import read_findings
    from tuning.study.search_folder import stored_search
    from tuning.study.store import quiet_optuna

    quiet_optuna()
    search, study = stored_search(args.study, args.storage)
    write_report(read_findings(search, study, open_finals(search, study, create=False)), console)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``ugrl-tune``: 0, 2 for bad input, 130 after Ctrl-C and 143 after SIGTERM."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["report"]:
        with ugrl.hear.heard("interrupted"):
            return enter(build_report_parser(), words[1:], run_report, "interrupted")
    with ugrl.hear.heard("interrupted before the search started"):
        return ugrl.hear.ended(enter(build_parser(), words, run, "interrupted"))


if __name__ == "__main__":
    sys.exit(main())
