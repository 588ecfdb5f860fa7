"""``ugrl-train``: one training run, in this process or on Ray Train's workers."""

from __future__ import annotations

import argparse
import shlex
import sys
from importlib import resources
from pathlib import Path

from rich.console import Console

from ugrl import config as configs
from ugrl.cli import enter
from ugrl.errors import UgrlError
from ugrl.train.run import RunPlan, plan_run

SUMMARY = """\
examples:
  ugrl-train --config shapes                            generated images, minutes on two cores
  ugrl-train --config voc --data DIR                    prepared shards (see: ugrl prepare)
  ugrl-train --config shapes train.steps=400 seed=1     any key of the configuration, by its path
  ugrl-train --config shapes --workers 2                the same loop on two workers of Ray Train
"""


def shipped(package: str) -> list[str]:
    """Names of the YAML files in a package."""
    return sorted(p.name.removesuffix(".yaml") for p in resources.files(package).iterdir() if p.name.endswith(".yaml"))


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``ugrl-train``."""
    parser = argparse.ArgumentParser(
        prog="ugrl-train",
        description="Train one model. Shipped configurations: " + ", ".join(shipped("ugrl.configs")) + ".",
        epilog=SUMMARY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help="a shipped configuration or a YAML file (default: shapes; with --resume the run's own)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared shards; shapes are generated without it")
    parser.add_argument("--out", type=Path, metavar="DIR", help="names the run (default: runs/<name of the config>)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    parser.add_argument("--workers", type=int, metavar="N", help="train on N workers of Ray Train, fed by Ray Data")
    parser.add_argument("--address", metavar="ADDR", help="of a running Ray cluster (default: start Ray here)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, …, for one process (default: cuda if any)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values")
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    """Check everything, then train."""
    if args.workers is not None and args.workers < 1:
        raise UgrlError(f"--workers is {args.workers}; expected at least 1")
    args.config = args.config or _own_config(args) or "shapes"
    cfg = configs.load(args.config, configs.parse_overrides(args.overrides))
    if args.workers is not None or args.address:
        return _on_ray(args, cfg, console)
    plan = plan_run(cfg, data=args.data, out=args.out, resume=args.resume, console=console)
    from ugrl.train.loop import Trainer

    trainer = Trainer(
        plan.cfg,
        shards=plan.shards,
        out=plan.out,
        resume_from=plan.checkpoint,
        console=console,
        quiet=args.quiet,
        device=args.device,
    )
    try:
        trainer.fit()
    except KeyboardInterrupt:
        _interrupted(args, plan, console)
        return 130
    _ended(plan, console)
    return 0


def _own_config(args: argparse.Namespace) -> str | None:
    """The configuration that a resumed run was started with."""
    stored = args.out / "config.yaml" if args.out and args.resume else None
    return str(stored) if stored and stored.is_file() else None


def _on_ray(args: argparse.Namespace, cfg: configs.Config, console: Console) -> int:
    from cluster.launch import check_fits, launch, start_ray, stop_ray
    from cluster.watch import watch

    workers = args.workers or 1
    plan = plan_run(cfg, data=args.data, out=args.out, resume=args.resume, console=console)
    try:
        have = start_ray(args.address)
        check_fits(plan.cfg, workers, have)
        if not args.quiet:
            console.print(f"Ray: {have}; starting {workers} workers takes about 20 s", highlight=False)
        with watch(plan.out, plan.cfg.train.steps, console=console, enabled=not args.quiet):
            launch(plan.cfg, shards=plan.shards, out=plan.out, workers=workers)
    except KeyboardInterrupt:
        _interrupted(args, plan, console)
        return 130
    finally:
        stop_ray()
    _ended(plan, console)
    return 0


def _ended(plan: RunPlan, console: Console) -> None:
    console.print(f"run: {plan.out}", highlight=False, soft_wrap=True)
    words = ["ugrl", "eval", str(plan.out), "--data", str(plan.shards), "--split", plan.cfg.data.val_split]
    console.print(f"next: {shlex.join(words)}", highlight=False, soft_wrap=True)


def _interrupted(args: argparse.Namespace, plan: RunPlan, console: Console) -> None:
    words = ["ugrl-train", "--config", args.config, "--out", str(plan.out), "--resume", *args.overrides]
    words += ["--data", str(args.data)] if args.data else []
    words += ["--workers", str(args.workers)] if args.workers else []
    console.print(f"interrupted; continue with: {shlex.join(words)}", highlight=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``ugrl-train``: 0, 2 for bad input, 130 after an interrupt."""
    return enter(build_parser(), argv, run, "interrupted before training started")


if __name__ == "__main__":
    sys.exit(main())
