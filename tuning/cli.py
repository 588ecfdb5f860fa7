"""``ugrl-tune``: a hyperparameter search."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console

from cluster.cli import shipped
from tuning.space import SearchSpace, differences, load_space
from ugrl import config as configs
from ugrl.cli import enter
from ugrl.data.shards import Manifest
from ugrl.errors import ConfigError
from ugrl.train.objective import resolve_objective
from ugrl.train.run import ensure_shards

if TYPE_CHECKING:
    from tuning.driver import Search

SPACE, BASE = "space.yaml", "base.yaml"
# A resumed search may get a larger budget or another machine; what it searches stays.
MAY_CHANGE = ("trials", "concurrent", "resources")

SUMMARY = """\
examples:
  ugrl-tune --space shapes                              the demo: generated images, minutes on two cores
  ugrl-tune --space voc --data DIR --out runs/voc       prepared shards with a split to tune on
  ugrl-tune --space shapes --out runs/a --resume        run the rest of an interrupted search
  ugrl-tune --space shapes --trials 4 train.steps=300   other budget, other base configuration
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``ugrl-tune``."""
    parser = argparse.ArgumentParser(
        prog="ugrl-tune",
        description="Search hyperparameters. Shipped spaces: " + ", ".join(shipped("tuning")) + ".",
        epilog=SUMMARY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--space", metavar="NAME|FILE", help="a shipped search space or a YAML file (default: shapes)")
    parser.add_argument("--data", metavar="DIR|URI", help="prepared shards; shapes are generated without it")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="names the search (default: runs/tune-<name of the space>)"
    )
    parser.add_argument("--trials", type=int, metavar="N", help="trials that are to end")
    parser.add_argument("--workers", type=int, metavar="N", help="training workers of one trial")
    parser.add_argument("--concurrent", type=int, metavar="N", help="trials side by side; 0 for as many as fit")
    parser.add_argument("--resume", action="store_true", help="run what is left of the search in --out")
    parser.add_argument("--address", metavar="ADDR", help="of a running Ray cluster (default: start Ray here)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the base configuration")
    return parser


def plan_search(args: argparse.Namespace, console: Console) -> Search:
    """Check everything that can be checked without Ray; creates nothing but generated shards.

    Raises:
        UgrlError: The space, the name of the run, the shards or the objective cannot be used.
    """
    from tuning.driver import Search

    out = args.out or Path("runs") / f"tune-{Path(args.space or 'shapes').name.removesuffix('.yaml')}"
    out = out.absolute()
    known = out / SPACE
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder to write the search to")
    if out.is_dir() and any(out.iterdir()):
        if not args.resume:
            raise ConfigError(
                f"search '{out.name}' exists already ({out}); choose another --out, or continue it with --resume"
            )
        if not known.is_file():
            raise ConfigError(f"{out}: holds no search to resume; expected {SPACE} in it")
    name = args.space or (known if args.resume and known.is_file() else "shapes")
    space = load_space(
        name,
        overrides=configs.parse_overrides(args.overrides),
        trials=args.trials,
        workers=args.workers,
        concurrent=args.concurrent,
    )
    base = space.base()
    if args.resume and known.is_file():
        check_same(space, base, out)
    shards = ensure_shards(base, args.data, console=console)
    manifest = Manifest.load(shards)
    for split in (base.data.train_split, space.split):
        manifest.split(split)
    objective = resolve_objective(base, manifest, space.split, space.objective)
    return Search(space, base, shards, objective, out)


def check_same(space: SearchSpace, base: configs.Config, out: Path) -> None:
    """Refuse to continue a search as another one, naming the first difference."""
    for key, new, old in differences(space, load_space(out / SPACE), ignore=MAY_CHANGE):
        raise ConfigError(f"{out}: was started with {key} = {old}, not {new}; a search is resumed as it was")
    stored = configs.build(configs.read_yaml(out / BASE))
    for path in configs.paths():
        if configs.get(stored, path) != configs.get(base, path):
            raise ConfigError(
                f"{out}: was started with {path} = {configs.get(stored, path)}, not {configs.get(base, path)}; "
                "a search is resumed as it was"
            )


def run(args: argparse.Namespace, console: Console) -> int:
    """Check, search, report."""
    search = plan_search(args, console)
    from cluster.launch import start_ray, stop_ray
    from tuning.driver import concurrent_trials, run_search
    from tuning.progress import TrialProgress
    from tuning.report import write_report
    from tuning.study import close_orphans, is_spent, open_study, quiet_optuna

    quiet_optuna()
    try:
        have = start_ray(args.address)
        side_by_side = concurrent_trials(search, have)
        fresh = not (search.out / SPACE).is_file()
        search.out.mkdir(parents=True, exist_ok=True)
        study = open_study(search.space, search.out, create=fresh)
        close_orphans(study)
        (search.out / SPACE).write_text(search.space.to_yaml(), encoding="utf-8")
        (search.out / BASE).write_text(yaml.safe_dump(configs.to_dict(search.base), sort_keys=False), encoding="utf-8")
        ended = sum(is_spent(t) for t in study.get_trials(deepcopy=False))
        if not args.quiet:
            console.print(
                f"{search.out.name}: {search.space.trials} trials ({ended} have ended), {side_by_side} at a time on "
                f"{have}, objective {search.objective} on '{search.space.split}'",
                highlight=False,
                soft_wrap=True,
            )
        steps = search.base.train.steps
        interrupted = False
        with TrialProgress(search.objective, steps, console, enabled=not args.quiet) as shown:
            try:
                run_search(search, study, have, callbacks=[shown])
            except KeyboardInterrupt:
                interrupted = True
    finally:
        stop_ray()
    close_orphans(study)
    write_report(search, study, console)
    left = search.space.trials - sum(is_spent(t) for t in study.get_trials(deepcopy=False))
    if interrupted or left > 0:
        words = ["ugrl-tune", "--out", str(search.out), "--resume"]
        words += ["--data", str(args.data)] if args.data else []
        console.print(
            f"interrupted with {left} trials left; continue with: {shlex.join(words)}", highlight=False, soft_wrap=True
        )
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``ugrl-tune``: 0, 2 for bad input, 130 after an interrupt."""
    return enter(build_parser(), argv, run, "interrupted before the search started")


if __name__ == "__main__":
    sys.exit(main())
