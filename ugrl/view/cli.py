"""``ugrl view`` and ``ugrl figures``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ugrl.command import folder_for
from ugrl.errors import ConfigError
from ugrl.eval import PALETTES
from ugrl.text import line

if TYPE_CHECKING:
    import torch

    from ugrl.data.reader import ShardReader
    from ugrl.view.collect import Run
    from ugrl.view.page import Page

VIEW = """\
examples:
  ugrl view runs/voc --data shards                          all of split 'val' as view.html
  ugrl view runs/a runs/b --data shards --out ab.html       two runs side by side
  ugrl view runs/voc --data shards --split train --limit 300 --serve

The page needs no network. Its pictures are in it, or in a folder beside it where they have more than --embed megabytes.
"""
FIGURES = """\
examples:
  ugrl figures runs/voc --data shards --out figures         cam, masks, prototypes, scatter, risk: PNG and PDF
  ugrl figures runs/a runs/b --data shards --out figures    the CAMs and masks of two runs side by side
"""
# Photographs of a page or a figure, where nothing else is said.
MOST = 2000
OF_FIGURES = 500
# Longest side of a picture, by how many there are: a page of 2,000 photographs is to open on a phone.
SIZES = ((60, 480), (300, 320), (900, 224))
SMALLEST = 176


def _whole(least: int, most: int):  # type: ignore[no-untyped-def]
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{line(text, 40)!r} is not in {least} … {most}")
        return value

    return read


def _common(p: argparse.ArgumentParser, limit: int) -> None:
    p.add_argument("checkpoint", metavar="run", help="a run folder or one of its checkpoints/step_…, a path or a URI")
    p.add_argument("other", nargs="?", help="another run of the same classes, beside it")
    p.add_argument("--data", required=True, metavar="DIR|URI", help="prepared shards")
    p.add_argument("--split", default="val", help="default: val")
    p.add_argument("--best", action="store_true", help="the best checkpoint of each run instead of the newest")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    p.add_argument(
        "--limit", type=_whole(1, 10**9), default=limit, metavar="N", help=f"photographs at most (default: {limit})"
    )
    p.add_argument("--palette", choices=PALETTES, default="safe", help="colours; safe, tol: for everybody's eyes")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Options of ``ugrl view``."""
    p.description, p.epilog = "Photographs with what a run makes of them, as one page.", VIEW + (p.epilog or "")
    _common(p, MOST)
    p.add_argument("--out", type=Path, metavar="PAGE", help="the page (default: view.html, and with --serve no file)")
    p.add_argument("--size", type=_whole(32, 2000), metavar="PX", help="longest side of a picture (default: by number)")
    p.add_argument(
        "--embed", type=_whole(0, 4000), default=60, metavar="MB", help="most that the page itself holds (default: 60)"
    )
    p.add_argument("--serve", action="store_true", help="show it on 127.0.0.1 until Ctrl-C")
    p.add_argument("--port", type=_whole(0, 65535), default=0, metavar="N", help="of --serve (default: any)")


def add_figures_arguments(p: argparse.ArgumentParser) -> None:
    """Options of ``ugrl figures``."""
    p.description, p.epilog = "The paper's figures for a run of one's own.", FIGURES + (p.epilog or "")
    _common(p, OF_FIGURES)
    p.add_argument("--out", type=folder_for, required=True, metavar="DIR", help="folder for the figures")
    p.add_argument(
        "--images", type=_whole(1, 24), default=6, metavar="N", help="photographs in cam and masks (default: 6)"
    )


def _opened(args: argparse.Namespace) -> tuple[list[Run], ShardReader, list[int]]:
    """Runs, split and positions that a command is about."""
    from ugrl.device import resolve
    from ugrl.terminal import Terminal
    from ugrl.view.collect import check_classes, open_run, open_split

    device: torch.device = resolve(args.device)
    reader = open_split(args.data, args.split)
    runs = [
        open_run(where, best=args.best, device=device) for where in (args.checkpoint, args.other) if where is not None
    ]
    check_classes(runs, reader.manifest)
    indices = list(range(min(args.limit, len(reader))))
    which = "; ".join(f"{run.name}: {run.checkpoint}" for run in runs)
    few = f"the first {len(indices)} of {len(reader)} images (--limit)" if len(indices) < len(reader) else ""
    Terminal(stderr=True).print(f"{which}; split '{args.split}': {few or f'{len(indices)} images'}", soft_wrap=True)
    return runs, reader, indices


def run_view(args: argparse.Namespace) -> int:
    """``ugrl view``."""
    from ugrl.data.progress import Progress
    from ugrl.view.page import build, check_target, folder_of, gather, write

    out: Path | None = args.out or (None if args.serve else Path("view.html"))
    if args.port and not args.serve:
        raise ConfigError("--port is of --serve; give both, or neither")
    if out is not None:
        check_target(out)
    runs, reader, indices = _opened(args)
    size = args.size or next((px for most, px in SIZES if len(indices) <= most), SMALLEST)
    with Progress(total=len(indices) * len(runs), what="images") as bar:
        album = gather(runs, reader, indices, size=size, palette=args.palette, on_batch=bar.advance)
    page = build(album, out.name if out else "view.html", embed=args.embed * 10**6)
    if out is not None:
        write(page, out)
        apart = len(page.files) - 1
        beside = f", with {apart} pictures in {line(out.parent / folder_of(out.name))}" if apart else ""
        print(f"{line(out)}: {len(indices)} photographs, {page.size / 1e6:.1f} MB{beside}", flush=True)
    if args.serve:
        _serve(page, args.port)
    return 0


def _serve(page: Page, port: int) -> None:
    from contextlib import suppress

    from ugrl.view.serve import Server

    with Server(page, port) as server:
        print(f"{server.url} (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):  # how this is ended
            server.serve_forever()


def run_figures(args: argparse.Namespace) -> int:
    """``ugrl figures``."""
    from ugrl.command import complain
    from ugrl.data.progress import Progress
    from ugrl.view.figures import collect, draw

    runs, reader, indices = _opened(args)
    with Progress(total=len(indices) * len(runs), what="images") as bar:
        found = collect(runs, reader, indices, images=args.images, on_batch=bar.advance)
    drawn, notes = draw(found, args.out, palette=args.palette)
    for name in drawn:
        print(f"{line(args.out / name)}.png, .pdf")
    for note in notes:
        complain(note, word="not drawn: ")
    return 0
