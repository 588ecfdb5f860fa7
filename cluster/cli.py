"""``ugrl-train``: one training run, in this process or on Ray Train's workers."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ugrl.hear
from ugrl import config as configs
from ugrl.command import Parser, enter, folder_for, pasted, shipped
from ugrl.errors import ConfigError, UgrlError

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.stop import RayWork
    from ugrl.ownership import Ownership
    from ugrl.train.run import RunPlan

# What a second signal is answered.
AT_ONCE = "interrupted; --resume continues from the last checkpoint"
SUMMARY = """\
examples:
  ugrl-train --config shapes                            generated images, minutes on two cores
  ugrl-train --config voc --data DIR                    prepared shards (see: ugrl prepare)
  ugrl-train --config shapes train.steps=400 seed=1     any key of the configuration, by its path
  ugrl-train --config shapes --workers 2                the same loop on two workers of Ray Train
  ugrl-train --config voc --data s3://bucket/voc --cluster kubernetes --out s3://bucket/runs/voc --resume
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``ugrl-train``."""
    parser = Parser(
        prog="ugrl-train",
        description="Train one model. Shipped configurations: " + ", ".join(shipped("ugrl.configs")) + ".",
        epilog=SUMMARY,
    )
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help="what is trained: a shipped configuration or a YAML file (with --resume the run's; shapes without data)",
    )
    parser.add_argument(
        "--cluster",
        metavar="NAME|FILE",
        help="where it runs: keys of the section 'cluster'. Shipped: " + ", ".join(shipped("cluster.places")),
    )
    parser.add_argument("--data", metavar="DIR|URI", help="prepared shards; shapes are generated without it")
    parser.add_argument("--out", metavar="DIR|URI", help="names the run (default: runs/<name of the config>)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    parser.add_argument("--workers", type=int, metavar="N", help="train on N workers of Ray Train, fed by Ray Data")
    parser.add_argument("--address", metavar="ADDR", help="of a running Ray cluster (default: start Ray here)")
    parser.add_argument("--wait", action="store_true", help="wait for room on it as long as it takes")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, …, for one process (default: cuda if any)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values")
    return parser


def load_place(name: str) -> dict[str, Any]:
    """Read a file that says where a run runs, as overrides of the configuration.

    Args:
        name: A shipped file's name, or a YAML file whose keys are those of the section ``cluster``.

    Returns:
        ``{"cluster.workers": 2, …}``.

    Raises:
        ConfigError: There is no such file, it does not hold keys and values, or a key is unknown; the message names
            the nearest key.
    """
    known = shipped("cluster.places")
    if name in known:
        file = Path(str(resources.files("cluster.places") / f"{name}.yaml"))
    else:
        file = Path(name)
        if not file.is_file():
            raise ConfigError(f"--cluster {name}: no such file{configs.nearest(name, known)}")
    tree = configs.read_yaml(file)
    fields = [p.removeprefix("cluster.") for p in configs.paths() if p.startswith("cluster.")]
    for key in tree:
        if key not in fields:
            raise ConfigError(f"{file}: unknown key '{key}'{configs.nearest(str(key), fields)}")
    return {f"cluster.{key}": value for key, value in tree.items()}


def run(args: argparse.Namespace, console: Console) -> int:
    """Check everything, then train."""
    if args.workers is not None and args.workers < 1:
        raise UgrlError(f"--workers is {args.workers}; expected at least 1")
    cfg = load_config(args)
    from ugrl.storage import is_uri

    if args.out is not None and not is_uri(args.out):
        folder_for(args.out)
    if cfg.cluster.workers >= 1 or cfg.cluster.address:
        if args.device is not None:
            raise ConfigError(f"--device {args.device}: is for one process; workers take the GPUs that Ray gives them")
        return _on_ray(args, cfg, console)
    from ugrl.device import resolve
    from ugrl.train.run import plan_run

    resolve(args.device)
    plan = plan_run(cfg, data=args.data, out=args.out, resume=args.resume, console=console)
    from ugrl.ownership import own
    from ugrl.train.loop import Trainer
    from ugrl.train.observer import Hooks

    with own(plan.out) as held, ugrl.hear.owning(held.give_back):
        trainer = Trainer(
            plan.cfg,
            shards=plan.shards,
            out=plan.out,
            hooks=Hooks(before_write=held.check),
            resume_from=plan.checkpoint,
            console=console,
            quiet=args.quiet,
            device=args.device,
        )
        ugrl.hear.say_then(AT_ONCE)
        try:
            trainer.fit()
        except KeyboardInterrupt as stopped:
            return _interrupted(args, plan, console, getattr(stopped, "number", None))
    _ended(plan, console)
    return 0


def load_config(args: argparse.Namespace) -> configs.Config:
    """The configuration: first ``--config``, then ``--cluster``, then the values on the command line."""
    where = load_place(args.cluster) if args.cluster else {}
    words = configs.parse_overrides(args.overrides)
    if args.workers is not None:
        words["cluster.workers"] = args.workers
    if args.address:
        words["cluster.address"] = args.address
    cfg = _stored(args, {**where, **words}) if args.config is None and args.resume and args.out else None
    if cfg is None:
        if args.config is None and (args.data or words.get("data.shards")):
            raise ConfigError(
                f"--data {args.data or words['data.shards']}: --config is missing, which says what is trained on it; "
                f"shipped: {', '.join(shipped('ugrl.configs'))} (own: photographs of your own)"
            )
        args.config = args.config or "shapes"
        cfg = configs.load(args.config, {**where, **words})
    configs.check_revealed(cfg, args.config or args.out)
    return cfg


def _stored(args: argparse.Namespace, words: dict[str, Any]) -> configs.Config | None:
    """The configuration of the run in ``--out``; ``None`` if no run has begun there."""
    from ugrl.storage import place
    from ugrl.train.run import stored_config

    out = place(args.out)
    if not (out / "config.yaml").exists():
        return None
    if args.workers is None and not args.cluster:  # the command line says where a run is continued, not its past
        words = {"cluster.workers": 0, **words}
    return configs.build(configs.override(configs.to_dict(stored_config(out)), words))


def _on_ray(args: argparse.Namespace, cfg: configs.Config, console: Console) -> int:
    from cluster.connect import check, stop_ray
    from cluster.stop import RayWork, run_stoppable
    from ugrl.ownership import own
    from ugrl.train.interrupt import StopRequest
    from ugrl.train.run import plan_run

    check(cfg.cluster.address, _origin(args))
    plan = plan_run(cfg, data=args.data, out=args.out, resume=args.resume, console=console)

    def say(text: str) -> None:
        if not args.quiet:
            console.print(text, soft_wrap=True)

    state = RayWork()
    with ExitStack() as stack:
        held = stack.enter_context(own(plan.out))
        stack.enter_context(ugrl.hear.owning(held.give_back))
        stop = stack.enter_context(StopRequest())
        try:
            run_stoppable(lambda: _launch(args, plan, held, console, state, say), stop, state, say)
        except KeyboardInterrupt:
            status = _interrupted(args, plan, console, stop.number)
            if state.abandoned:  # a thread that waits for Ray would keep this process
                console.file.flush()
                ugrl.hear.leave(status)
            stop_ray()
            return status
        except BaseException:
            stop_ray()
            raise
        stop_ray()
    _ended(plan, console)
    return 0


def _origin(args: argparse.Namespace) -> str:
    return "--address" if args.address else "cluster.address"


def _launch(
    args: argparse.Namespace,
    plan: RunPlan,
    held: Ownership,
    console: Console,
    state: RayWork,
    say: Callable[[str], None],
) -> None:
    """Everything that needs Ray. It runs in a second thread, so that the main thread can hear signals."""
    from cluster.capacity import check_fits, on_what, worker_resources
    from cluster.channel import DriverChannel
    from cluster.connect import start_ray
    from cluster.launch import launch
    from cluster.live import watch
    from cluster.placement_groups import sweep_placement_groups
    from cluster.preflight import check_store, check_visible, wait_until_free
    from cluster.watchdog import head_watched
    from ugrl.data.shards import Manifest

    workers = plan.cfg.cluster.workers or 1
    have = start_ray(plan.cfg.cluster.address, _origin(args))
    with head_watched(plan.cfg.cluster.head_s, say):
        first = check_fits(plan.cfg, workers, have)
        for group in sweep_placement_groups():
            say(f"placement group {group[:12]} of a job that has ended: given back")
        patience_s = math.inf if args.wait else plan.cfg.cluster.busy_s
        wait_until_free(worker_resources(plan.cfg, have), first, say=say, patience_s=patience_s)
        check_store(plan.cfg, Manifest.load(plan.shards), first, have)
        check_visible(plan.out, plan.shards, plan.cfg.cluster.start_timeout_s, say)
        say(f"Ray: {on_what(plan.cfg, have)}; starting {first} workers takes about 10 s")
        state.channel = channel = DriverChannel.open()
        ugrl.hear.say_then(AT_ONCE)
        with watch(channel, plan.cfg.train.steps, console=console, enabled=not args.quiet):
            launch(plan.cfg, shards=plan.shards, out=plan.out, workers=workers, channel=channel, say=say, owner=held.id)


def _ended(plan: RunPlan, console: Console) -> None:
    console.print(f"run: {plan.out}", soft_wrap=True)
    words = ["ugrl", "eval", plan.out.public, "--data", plan.shards.public, "--split", plan.cfg.data.val_split]
    console.print(f"next: {pasted(words)[0]}", soft_wrap=True)


def _interrupted(args: argparse.Namespace, plan: RunPlan, console: Console, number: int | None) -> int:
    words = ["ugrl-train", *(["--config", args.config] if args.config else []), "--out", plan.out.where, "--resume"]
    for name in ("data", "cluster", "workers", "address", "device"):
        value = getattr(args, name)
        words += [f"--{name}", str(value)] if value else []
    words += [f"--{name}" for name in ("wait", "quiet") if getattr(args, name)]
    command, note = pasted([*words, *args.overrides])
    console.print(f"interrupted; continue with: {command}", soft_wrap=True)
    if note:
        console.print(note, soft_wrap=True)
    return 128 + (number if number == signal.SIGTERM else signal.SIGINT)


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``ugrl-train``: 0, 2 for bad input, 130 after Ctrl-C and 143 after SIGTERM."""
    with ugrl.hear.heard("interrupted before training started"):
        return ugrl.hear.ended(enter(build_parser(), argv, run, "interrupted"))


if __name__ == "__main__":
    sys.exit(main())
