"""``ugrl``: everything but training and searching.

``prepare`` turns a data set into shards, ``eval`` prints a checkpoint's table for any split,
``predict`` writes masks for images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from ugrl import __version__
from ugrl.data import cli as prepare_cli
from ugrl.data.reader import ShardReader
from ugrl.errors import CheckpointError, UgrlError
from ugrl.eval.predict import find_images, predict
from ugrl.method.build import build_par
from ugrl.train.measure import measure
from ugrl.train.progress import result_table
from ugrl.train.restore import restore

EPILOG = """\
what exists:
  ugrl prepare    images and labels → Parquet shards (coco, voc, folder, shapes)
  ugrl eval       the validation table of a checkpoint, for any split
  ugrl predict    palette masks for images of any size
  ugrl-train      one training run: one process, or --workers N on Ray Train
  ugrl-tune       a hyperparameter search on Ray Tune and Optuna

Each takes --help.
"""


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--best", action="store_true", help="the best checkpoint of the run instead of the newest")
    parser.add_argument("--scales", type=float, nargs="+", metavar="S", help="scales of the input to average")
    parser.add_argument("--mirror", action="store_true", help="average with the mirror image")
    parser.add_argument("--crf", action="store_true", help="also with a dense CRF")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``ugrl``."""
    parser = argparse.ArgumentParser(
        prog="ugrl",
        description="Semantic segmentation learned from image-level labels, guided by uncertainty.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ugrl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    p = commands.add_parser("prepare", help="images and labels → Parquet shards")
    prepare_cli.add_arguments(p)
    p.set_defaults(run=prepare_cli.run)

    p = commands.add_parser("check", help="tags and masks of a data set held against each other")
    prepare_cli.add_check_arguments(p)
    p.set_defaults(run=prepare_cli.run_check)

    p = commands.add_parser("eval", help="the validation table of a checkpoint, for any split")
    p.add_argument("checkpoint", help="a run folder or one of its checkpoints/step_…, a path or a URI")
    p.add_argument("--data", required=True, help="prepared shards, a path or a URI")
    p.add_argument("--split", default="val", help="default: val")
    p.add_argument("--refined-cam", action="store_true", help="also the CAM refined by PAR")
    _eval_options(p)
    p.set_defaults(run=run_eval)

    p = commands.add_parser("predict", help="palette masks for images of any size")
    p.add_argument("checkpoint", help="a run folder or one of its checkpoints/step_…, a path or a URI")
    p.add_argument("images", type=Path, nargs="+", help="images, or folders of images")
    p.add_argument("--out", type=Path, required=True, help="folder for the masks")
    _eval_options(p)
    p.set_defaults(run=run_predict)
    return parser


def run_eval(args: argparse.Namespace) -> int:
    """``ugrl eval``."""
    device = _device(args.device)
    got = restore(args.checkpoint, device=device, best=args.best)
    reader = ShardReader(args.data, args.split)
    if reader.manifest.class_names != got.class_names:
        raise CheckpointError(
            f"{args.checkpoint}: trained on {len(got.class_names)} classes ({', '.join(got.class_names[:3])}, …); "
            f"{args.data} has {len(reader.manifest.class_names)} ({', '.join(reader.manifest.class_names[:3])}, …)"
        )
    cfg = replace(
        got.cfg,
        eval=replace(
            got.cfg.eval,
            refined_cam=args.refined_cam or got.cfg.eval.refined_cam,
            seg_scales=tuple(args.scales) if args.scales else got.cfg.eval.seg_scales,
            mirror=args.mirror or got.cfg.eval.mirror,
            crf=args.crf or got.cfg.eval.crf,
        ),
    )
    par = build_par(replace(cfg, method=replace(cfg.method, cam=replace(cfg.method.cam, refine="par"))))
    console = Console()
    console.print(f"step {got.step}, split '{args.split}': {len(reader)} images")
    result = measure(got, reader, device=device, cfg=cfg, par=par)
    console.print(result_table(result))
    return 0


def run_predict(args: argparse.Namespace) -> int:
    """``ugrl predict``."""
    device = _device(args.device)
    images = find_images(args.images)
    got = restore(args.checkpoint, device=device, best=args.best)
    scales = tuple(args.scales) if args.scales else got.cfg.eval.seg_scales
    console = Console(stderr=True)
    written = predict(
        got.net,
        images,
        args.out,
        device=device,
        scales=scales,
        mirror=args.mirror or got.cfg.eval.mirror,
        crf=args.crf,
    )
    for target, labels in track(written, total=len(images), description="predict", console=console):
        shown = sorted({int(v) for v in labels.flatten()} - {0})
        names = ", ".join(got.class_names[v - 1] for v in shown) or "background only"
        print(f"{target}: {names}")
    return 0


def guarded(run: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a command: bad input is one line and status 2, an interrupt is status 130."""
    try:
        return run()
    except UgrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def enter(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    run: Callable[[argparse.Namespace, Console], int],
    interrupted: str,
) -> int:
    """The main of a command that takes ``section.key=value`` among its options; a bare run prints the help."""
    words = sys.argv[1:] if argv is None else argv
    if not words:
        parser.print_help()
        return 0
    args = parser.parse_intermixed_args(words)
    return guarded(lambda: run(args, Console(stderr=True)), interrupted)


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``ugrl``."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    return guarded(lambda: int(args.run(args)))


if __name__ == "__main__":
    sys.exit(main())
