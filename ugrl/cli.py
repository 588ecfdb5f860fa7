"""``ugrl``: everything but training and searching.

``prepare`` turns a data set into shards, ``check`` says what looks wrong in one, ``eval`` prints a checkpoint's table
for any split, ``predict`` writes masks for images, ``export`` files for other programs. Nothing heavy is imported
before the words are understood.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from ugrl.command import Parser, check_words, guarded, pasted
from ugrl.config import SCALES
from ugrl.data import cli as prepare_cli
from ugrl.errors import UgrlError
from ugrl.eval_cli import add_arguments as add_eval_arguments
from ugrl.eval_cli import run as run_eval
from ugrl.export import cli as export_cli
from ugrl.predict import cli as predict_cli
from ugrl.view import cli as view_cli

EPILOG = """\
what exists:
  ugrl prepare    images and labels → Parquet shards (coco, voc, folder, shapes)
  ugrl check      tags and masks of a data set held against each other
  ugrl eval       the validation table of a checkpoint, for any split
  ugrl predict    masks, overlays, scores and more for images of any size
  ugrl view       a page of photographs with what a run, or two, makes of them
  ugrl figures    the paper's figures for a run, PNG and PDF
  ugrl export     ONNX, torch.export, a hub folder, transformers
  ugrl-train      one training run: one process, or --workers N on Ray Train
  ugrl-tune       a hyperparameter search on Ray Tune and Optuna

Each takes --help.
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
    parser.add_argument("--scales", type=scale, nargs="+", metavar="S", help="scales of the input to combine")
    parser.add_argument("--mirror", action="store_true", help="combine with the mirror image")
    text = "weigh the classes of all pixels by the classifier's p^G (default: eval.tag_prior)"
    parser.add_argument("--tag-prior", type=float, metavar="G", help=text)
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

    p = commands.add_parser("eval", help="the validation table of a checkpoint, for any split")
    add_eval_arguments(p)
    _checkpoint_options(p)
    p.set_defaults(run=lambda args: run_eval(args, choose))

    p = commands.add_parser("predict", help="masks, overlays, scores and more for images of any size")
    predict_cli.add_arguments(p)
    _checkpoint_options(p)
    p.set_defaults(run=lambda args: predict_cli.run(args, choose))

    p = commands.add_parser("view", help="a page of photographs with what a run, or two, makes of them")
    view_cli.add_arguments(p)
    p.set_defaults(run=view_cli.run_view)

    p = commands.add_parser("figures", help="the paper's figures for a run, PNG and PDF")
    view_cli.add_figures_arguments(p)
    p.set_defaults(run=view_cli.run_figures)

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
