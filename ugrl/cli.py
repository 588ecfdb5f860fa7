"""``ugrl``: everything but training and searching.

``prepare`` turns a data set into shards, ``check`` says what looks wrong in one, ``eval`` prints a checkpoint's table
for any split, ``predict`` writes masks for images. Nothing heavy is imported before the words are understood.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ugrl import checkpoint_cli
from ugrl.command import Parser, check_words, guarded, pasted
from ugrl.data import cli as prepare_cli
from ugrl.errors import UgrlError

EPILOG = """\
what exists:
  ugrl prepare    images and labels → Parquet shards (coco, voc, folder, shapes)
  ugrl check      tags and masks of a data set held against each other
  ugrl eval       the validation table of a checkpoint, for any split
  ugrl predict    palette masks for images of any size
  ugrl-train      one training run: one process, or --workers N on Ray Train
  ugrl-tune       a hyperparameter search on Ray Tune and Optuna

Each takes --help.
"""
# What people type, and what they mean by it.
ELSEWHERE = {"train": "ugrl-train", "tune": "ugrl-tune", "search": "ugrl-tune", "report": "ugrl-tune report"}


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
    checkpoint_cli.add_eval_arguments(p)
    p.set_defaults(run=checkpoint_cli.run_eval)

    p = commands.add_parser("predict", help="palette masks for images of any size")
    checkpoint_cli.add_predict_arguments(p)
    p.set_defaults(run=checkpoint_cli.run_predict)
    return parser


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
