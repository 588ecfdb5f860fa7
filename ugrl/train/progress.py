"""Progress of a run: a live bar on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ugrl.config import Config
from ugrl.eval.evaluate import BASELINES, EvalResult
from ugrl.text import plain
from ugrl.train.meter import Pace
from ugrl.train.observer import Observer

LOSSES = ("total", "cls", "cls_aux", "seg", "ucl", "aux")
DAY_S = 86400.0


def losses_text(values: Mapping[str, float]) -> str:
    """The losses among a training line's values.

    >>> losses_text({"total": 1.5, "cls": 0.25, "lr": 1e-4})
    'total 1.5000  cls 0.2500'
    """
    return "  ".join(f"{k} {values[k]:.4f}" for k in LOSSES if k in values)


def speed_text(values: Mapping[str, float]) -> str:
    """Pace, step time, share of it spent waiting for data, memory: those that are known.

    >>> speed_text({"images_per_s": 81.25, "step_s": 0.0985, "data_wait": 0.034, "device_memory_mb": 10444.0})
    '81.2 img/s  98 ms/step  3% data wait  10.4 GB'
    """
    words = [f"{values['images_per_s']:.1f} img/s"] if "images_per_s" in values else []
    if "step_s" in values:
        words.append(f"{step_time(values['step_s'])}/step")
    if "data_wait" in values:
        words.append(f"{100 * values['data_wait']:.0f}% data wait")
    if "device_memory_mb" in values:
        mb = values["device_memory_mb"]
        words.append(f"{mb / 1000:.1f} GB" if mb >= 1000 else f"{mb:.0f} MB")
    return "  ".join(words)


def step_time(seconds: float) -> str:
    """Seconds of a step.

    >>> step_time(2.5), step_time(0.0985)
    ('2.50 s', '98 ms')
    """
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def duration(seconds: float) -> str:
    """A time as people say it, its two largest units.

    >>> duration(7), duration(200), duration(3 * 3600 + 61), duration(20 * 86400 + 7200)
    ('7 s', '3 min 20 s', '3 h 1 min', '20 d 2 h')
    """
    whole = round(seconds)
    for size, unit, part, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def left_text(seconds: float | None) -> str:
    """Time to go, where it is known."""
    return "" if seconds is None else f"{duration(seconds)} left"


def bar_line(
    width: int, done: int, total: int, left: str, notes: Sequence[str] = (), *, ascii_only: bool = False
) -> Text:
    """A run in one row of a terminal: step, bar and time left, then as many whole notes as there is room for.

    >>> bar_line(50, 5, 20, "7 s left", ["81.2 img/s", "total 1.5000"], ascii_only=True).plain
    'step 5/20  #####---------------  7 s left'
    >>> bar_line(24, 5, 20, "7 s left", ["81.2 img/s"], ascii_only=True).plain
    'step 5/20  7 s left'
    """
    head = f"step {done}/{total}"
    cells = min(20, width - len(head) - 2 - (len(left) + 2 if left else 0))
    row = Text(head, no_wrap=True, overflow="crop")
    if cells >= 4:
        full = cells * done // max(1, total)
        row.append("  ").append(("#" if ascii_only else "━") * full, "bar.complete")
        row.append(("-" if ascii_only else "━") * (cells - full), "bar.back")
    for word in (left, *notes):
        if not word:
            continue
        if row.cell_len + 2 + len(word) > width:
            break
        row.append(f"  {word}", "progress.remaining" if word is left else "")
    return row


def header(
    cfg: Config,
    *,
    device: torch.device,
    workers: int,
    parameters: int,
    classes: int,
    train: int,
    val: int,
    objective: str,
    done: int = 0,
    loaded: str = "",
) -> list[str]:
    """What a run is, in lines of less than 80 characters where names are short.

    >>> from ugrl.config import load
    >>> for text in header(load("voc"), device=torch.device("cpu"), workers=1, parameters=14_000_000, classes=20,
    ...                    train=10582, val=1449, objective="seg_miou"):
    ...     print(text)
    device cpu  mit_b1 with 14.0 M parameters  20 classes
    images 10582 train, 1449 val  judged by seg_miou
    steps 20000 of 8 crops of 512 px = 15.1 epochs
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    t, crop = cfg.train, cfg.data.crop
    number = f"{classes} {'class' if classes == 1 else 'classes'}"
    start = f"device {name}" + (f" x {workers} workers" if workers > 1 else "")
    epochs = t.steps / (train // t.global_batch)
    return [
        f"{start}  {cfg.model.backbone} with {parameters / 1e6:.1f} M parameters  {number}",
        f"images {train} {cfg.data.train_split}, {val} {cfg.data.val_split}  judged by {objective}",
        f"steps {t.steps} of {t.global_batch} crops of {crop} px = {epochs:.1f} epochs"
        + (f", from step {done}" if done else ""),
        *([f"weights {loaded}"] if loaded else []),
        *(["warning: model.frozen is all, model.weights null: random weights stay"] if _stays_random(cfg) else []),
    ]


def _stays_random(cfg: Config) -> bool:
    """Whether nothing ever teaches the encoder."""
    return cfg.model.frozen == "all" and not cfg.model.weights


def tell(console: Console, text: str) -> None:
    """One line that may hold anything: wrapped between words on a terminal, one line elsewhere."""
    words = Text("  ").join(plain(word) for word in text.split("  "))
    console.print(words, highlight=False, soft_wrap=not console.is_terminal)


def slow_text(left_s: float, done: int, total: int) -> str:
    """What to do about a run of more than a day; empty for a shorter one.

    >>> slow_text(3600.0, 10, 1000)
    ''
    >>> slow_text(10 * 86400.0, 0, 20000)
    'warning: more than a day; train.steps=2000 fits in one, --config own is made for a CPU, own-gpu and voc for a GPU'
    """
    if left_s <= DAY_S:
        return ""
    fits = done + int((total - done) * DAY_S / left_s)
    return (
        f"warning: more than a day; train.steps={fits} fits in one, --config own is made for a CPU, own-gpu and voc "
        "for a GPU"
    )


class Progress(Observer):
    """Shows steps, time left, images/s and losses; a line at most every few seconds off a terminal.

    Args:
        console: Console to print to.
        total: Steps of the run.
        done: Number of steps done before.
        enabled: Whether to show anything.
        pace: Estimate of the time left; without it none is shown.
        every_s: Seconds between two lines off a terminal.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        done: int,
        *,
        enabled: bool,
        pace: Pace | None = None,
        every_s: float = 10.0,
    ) -> None:
        self.console, self.total, self.done, self.enabled, self.every_s = console, total, done, enabled, every_s
        self.pace, self.values, self.now, self.last_line = pace, dict[str, float](), "", -math.inf
        self.live = Live(
            get_renderable=self.render, console=console, refresh_per_second=4, auto_refresh=True, transient=False
        )
        self.on_terminal = enabled and console.is_terminal

    def __enter__(self) -> Progress:
        if self.on_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.on_terminal:
            self.live.stop()

    def _words(self) -> tuple[str, list[str]]:
        left = left_text(self.pace.left(self.done) if self.pace and self.done < self.total else None)
        texts = (self.now,) if self.now else (speed_text(self.values), losses_text(self.values))
        return left, [word for text in texts if text for word in text.split("  ")]

    def render(self) -> Text:
        """The live row."""
        left, notes = self._words()
        options = self.console.options
        return bar_line(options.max_width, self.done, self.total, left, notes, ascii_only=options.ascii_only)

    def _line(self, *, due: bool = False) -> None:
        now = time.monotonic()
        if not self.enabled or self.on_terminal or (now - self.last_line < self.every_s and not due):
            return
        self.last_line = now
        left, notes = self._words()
        tell(self.console, "  ".join(w for w in (f"step {self.done}/{self.total}", left, *notes) if w))

    def on_log(self, done: int, values: Mapping[str, float]) -> None:
        """Means since the last values."""
        self.values = dict(values)

    def on_step(self, done: int) -> None:
        """Steps done so far."""
        self.done, self.now = done, ""
        if self.values:
            self._line(due=done == self.total)

    def on_eval_batch(self, done: int, ids: Sequence[str], images: int, total: int) -> None:
        """Images of a validation that are through."""
        self.now = f"validation {min(images, total)}/{total}"
        if images < total:
            self._line()

    def on_eval(self, done: int, result: EvalResult) -> None:
        """One line a validation; the whole table at the end."""
        self.now = ""
        if not self.enabled:
            return
        tell(self.console, f"step {done}  validation on {result.images} images  {scores_text(result.metrics)}")
        if done == self.total:
            self.console.print(result_table(result))


class TimeLeft(Observer):
    """Says how long the run will take, as soon as a kind of step is known well enough.

    Args:
        pace: Estimate of the time left.
        total: Steps of the run.
        say: Told in one line.
    """

    def __init__(self, pace: Pace, total: int, say: Callable[[str], None]) -> None:
        self.pace, self.total, self.say = pace, total, say

    def on_step(self, done: int) -> None:
        """A line, twice in a run at most."""
        if not self.pace.news(done):
            return
        warm = done <= self.pace.warmup < self.total
        left, step_s = self.pace.left(done), self.pace.step_s(warm)
        if left is None or step_s is None:
            return
        more = ", and steps after the warm-up take longer" if warm else ""
        self.say(f"step {done}  {step_time(step_s)} a step: about {duration(left)} left{more}")
        if warning := slow_text(left, done, self.total):
            self.say(warning)


def scores_text(metrics: Mapping[str, float]) -> str:
    """The scores of a validation, each with what no skill scores.

    >>> scores_text({"seg_miou": 0.5, "seg_background_miou": 0.12, "tag_f1": 0.4, "collapsed": 0.0})
    'seg_miou 0.5000 (empty masks 0.1200)  tag_f1 0.4000'
    """
    chance = {score: metrics[base] for score, base in BASELINES.items() if base in metrics}
    words = {"seg_miou": "empty masks", "tag_map": "by chance"}
    return "  ".join(
        f"{k} {v:.4f}" + (f" ({words[k]} {chance[k]:.4f})" if k in chance else "")
        for k, v in metrics.items()
        if k not in ("collapsed", "step", *BASELINES.values())
    )


def result_table(result: EvalResult) -> Table:
    """Per-class values, the means and what no skill scores, in percent."""
    below = [text for text in (result.verdict, f"CRF by {result.crf}" if result.crf else "") if text]
    table = Table(title=f"{result.images} images (percent)", caption=plain("; ".join(below)) if below else None)
    table.add_column("class")
    groups = list(result.classes)
    for group in groups:
        table.add_column(group.replace("_", " "), justify="right")
    for name in dict.fromkeys(c for g in groups for c in result.classes[g]):
        values = [result.classes[g].get(name) for g in groups]
        table.add_row(plain(name), *("-" if v is None or v != v else f"{100 * v:.1f}" for v in values))
    if groups:
        table.add_section()
    else:
        table.add_column("value", justify="right")
    for name, value in result.metrics.items():
        if name != "collapsed":
            table.add_row(name, f"{100 * value:.1f}", *[""] * (len(groups) - 1))
    return table
