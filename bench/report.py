"""What a run of the benchmark leaves behind: JSON for programs, a table and plots for people."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.measure import Entry, Growth, Skipped

NEEDED = ("torch", "timm", "numpy", "pyarrow", "rich")
OPTIONAL = (
    *("torchvision", "pillow", "triton", "simplejpeg", "opencv-python", "opencv-python-headless"),
    *("PyTurboJPEG", "matplotlib", "ray"),
)


@dataclass(slots=True)
class Report:
    """Everything that a run has shown so far."""

    quick: bool
    threads: int
    device: str
    entries: list[Entry] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    modules: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    machine: dict[str, Any] = field(default_factory=lambda: machine())
    versions: dict[str, str] = field(default_factory=lambda: versions())
    commit: str | None = field(default_factory=lambda: commit())

    def add(self, item: Entry | Growth | Skipped) -> None:
        """Take in what a module yields."""
        if isinstance(item, Entry):
            self.entries.append(item)
        elif isinstance(item, Growth):
            self.growth.append(item)
        else:
            self.skipped.append(item)

    @property
    def missed(self) -> list[str]:
        """Names of the entries whose gates do not hold."""
        return [e.name for e in self.entries if e.holds is False]

    def tree(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "machine": self.machine,
            "versions": self.versions,
            "commit": self.commit,
            "quick": self.quick,
            "threads": self.threads,
            "device": self.device,
            "seconds": round(self.seconds, 1),
            "modules": {name: round(s, 1) for name, s in self.modules.items()},
            "entries": [asdict(e) for e in self.entries],
            "growth": [asdict(g) for g in self.growth],
            "skipped": [asdict(s) for s in self.skipped],
            "failed": self.failed,
        }

    def write(self, path: Path) -> None:
        """Replace the JSON file in one go."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(json.dumps(_finite(self.tree()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(draft, path)


def _finite(x: Any) -> Any:
    """JSON has no infinities."""
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    return [_finite(v) for v in x] if isinstance(x, list | tuple) else x


# --- where it ran -----------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """CPU, cores this process may use, memory, GPU, operating system."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "gpu": _gpu(),
        "os": platform.platform(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(0)
    return {
        "name": p.name,
        "memory_bytes": p.total_memory,
        "capability": f"{p.major}.{p.minor}",
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    """Python, the packages that are needed, and of the others those that are installed."""
    found = {"python": platform.python_version()}
    for name in (*NEEDED, *OPTIONAL):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in NEEDED:
                found[name] = str(getattr(sys.modules.get(name), "__version__", "unknown"))
    return found


def commit() -> str | None:
    """The checkout's commit, with a plus sign where tracked files differ from it; None outside of one."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# --- for people -------------------------------------------------------------------------------------------------


def number(x: float) -> str:
    """Three digits, without an exponent where it is not needed.

    >>> number(0.01234), number(1234.5), number(2.5)
    ('0.0123', '1,234', '2.5')
    """
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(x))))
    text = f"{x:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if digits > 2 or "." in text else text


def quantity(x: float, unit: str) -> str:
    """A value with its unit; times below a tenth of a second in milliseconds.

    >>> quantity(0.0042, "s"), quantity(198.2, "crops/s")
    ('4.2 ms', '198 crops/s')
    """
    return f"{number(1000 * x)} ms" if unit == "s" and x < 0.1 else f"{number(x)} {unit}"


def gates(e: Entry) -> str:
    """The gates of an entry in words."""
    words = []
    if e.gate is not None:
        words.append(f"{e.gate:g}x")
    if e.memory_gate is not None:
        words.append(f"{e.memory_gate:g}x mem")
    if e.limit is not None:
        words.append(f"{'≥' if e.unit.endswith('/s') else '≤'} {quantity(e.limit, e.unit)}")
    return ", ".join(words)


def show(report: Report, console: Console) -> None:
    """Tables of entries, growth and what was skipped."""
    table = Table(title=f"{report.machine['cpu']}, {report.device}, {_threads(report.threads)}")
    for name in ("entry", "ours", "baseline", "ratio (spread)", "memory", "gate", "holds"):
        table.add_column(name, justify="left" if name in ("entry", "gate") else "right", no_wrap=name == "entry")
    for e in report.entries:
        held = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[e.holds]
        spread = f" ({e.spread[0]:.2f}–{e.spread[1]:.2f})" if e.rounds > 1 else ""
        table.add_row(
            e.name,
            quantity(e.ours, e.unit),
            quantity(e.baseline, e.unit),
            f"{e.ratio:.2f}x{spread}",
            "" if e.memory_ratio is None else f"{e.memory_ratio:.1f}x",
            gates(e),
            held,
        )
    if report.entries:
        console.print(table)
    if report.growth:
        console.print(growth_table(report.growth))
    for s in report.skipped:
        console.print(f"skipped {s.name}: {s.why}", markup=False, highlight=False)
    for f in report.failed:
        console.print(f"FAILED {f['name']}: {f['error']}", markup=False, highlight=False)
    times = ", ".join(f"{name} {s:.0f}" for name, s in report.modules.items())
    console.print(f"{report.seconds:.0f} s ({times})", markup=False, highlight=False)


def markdown(report: Report) -> str:
    """The same tables as Markdown."""
    lines = ["| entry | ours | baseline | ratio (spread) | memory | gate | holds |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- | --- |")
    for e in report.entries:
        spread = f" ({e.spread[0]:.2f}–{e.spread[1]:.2f})" if e.rounds > 1 else ""
        memory = "" if e.memory_ratio is None else f"{e.memory_ratio:.1f}×"
        held = {None: "", True: "yes", False: "**no**"}[e.holds]
        cells = (quantity(e.ours, e.unit), quantity(e.baseline, e.unit), f"{e.ratio:.2f}×{spread}", memory)
        lines.append(f"| {e.name} | {' | '.join(cells)} | {gates(e)} | {held} |")
    if report.growth:
        lines += ["", "| growth of | with | first | last | time exponent | memory exponent |"]
        lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
        for g in report.growth:
            ends = [f"{quantity(p[1], 's')} at {p[0]:g}" for p in (g.points[0], g.points[-1])] if g.points else ["", ""]
            exponents = ["" if x is None else f"{x:.2f}" for x in (g.time_exponent, g.memory_exponent)]
            lines.append(f"| {g.name} | {g.x} | {' | '.join((*ends, *exponents))} |")
    words = [f"{report.machine['cpu']}, {report.device}, {_threads(report.threads)}"]
    words += [f"{name} {version}" for name, version in report.versions.items() if name in ("python", "torch")]
    return "\n".join([*lines, "", f"({', '.join(words)}; {report.seconds:.0f} s)", ""])


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def growth_table(growth: Sequence[Growth]) -> Table:
    """One row for each series: its ends and its exponents."""
    table = Table(title="growth: y ~ x^exponent")
    for name in ("series", "x", "first", "last", "time exponent", "memory exponent"):
        table.add_column(name, justify="left" if name in ("series", "x") else "right", no_wrap=name == "series")
    for g in growth:
        ends = [f"{quantity(p[1], 's')} at {p[0]:g}" for p in (g.points[0], g.points[-1])] if g.points else ["", ""]
        exponents = ["" if e is None else f"{e:.2f}" for e in (g.time_exponent, g.memory_exponent)]
        table.add_row(g.name, g.x, *ends, *exponents)
    return table


def plot(report: Report, folder: Path) -> list[Path]:
    """PNG plots of ratios against their gates and of growth; none without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    if report.entries:
        made.append(_ratios(report.entries, folder / "ratios.png"))
    if report.growth:
        made.append(_growth(report.growth, folder / "growth.png"))
    return made


def _ratios(entries: Sequence[Entry], path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.32 * len(entries)), layout="constrained")
    rows = range(len(entries))
    colours = {None: "#8899aa", True: "#2f7d4f", False: "#b5402f"}
    spans = [[e.ratio - e.spread[0] for e in entries], [e.spread[1] - e.ratio for e in entries]]
    axis.barh(rows, [e.ratio for e in entries], color=[colours[e.holds] for e in entries], height=0.6, xerr=spans)
    gated = [(e.gate, k) for k, e in enumerate(entries) if e.gate is not None]
    if gated:
        axis.plot(*zip(*gated, strict=True), "|", color="black", markersize=16, markeredgewidth=2, label="gate")
    remembered = [(e.memory_ratio, k) for k, e in enumerate(entries) if e.memory_ratio]
    if remembered:
        axis.plot(*zip(*remembered, strict=True), "D", color="#3f5fa5", markersize=4, label="memory ratio")
    if gated or remembered:
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
    axis.set_yticks(rows, [e.name for e in entries])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.axvline(1, color="grey", linewidth=0.8)
    _plain(axis.xaxis, [1, 2, 3, 5, 10, 20, 50, 100, 200])
    axis.set_xlabel("times better than the baseline; lines span the rounds")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _plain(axis: Any, ticks: Sequence[float]) -> None:
    """Numbers as they are, at chosen places inside the present limits."""
    from matplotlib.ticker import NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    inside = [t for t in ticks if low <= t <= high]
    axis.set_ticks(inside, [f"{t:g}" for t in inside])
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _decade(axis: Any, values: Sequence[float]) -> None:
    """At least a decade and a half upright, so that what is constant looks it."""
    from matplotlib.ticker import NullFormatter

    low, high = min(values), max(values)
    more = max(1.3, (30 / (high / low)) ** 0.5)
    axis.set_ylim(low / more, high * more)
    axis.yaxis.set_minor_formatter(NullFormatter())


def _growth(growth: Sequence[Growth], path: Path) -> Path:
    from matplotlib import pyplot as plt

    columns = min(3, len(growth))
    lines = -(-len(growth) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.2 * lines), layout="constrained", squeeze=False
    )
    for axis, g in zip(axes.flat, growth, strict=False):
        x = [p[0] for p in g.points]
        axis.loglog(x, [p[1] for p in g.points], "o-", color="#3f5fa5")
        _decade(axis, [p[1] for p in g.points])
        axis.set_ylabel("s", color="#3f5fa5")
        words = [] if g.time_exponent is None else [f"time {g.time_exponent:.2f}"]
        memory = [(p[2] or math.nan) / 1e6 for p in g.points]
        if any(p[2] for p in g.points):
            twin = axis.twinx()
            twin.loglog(x, memory, "s--", color="#b5702f")
            _decade(twin, [m for m in memory if m == m])
            twin.set_ylabel("peak MB", color="#b5702f")
        if g.memory_exponent is not None:
            words.append(f"memory {g.memory_exponent:.2f}")
        axis.set_title(f"{g.name}: {', '.join(words)}", fontsize=9)
        _plain(axis.xaxis, x)  # last: a twin axis sets the shared scale anew
        axis.set_xlabel(g.x)
    for axis in axes.flat[len(growth) :]:
        axis.axis("off")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
