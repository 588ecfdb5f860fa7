"""``ugrl``: everything but training and searching.

``prepare`` turns a data set into shards, ``check`` says what looks wrong in one, ``eval`` prints a checkpoint's table
for any split, ``predict`` writes masks for images, ``export`` files for other programs. Nothing heavy is imported
before the words are understood.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ugrl.command import Parser, check_words, folder_for, guarded, pasted
from ugrl.config import SCALES
from ugrl.data import cli as prepare_cli
from ugrl.errors import CheckpointError, DataError, UgrlError
from ugrl.export import cli as export_cli
from ugrl.text import line

EPILOG = """\
what exists:
  ugrl prepare    images and labels → Parquet shards (coco, voc, folder, shapes)
  ugrl check      tags and masks of a data set held against each other
  ugrl eval       the validation table of a checkpoint, for any split
  ugrl predict    palette masks for images of any size
  ugrl export     ONNX, torch.export, a hub folder, transformers
  ugrl-train      one training run: one process, or --workers N on Ray Train
  ugrl-tune       a hyperparameter search on Ray Tune and Optuna

Each takes --help.
"""
EVAL = """\
examples:
  ugrl eval runs/voc --data shards                        the newest checkpoint on split 'val'
  ugrl eval runs/voc --data shards --best --json          the best one, for another program
  ugrl eval runs/voc --data shards --scales 0.75 1 1.25 --mirror --crf
"""
PREDICT = """\
examples:
  ugrl predict runs/voc photos --out masks --best         masks/NAME.png for each photos/NAME.jpg
  ugrl predict runs/voc a.jpg b.png --out masks --scales 0.75 1 1.25 --mirror

The value of a pixel is its class, 0 is background. A mask that `ugrl predict` has written is written anew, any other
file is left alone. An image that cannot be used is named, the others are done, and the status is 2.
"""
# What people type, and what they mean by it.
ELSEWHERE = {"train": "ugrl-train", "tune": "ugrl-tune", "search": "ugrl-tune", "report": "ugrl-tune report"}


def scale(text: str) -> float:
    """A scale of ``--scales``, by the rule of ``eval.seg_scales``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not SCALES["ge"] <= value <= SCALES["le"]:
        raise argparse.ArgumentTypeError(f"{text!r} is no scale; expected {SCALES['ge']:g} … {SCALES['le']:g}")
    return value


def _checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--best", action="store_true", help="the best checkpoint of the run instead of the newest")
    parser.add_argument("--scales", type=scale, nargs="+", metavar="S", help="scales of the input to average")
    parser.add_argument("--mirror", action="store_true", help="average with the mirror image")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``ugrl``."""
    parser = Parser(
        prog="ugrl",
        description="Semantic segmentation learned from image-level labels, guided by uncertainty.",
        epilog=EPILOG,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    p = commands.add_parser("prepare", help="images and labels → Parquet shards")
    prepare_cli.add_arguments(p)
    p.set_defaults(run=prepare_cli.run)

    p = commands.add_parser("check", help="tags and masks of a data set held against each other")
    prepare_cli.add_check_arguments(p)
    p.set_defaults(run=prepare_cli.run_check)

    p = commands.add_parser(
        "eval", help="the validation table of a checkpoint, for any split", description="Measure.", epilog=EVAL
    )
    p.add_argument("checkpoint", help="a run folder or one of its checkpoints/step_…, a path or a URI")
    p.add_argument("--data", required=True, metavar="DIR|URI", help="prepared shards")
    p.add_argument("--split", default="val", help="default: val")
    p.add_argument("--refined-cam", action="store_true", help="also the CAM refined by PAR")
    p.add_argument("--crf", action="store_true", help="also with a dense CRF")
    p.add_argument("--json", action="store_true", help="print JSON instead of the table")
    _checkpoint_options(p)
    p.set_defaults(run=run_eval)

    p = commands.add_parser(
        "predict", help="palette masks for images of any size", description="Write masks.", epilog=PREDICT
    )
    p.add_argument("checkpoint", help="a run folder or one of its checkpoints/step_…, a path or a URI")
    p.add_argument("images", type=Path, nargs="+", help="images, or folders of images")
    p.add_argument("--out", type=folder_for, required=True, metavar="DIR", help="folder for the masks")
    p.add_argument("--crf", action="store_true", help="sharpen with a dense CRF")
    _checkpoint_options(p)
    p.set_defaults(run=run_predict)

    p = commands.add_parser("export", help="files that other programs read: ONNX, torch.export, hub, transformers")
    export_cli.add_arguments(p)
    p.set_defaults(run=lambda args: export_cli.run(args, choose))
    return parser


def choose(where: str, *, best: bool) -> tuple[Path, str]:
    """The checkpoint that a command takes, and what to tell of the choice.

    Raises:
        UgrlError: There is none.
    """
    from ugrl.storage import place
    from ugrl.train import checkpoint

    path = checkpoint.find(where, best=best)
    if (place(where) / "state.json").exists():
        return path, f"checkpoint: {path.name}"
    ranked = checkpoint.ranking(place(where) / "checkpoints")
    marked = ranked[0].checkpoint if ranked else None
    if best:
        return path, f"checkpoint: {path.name}, " + ("the best" if marked else "the newest: none is marked as the best")
    hint = ", and the best" if marked == path.name else f"; --best takes {marked}" if marked else ""
    return path, f"checkpoint: {path.name}, the newest{hint}"


def run_eval(args: argparse.Namespace) -> int:
    """``ugrl eval``."""
    from ugrl.data.progress import Progress
    from ugrl.data.reader import ShardReader
    from ugrl.device import resolve
    from ugrl.storage import place
    from ugrl.terminal import Terminal
    from ugrl.train.build import build_par
    from ugrl.train.measure import measure
    from ugrl.train.progress import result_table
    from ugrl.train.restore import restore

    device = resolve(args.device)
    path, chosen = choose(args.checkpoint, best=args.best)
    reader = ShardReader(args.data, args.split)
    got = restore(path, device=device)
    if reader.manifest.class_names != got.class_names:
        raise CheckpointError(
            f"{place(args.checkpoint)}: trained on {_names(got.class_names)}; {reader.manifest.root} has "
            f"{_names(reader.manifest.class_names)}"
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
    total = min(cfg.eval.limit or len(reader), len(reader))
    Terminal(stderr=True).print(f"{chosen}; split '{args.split}': {total} images", soft_wrap=True)
    with Progress(total=total, what="images") as bar:
        result = measure(got, reader, device=device, cfg=cfg, par=par, on_batch=lambda ids: bar.advance(len(ids)))
    if args.json:
        told = {
            "checkpoint": place(args.checkpoint).public,
            "step": got.step,
            "data": place(args.data).public,
            "split": args.split,
            "images": result.images,
            "metrics": result.metrics,
            "classes": {
                k: {n: v if math.isfinite(v) else None for n, v in c.items()} for k, c in result.classes.items()
            },
        }
        print(json.dumps(told, indent=1))
    else:
        Terminal().print(result_table(result))
    return 0


def _names(names: tuple[str, ...]) -> str:
    shown = ", ".join(line(n, 40) for n in names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} classes ({shown})"


def run_predict(args: argparse.Namespace) -> int:
    """``ugrl predict``."""
    from ugrl.command import complain
    from ugrl.data.progress import Progress
    from ugrl.device import resolve
    from ugrl.eval.predict import find_images, plan_targets, predict
    from ugrl.terminal import Terminal
    from ugrl.train.restore import restore

    targets = plan_targets(find_images(args.images), args.out)
    device = resolve(args.device)
    path, chosen = choose(args.checkpoint, best=args.best)
    got = restore(path, device=device)
    console, broken = Terminal(stderr=True), 0
    console.print(f"{chosen}; {len(targets)} images", soft_wrap=True)

    def skipped(error: DataError) -> None:
        nonlocal broken
        broken += 1
        complain(str(error))
        bar.advance(1)

    with Progress(total=len(targets), what="images") as bar:
        for target, labels in predict(
            got.net,
            targets,
            device=device,
            scales=tuple(args.scales) if args.scales else got.cfg.eval.seg_scales,
            mirror=args.mirror or got.cfg.eval.mirror,
            crf=args.crf,
            on_error=skipped,
        ):
            shown = [got.class_names[v - 1] for v in sorted({*labels.ravel().tolist()} - {0})]
            print(line(f"{target}: {', '.join(shown) or 'background only'}", most=2000))
            bar.advance(1)
    if broken and len(targets) > 1:
        console.print(f"{broken} of {len(targets)} images could not be used")
    return 2 if broken else 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``ugrl``."""
    words = sys.argv[1:] if argv is None else argv

    def body() -> int:
        if words and words[0] in ELSEWHERE:
            command, _ = pasted([*ELSEWHERE[words[0]].split(), *words[1:]])
            raise UgrlError(f"ugrl {words[0]} is a command of its own: {command}")
        check_words(words)
        parser = build_parser()
        args: Any = parser.parse_args(words)
        if args.command is None:
            parser.print_help()
            return 0
        return int(args.run(args))

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
