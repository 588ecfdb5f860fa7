"""The settings of the method on real photographs with masks, paired by seed: train, measure, and one table.

    python -m bench.real [--voc DEVKIT] [--settings Base IV Full] [--seeds 1] [--config voc676] [--jobs N] [--out DIR]

or ``make real``. With ``--arms FILE`` a setting is what that file says: a name, and the keys that it changes
(``bench/finding.yaml`` is one). Each arm (a setting and a seed) is one process with one thread; all arms of a seed see
the same images in the same order and crops. Started again, it goes on: a run that was killed continues from its
checkpoint, and what is finished is not repeated. Results lie in ``OUT/results``, so the table alone takes a second.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

import ugrl.hear
from bench.real_arms import SHORT, Arm, arms_of, base_of, variants_of
from bench.real_table import LEGEND, ORDER, as_markdown, as_tables, summary
from ugrl import config as configs
from ugrl.command import enter, folder_for, pasted
from ugrl.data.prepare import prepare
from ugrl.data.shards import Manifest
from ugrl.data.voc import VocSource
from ugrl.errors import ConfigError
from ugrl.files import write_whole
from ugrl.ownership import own
from ugrl.storage import place
from ugrl.text import line, nearest
from ugrl.train.interrupt import StopRequest

DEVKIT = Path("../shared/data/voc676/VOCdevkit")
# Seconds: between two looks at the arms, between two lines where nobody watches, and for arms to write a checkpoint.
LOOK_S, LINE_S, LEAVE_S = 0.5, 60.0, 120.0


# -- what is left -----------------------------------------------------------------------------


class Forecast:
    """How long the rest takes, by what was seen since the start; a setting that was not seen costs as the others do."""

    def __init__(self, arms: Sequence[Arm], images: int, jobs: int) -> None:
        self.arms, self.total, self.jobs = arms, images, jobs
        self._first: dict[tuple[str, str], tuple[float, int]] = {}
        self._seconds: dict[tuple[str, str], tuple[float, int]] = {}

    def see(self, arm: Arm, now: float) -> tuple[int, int]:
        """Look at a running arm; returns its steps and measured images."""
        steps, images = arm.steps(), arm.images()
        for kind, count in (("step", steps), ("image", images)):
            if (kind, count) == ("image", 0):
                self._first[arm.name, kind] = now, 0  # the steps come first, and they are no time of images
            begun, before = self._first.setdefault((arm.name, kind), (now, count))
            if count < before:  # a killed run had come further than its last checkpoint, where this one begins
                self._first[arm.name, kind] = begun, before = now, count
            if count > before and (kind == "image" or steps < arm.cfg.train.steps):
                self._seconds[arm.name, kind] = now - begun, count - before
        return steps, images

    def each(self, kind: str, setting: str = "") -> float | None:
        """Seconds of a step of a setting (or of any), or of an image."""
        own = [v for (name, k), v in self._seconds.items() if k == kind and name.rpartition("-")[0] == setting]
        found = own or [v for (_, k), v in self._seconds.items() if k == kind]
        return sum(s for s, _ in found) / sum(n for _, n in found) if found else None

    def left(self, seen: Sequence[tuple[Arm, int, int]]) -> float | None:
        """Seconds until all arms are through; ``None`` while nothing is known.

        Args:
            seen: Arms that are not through, with their steps and measured images.
        """
        rest = []
        for arm, steps, images in seen:
            step = self.each("step", arm.setting)
            if step is None:
                return None
            # Before the first is measured: about what one image of a training batch costs.
            image = self.each("image") or step / arm.cfg.train.global_batch
            rest.append((arm.cfg.train.steps - steps) * step + (self.total - images) * image)
        return max(max(rest), sum(rest) / self.jobs) if rest else 0.0


def words_for(seconds: float | None) -> str:
    """A time that is left, in words.

    >>> words_for(None), words_for(40), words_for(1900)
    ('', 'about 1 min left', 'about 32 min left')
    """
    return "" if seconds is None else f"about {max(1, round(seconds / 60))} min left"


# -- the arms side by side --------------------------------------------------------------------


class Display:
    """A bar on a terminal, a line a minute elsewhere."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.bar, self.next = console, None, 0.0
        if console.is_terminal:
            columns = (BarColumn(20), TextColumn("{task.fields[words]}"), TimeElapsedColumn())
            self.bar = Bar(*columns, console=console)
            self.task = self.bar.add_task("", total=total, words="")

    def __enter__(self) -> Display:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, soft_wrap=True)

    def show(self, done: int, words: str) -> None:
        """Where everything stands."""
        if self.bar:
            self.bar.update(self.task, completed=done, words=words)
        elif time.monotonic() >= self.next and words:
            self.next = time.monotonic() + LINE_S
            self.say(words)


def start(arm: Arm, shards: Path, device: str | None, checkpoints: bool = False) -> subprocess.Popen[bytes]:
    """Begin or continue an arm in a process of its own: one thread, and none of the terminal's signals."""
    for folder in ("arms", "runs", "results"):
        (arm.out / folder).mkdir(exist_ok=True)
    write_whole(arm.file("yaml"), configs.dump(configs.public_dict(arm.cfg)))
    arm.file("progress").unlink(missing_ok=True)
    words = [sys.executable, "-m", "bench.real_measure", str(arm.file("yaml")), "--shards", str(shards)]
    words += ["--run", str(arm.run), "--result", str(arm.result), "--progress", str(arm.file("progress"))]
    words += ["--parent", str(os.getpid()), *(["--device", device] if device else [])]
    words += ["--checkpoints"] if checkpoints else []
    with arm.file("log").open("ab") as log:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def run_arms(
    arms: Sequence[Arm],
    shards: Path,
    *,
    jobs: int,
    images: int,
    device: str | None,
    console: Console,
    stop: StopRequest,
    checkpoints: bool = False,
) -> list[str]:
    """Train and measure arms side by side, until all are through or somebody stops it.

    Returns:
        A line for each arm that failed.
    """
    queue, running, failed = deque(arms), dict[Arm, subprocess.Popen[bytes]](), list[str]()
    forecast = Forecast(arms, images, jobs)
    each = [arm.cfg.train.steps + images for arm in arms]
    with Display(console, sum(each)) as display, _ending(running):
        while (queue or running) and not stop.requested:
            while queue and len(running) < jobs:
                arm = queue.popleft()
                running[arm] = start(arm, shards, device, checkpoints)
                display.say(f"{arm.name}: {'continues' if arm.steps() else 'begins'}")
            for arm in [arm for arm, process in running.items() if process.poll() is not None]:
                status = running.pop(arm).returncode
                failed += [] if status == 0 else [f"{arm.name}: status {status}: {last_line(arm.file('log'))}"]
                display.say(f"{arm.name}: done" if status == 0 else failed[-1])
            now = time.monotonic()
            seen = [(arm, *forecast.see(arm, now)) for arm in running]
            left = [*seen, *((arm, arm.steps(), 0) for arm in queue)]
            words = [f"{a.name} {_where(a, s, i, images)}" for a, s, i in seen]
            words += [f"{len(queue)} more"] if queue else []
            text = ", ".join([*words, *filter(None, [words_for(forecast.left(left))])])
            display.show(sum(each) - sum(a.cfg.train.steps - s + images - i for a, s, i in left), text)
            time.sleep(LOOK_S)
        if running:
            display.say("stopping; arms that train write a checkpoint first; once more to stop at once")
    return failed


class _ending:
    """Whatever ends the block: processes that still run are asked to leave, and are waited for."""

    def __init__(self, running: dict[Arm, subprocess.Popen[bytes]]) -> None:
        self.running = running

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for process in self.running.values():
            process.terminate()
        until = time.monotonic() + LEAVE_S
        for process in self.running.values():
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except BaseException as error:  # late, or a second Ctrl-C
                for each in self.running.values():
                    each.kill()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise


def _where(arm: Arm, steps: int, measured: int, images: int) -> str:
    total = arm.cfg.train.steps
    return f"{steps}/{total} steps" if steps < total else f"measured {measured}/{images}"


def last_line(file: Path) -> str:
    """What a process said last."""
    with suppress(OSError):
        for text in reversed(file.read_text(errors="replace").splitlines()):
            if text.strip():
                return line(text)
    return "it said nothing"


# -- the command ------------------------------------------------------------------------------


def prepared(voc: Path, out: Path) -> Path:
    """The devkit as shards below the folder of the benchmark; made once.

    Raises:
        ConfigError: There is no devkit, or the shards are of another one.
        DataError: It cannot be used.
    """
    if not voc.exists():
        raise ConfigError(f"{line(voc)}: no such folder; name a VOC devkit: make real VOC=DEVKIT, or --voc DEVKIT")
    source, shards = VocSource(voc), out / "shards"
    if not shards.exists():
        prepare(source, shards, tune_val=0, seed=0)
        return shards
    manifest, ids = Manifest.load(shards), source.splits()
    for split, found in ids.items():
        if split not in manifest.splits or not set(manifest.ids(split)) <= set(found):
            raise ConfigError(f"{line(shards)}: were made of another devkit than {line(voc)}; choose another --out")
    return shards


def kept(cfg: configs.Config) -> int:
    """Checkpoints of a finished run."""
    return min(cfg.train.keep_checkpoints, math.ceil(cfg.train.steps / cfg.train.at(cfg.train.checkpoint_every)))


def write_table(arms: Sequence[Arm], order: Sequence[str], out: Path, config: str, console: Console) -> None:
    """Print the table of what is measured, and write it as Markdown and JSON."""
    found = {(arm.setting, arm.seed): scores for arm in arms if (scores := arm.scores()) is not None}
    if not found:
        return
    cfg = arms[0].cfg
    notes = [
        f"Configuration {config}: {cfg.model.backbone}, crops of {cfg.data.crop} px, "
        f"{cfg.train.steps} steps of {cfg.train.global_batch}; {len(found)} of {len(arms)} arms."
    ]
    summed = summary(found, order)
    write_whole(out / "real.json", json.dumps({"notes": notes, **summed}, indent=1) + "\n")
    write_whole(out / "real.md", as_markdown(summed, notes))
    for table in as_tables(summed):
        console.print(table)
    for text in (*notes, *LEGEND, f"table: {out / 'real.md'}, {out / 'real.json'}"):
        console.print(text, soft_wrap=True)


def run(args: argparse.Namespace, console: Console) -> int:
    """Prepare, train, measure, and print the table."""
    for name, value in (("seeds", args.seeds), ("jobs", args.jobs), ("steps", args.steps)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}; expected at least 1")
    args.variants = variants_of(args.arms)
    args.settings = list(dict.fromkeys(args.settings or (args.variants if args.arms else SHORT)))
    for setting in args.settings:
        if setting not in args.variants:
            raise ConfigError(f"--settings: no '{line(setting, 40)}'{nearest(setting, args.variants)}")
    base, args.out = base_of(args), folder_for(args.out).absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    with own(place(args.out)) as held, ugrl.hear.owning(held.give_back):
        shards = prepared(args.voc, args.out) if args.shards is None else args.shards.absolute()
        arms = arms_of(args, base, shards)
        manifest = Manifest.load(shards)
        images = sum(manifest.rows(s) for s in (arms[0].cfg.data.train_split, arms[0].cfg.data.val_split))
        if args.checkpoints:
            images *= kept(arms[0].cfg)
        left = [arm for arm in arms if arm.scores() is None]
        failed, stopped = list[str](), None
        if left:
            jobs = min(args.jobs or _cores(args.device), len(left))
            console.print(f"{len(left)} of {len(arms)} arms are left, {jobs} side by side", soft_wrap=True)
            ugrl.hear.say_then("interrupted; the same command continues")
            with StopRequest() as stop:
                more = {"images": images, "device": args.device, "checkpoints": args.checkpoints}
                failed = run_arms(left, shards, jobs=jobs, console=console, stop=stop, **more)
            stopped = stop.number if stop.requested else None
        write_table(
            arms, list(args.variants), args.out, args.config, Console(width=None if sys.stdout.isatty() else 120)
        )
    if stopped is not None:
        command, _ = pasted([sys.executable, "-m", "bench.real", *args.words])
        console.print(f"interrupted; continue with the same command: {command}", soft_wrap=True)
        return 128 + (stopped if stopped == signal.SIGTERM else signal.SIGINT)
    for text in failed:
        console.print(f"failed: {text}; see {args.out / 'arms'}", soft_wrap=True)
    return 1 if failed else 0


def _cores(device: str | None) -> int:
    """Arms side by side: one a core, and one alone where a GPU is used."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``python -m bench.real``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--voc", type=Path, default=DEVKIT, metavar="DEVKIT", help="default: %(default)s")
    parser.add_argument("--shards", type=Path, metavar="DIR", help="a prepared folder with masks, in place of a devkit")
    parser.add_argument(
        "--settings",
        nargs="+",
        metavar="NAME",
        help=f"of {' '.join(ORDER)}, default: {' '.join(SHORT)}; or of those of --arms, default: all",
    )
    parser.add_argument("--arms", type=Path, metavar="FILE", help="YAML: name of an arm → the keys that it changes")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1; default: %(default)s")
    parser.add_argument("--config", default="voc676", metavar="NAME|FILE", help="default: %(default)s")
    parser.add_argument("--steps", type=int, metavar="N", help="instead of the configuration's train.steps")
    parser.add_argument("--jobs", type=int, metavar="N", help="arms side by side; default: the cores")
    parser.add_argument("--device", metavar="NAME", help="to train on: cpu, cuda, …; default: cuda if any")
    parser.add_argument(
        "--checkpoints", action="store_true", help="measure every checkpoint that a run keeps (results/ARM@STEP-SEED)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/real"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values")
    return parser


def main(words: list[str] | None = None) -> int:
    """0, 1 where an arm failed, 2 for bad input, 130 after Ctrl-C."""
    words = sys.argv[1:] if words is None else words

    def body(args: argparse.Namespace, console: Console) -> int:
        args.words = words
        return run(args, console)

    with ugrl.hear.heard("interrupted before an arm started; the same command begins again"):
        return enter(build_parser(), words or ["--seeds", "1"], body, "interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
