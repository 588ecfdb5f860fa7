"""Every comparison of the project with the plain way of computing the same, in one run.

    python -m bench [--only NAME ...] [--quick] [--json FILE] [--markdown FILE] [--plots DIR] [--threads N]
                    [--device cpu|cuda] [--check]

A NAME is a module (step, contrast, affinity, par, depthwise, backbones, loader, validation, growth, stream, search,
tuning) or the beginning of an entry's name (step/512). The JSON file is rewritten after every entry, so that an
interrupted run keeps what it has. The exit status is 1 where a comparison fails (its two sides differ, or it raises),
and with --check also where a gate is missed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console

from bench.measure import Context, Skip, Skipped, matches, threads
from bench.report import Report, markdown, plot, show

MODULES = {
    "step": "bench.step",
    "contrast": "bench.contrast",
    "affinity": "bench.affinity",
    "par": "bench.par",
    "depthwise": "bench.depthwise",
    "backbones": "bench.backbones",
    "loader": "bench.loader",
    "validation": "bench.validation",
    "growth": "bench.growth",
    "stream": "bench.stream",
    "search": "bench.search",
    "tuning": "bench.search:overhead",
}

#: Seconds of each module with ``--quick``; what one leaves over, or what is not asked for, goes to the next.
QUICK_SECONDS = {
    "step": 115,
    "contrast": 70,
    "affinity": 25,
    "par": 25,
    "depthwise": 10,
    "backbones": 25,
    "loader": 65,
    "validation": 50,
    "growth": 70,
    "stream": 60,
    "search": 35,
    "tuning": 50,
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="modules, or beginnings of entries' names"
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller: ten minutes on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the results")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="where to write the tables as Markdown")
    parser.add_argument("--plots", type=Path, default=Path("bench/out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="inside an operator; default: %(default)s")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a gate is missed")
    args = parser.parse_args(words)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    unknown = [w for w in args.only if w.split("/")[0] not in MODULES]
    if unknown:
        return _refuse(f"--only: no '{unknown[0]}'; there are {', '.join(MODULES)}, and the entries of each")
    if args.threads < 1:
        return _refuse(f"--threads: got {args.threads}, expected at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device: no CUDA device here")

    console = Console(stderr=True)
    report = Report(quick=args.quick, threads=args.threads, device=device)
    stopped = False
    with (
        threads(args.threads),
        tempfile.TemporaryDirectory(prefix="bench-") as tmp,
        console.status("bench") as status,
    ):
        ctx = Context(
            quick=args.quick,
            device=torch.device(device),
            threads=args.threads,
            tmp=Path(tmp),
            log=lambda text: status.update(text),
            only=tuple(args.only),
        )
        try:
            wrong = _run(ctx, report, console, args.json)
        except KeyboardInterrupt:
            wrong, stopped = None, True
    if wrong is not None:
        return _refuse(wrong)
    out = Console(width=None if sys.stdout.isatty() else 120)
    show(report, out)
    if args.json:
        report.write(args.json)
    if args.markdown:
        args.markdown.write_text(markdown(report), encoding="utf-8")
    if find_spec("matplotlib") is None:
        out.print("no plots: matplotlib is not installed")
    else:
        for path in plot(report, args.plots):
            out.print(f"plot {path}", markup=False, highlight=False)
    if stopped:
        return 130
    return 1 if report.failed or (args.check and report.missed) else 0


def _refuse(text: str) -> int:
    print(f"bench: {text}", file=sys.stderr)
    return 2


def _run(ctx: Context, report: Report, console: Console, json: Path | None) -> str | None:
    """Run the modules asked for; returns what is wrong with ``--only``, if anything."""
    chosen = [m for m in MODULES if not ctx.only or any(w.split("/")[0] == m for w in ctx.only)]
    loaded: dict[str, ModuleType | Skipped] = {name: _load(name) for name in chosen}
    for word in ctx.only:
        names = getattr(loaded[word.split("/")[0]], "NAMES", None)
        if names and not any(matches(n, word) for n in names):
            return f"--only: no '{word}'; there are {', '.join(names)}"
    start = time.perf_counter()
    until = start + sum(s for name, s in QUICK_SECONDS.items() if name not in chosen)
    for name in chosen:
        began, before = time.perf_counter(), len(report.entries) + len(report.growth)
        until += QUICK_SECONDS[name]
        module = loaded[name]
        if isinstance(module, Skipped):
            report.add(module)
        else:
            _entries(name, module, replace(ctx, until=until) if ctx.quick else ctx, report, console, json, start)
        report.modules[name] = time.perf_counter() - began
        report.seconds = time.perf_counter() - start
        made = len(report.entries) + len(report.growth) - before
        console.print(f"{name}: {made} results in {report.modules[name]:.0f} s", markup=False, highlight=False)
        if json:
            report.write(json)
        gc.collect()
    words = [w for w in ctx.only if not any(matches(n, w) for n in _seen(report))]
    return f"--only: no '{words[0]}' among the entries of {words[0].split('/')[0]}" if words else None


def _seen(report: Report) -> Iterator[str]:
    yield from (x.name for group in (report.entries, report.growth, report.skipped) for x in group)
    yield from (f["name"] for f in report.failed)


def _load(name: str) -> ModuleType | Skipped:
    path, _, part = MODULES[name].partition(":")
    try:
        module = import_module(path)
        return getattr(module, part) if part else module
    except ImportError as error:
        return Skipped(name, f"cannot be imported: {error}")


def _entries(
    name: str, module: ModuleType, ctx: Context, report: Report, console: Console, json: Path | None, start: float
) -> None:
    """Take in what a module yields, until its time is up."""
    source, last = iter(module.entries(ctx)), name
    try:
        for item in source:
            last = item.name
            if ctx.wants(item.name):
                report.add(item)
                report.seconds = time.perf_counter() - start
                if json:
                    report.write(json)
                if not isinstance(item, Skipped):
                    ratio = getattr(item, "ratio", None)
                    words = f" {ratio:.2f}x" if ratio is not None else ""
                    console.print(f"  {item.name}{words}", markup=False, highlight=False)
            if ctx.left == 0 and not isinstance(item, Skipped):
                rest = [n for n in getattr(module, "NAMES", ()) if n not in set(_seen(report)) and ctx.wants(n)]
                report.skipped += [Skipped(n, "no time left with --quick") for n in rest]
                if rest:
                    break
    except Skip as error:
        report.add(Skipped(name, str(error)))
    except ImportError as error:
        report.add(Skipped(name, f"cannot be imported: {error}"))
    except Exception as error:
        console.print_exception() if console.is_terminal else traceback.print_exc()
        report.failed.append({"name": name, "after": last, "error": f"{type(error).__name__}: {error}"})
    finally:
        if close := getattr(source, "close", None):
            close()


if __name__ == "__main__":
    sys.exit(main())
