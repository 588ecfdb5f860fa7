"""``ugrl prepare``: a source becomes a folder of shards. ``ugrl check``: what a source or such a folder holds."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ugrl.command import folder_for
from ugrl.data.source import SOURCES, RowError, Source, open_source
from ugrl.errors import ConfigError, DataError
from ugrl.text import brief, line, plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ugrl.data.census import Inventory
    from ugrl.data.shards import Manifest

# Option → the source it belongs to.
_OWN = {
    "keep_unannotated": "coco",
    "year": "coco",
    "masks": "coco",
    "labels": "voc",
    "train_list": "voc",
    "train": "shapes",
    "val": "shapes",
    "size": "shapes",
    "difficulty": "shapes",
}

EXAMPLES = """\
examples:
  ugrl prepare folder --root photos --out shards --on-error skip     photos/images, photos/tags.csv, photos/masks
  ugrl prepare voc --root VOCdevkit/VOC2012 --out shards
  ugrl prepare coco --root coco --out shards
  ugrl prepare coco --root coco --out shards --masks smallest-on-top   as several papers measure
  ugrl prepare shapes --out shards --train 1200 --val 200            generated images
  ugrl prepare voc --root VOCdevkit --out shards --teacher sam3      beside each image the mask sam3/ID.png
  ugrl prepare --verify shards                                       are its files whole?
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ugrl prepare``."""
    parser.description = "Write a data set to Parquet shards: resumable, checked, in bounded memory."
    parser.epilog = EXAMPLES + (parser.epilog or "")
    parser.add_argument("source", metavar="SOURCE", nargs="?", help=f"one of {', '.join(SOURCES)}")
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder of the data set (not for shapes)")
    parser.add_argument("--out", type=folder_for, metavar="DIR", help="folder to write; it must not exist")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="check a prepared folder's checksums and stop")
    parser.add_argument(
        "--tune-val",
        type=_share,
        default=0.1,
        metavar="SHARE",
        help="share (below 1) or number of training images held out for searches; 0 for none (default 0.1)",
    )
    parser.add_argument("--shard-rows", type=int, default=512, metavar="N", help="images a shard (default 512)")
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="stop at an unusable image, or leave it out and count it (default raise)",
    )
    parser.add_argument(
        "--teacher", type=Path, metavar="DIR", help="masks of another method, DIR/ID.png, that training may learn from"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the held-out choice, and of shapes (default 0)")
    coco = parser.add_argument_group("coco")
    coco.add_argument("--year", type=int, choices=(2014, 2017), help="layout (default: the one that is there)")
    coco.add_argument("--keep-unannotated", action="store_const", const=True, help="keep images without any annotation")
    coco.add_argument(
        "--masks",
        choices=("file-order", "smallest-on-top"),
        help="objects in file order and crowds ignored, or the smallest object on top and crowds of their class "
        "(default file-order); beside --verify: what the folder must have been painted by",
    )
    voc = parser.add_argument_group("voc")
    voc.add_argument("--labels", choices=("xml", "mask"), help="where image tags come from (default xml)")
    voc.add_argument("--train-list", metavar="NAME", help="split list used as train (default train_aug, else train)")
    shapes = parser.add_argument_group("shapes")
    shapes.add_argument("--train", type=int, metavar="N", help="training images (default 1200)")
    shapes.add_argument("--val", type=int, metavar="N", help="validation images (default 200)")
    shapes.add_argument("--size", type=int, metavar="PX", help="side (default 64)")
    shapes.add_argument("--difficulty", type=float, metavar="X", help="0 clear … 1 hard (default 0.5)")


def run(args: argparse.Namespace) -> int:
    """Run ``ugrl prepare``.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: Arguments that do not go together.
        DataError: Bad input, see :func:`ugrl.data.prepare.prepare`.
    """
    from ugrl.data.mask_folder import TaughtSource
    from ugrl.data.prepare import inventory_of, prepare, target
    from ugrl.data.shards import verify
    from ugrl.terminal import Terminal

    console = Terminal()
    if args.verify is not None:
        if args.source or args.out or args.teacher:
            raise ConfigError("--verify stands alone; expected no SOURCE, --out or --teacher beside it")
        manifest = verify(args.verify)
        if args.masks is not None and (have := manifest.options.get("masks", "file-order")) != args.masks:
            raise DataError(
                f"{line(args.verify)}: masks painted by {brief(have)}; expected {args.masks}: prepare again"
            )
        console.print(summary(manifest))
        return 0
    if not args.source:
        raise ConfigError(f"no SOURCE; expected one of {', '.join(SOURCES)}")
    if args.out is None:
        raise ConfigError("no --out; expected the folder to write")
    options = source_options(args)
    target(args.out, args.root)
    source = open_source(args.source, args.root, **options)
    if args.teacher is not None:
        source = TaughtSource(source, args.teacher)
    manifest = prepare(
        source,
        args.out,
        tune_val=args.tune_val,
        shard_rows=args.shard_rows,
        on_error=args.on_error,
        seed=args.seed,
        progress=True,
    )
    sys.stderr.flush()
    console.print(summary(manifest))
    show(inventory_of(manifest), console)
    return 0


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ugrl check``."""
    parser.description = "Hold tags and masks of a data set against each other, and say what looks wrong."
    parser.epilog = "examples:\n  ugrl check shards\n  ugrl check photos\n" + (parser.epilog or "")
    parser.add_argument("data", metavar="DATA", help="a prepared folder (a path or a URI), or the root of a data set")


def run_check(args: argparse.Namespace) -> int:
    """Run ``ugrl check``.

    Returns:
        The exit status, 0.

    Raises:
        DataError: Nothing that is known lies there, or it cannot be read.
    """
    from ugrl.data.prepare import inventory_of
    from ugrl.data.shards import MANIFEST, Manifest, partial_of
    from ugrl.storage import place
    from ugrl.terminal import Terminal

    console = Terminal()
    root = Path(args.data)
    if place(args.data).local is None or os.path.lexists(root / MANIFEST) or os.path.isdir(partial_of(root.absolute())):
        manifest = Manifest.load(args.data)
        console.print(summary(manifest))
        show(inventory_of(manifest, progress=True), console)
        return 0
    source = open_source(layout(root), root)
    inventory, unusable = _count(source)
    for split, errors in unusable.items():
        console.print(plain(f"{split}: {len(errors)} images cannot be used, the first: {errors[0]}"), soft_wrap=True)
    show(inventory, console)
    return 0


def layout(root: Path) -> str:
    """The source whose files lie in a folder."""
    from ugrl.data.shards import MANIFEST

    if not os.path.isdir(root):
        raise DataError(f"{line(root)}: no such folder; expected prepared shards, or the root of a data set")
    if os.path.lexists(root / "tags.csv"):
        return "folder"
    if any(
        os.path.isdir(root / below / "ImageSets" / "Segmentation") for below in ("", "VOC2012", "VOCdevkit/VOC2012")
    ):
        return "voc"
    if next((root / "annotations").glob("instances_*.json"), None) is not None:
        return "coco"
    raise DataError(
        f"{line(root)}: neither prepared shards ({MANIFEST}) nor the root of a data set (tags.csv, "
        "ImageSets/Segmentation or annotations/instances_*.json)"
    )


def _count(source: Source) -> tuple[Inventory, dict[str, list[str]]]:
    """The census of a source, and why its unusable rows are."""
    from ugrl.data.census import Census, Inventory
    from ugrl.data.progress import Progress

    splits = source.splits()
    inventory = Inventory(tuple(source.class_names), {}, getattr(source, "stray", {}))
    unusable: dict[str, list[str]] = {}
    with Progress(total=sum(len(ids) for ids in splits.values()), what="images") as bar:
        for split, ids in splits.items():
            inventory.splits[split] = census = Census(len(source.class_names))
            for id in ids:
                try:
                    census.add(source.row(split, id))
                except RowError as error:
                    unusable.setdefault(split, []).append(str(error))
                bar.advance(1)
    return inventory, unusable


def show(inventory: Inventory, console: Console) -> None:
    """Print what a data set holds, and what looks wrong."""
    console.print(inventory.table())
    for text in inventory.notes():
        console.print(plain(text), soft_wrap=True)
    for text in inventory.warnings():
        console.print(plain(f"warning: {text}", style="yellow"), soft_wrap=True)


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that belong to the chosen source, those left alone omitted.

    Raises:
        ConfigError: An option of another source, or a root for a generated one.
    """
    options: dict[str, Any] = {}
    for key, owner in _OWN.items():
        value = getattr(args, key)
        if value is None:
            continue
        if owner != args.source:
            flag = "--" + key.replace("_", "-")
            raise ConfigError(f"{flag} belongs to source {owner}; expected none of it for {args.source}")
        options[key] = value
    if args.source == "shapes":
        if args.root is not None:
            raise ConfigError(f"--root {args.root} with source shapes, which is generated; expected none")
        options["seed"] = args.seed
    return options


def _share(text: str) -> float | int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share nor a number of images")
    return int(value) if value >= 1 and value.is_integer() else value


def summary(manifest: Manifest) -> Table:
    """Splits, rows, masks, what was left out, shards and size."""
    from rich.table import Table

    from ugrl.data.shards import TEACHER_VERSION

    how = f", masks {line(manifest.options['masks'])}" if "masks" in manifest.options else ""
    table = Table(title=plain(f"{manifest.root}: {manifest.source}, {manifest.num_classes} classes{how}"))
    table.add_column("split")
    taught = manifest.schema_version == TEACHER_VERSION
    for column in ("rows", "with masks", *(["teacher masks"] if taught else []), "left out", "shards", "MB"):
        table.add_column(column, justify="right")
    for name, info in manifest.splits.items():
        left_out = ", ".join(f"{n} {reason}" for reason, n in sorted(info.left_out.items())) or "0"
        size = sum(s.bytes for s in info.shards) / 1e6
        table.add_row(
            plain(name),
            str(info.rows),
            str(info.with_masks),
            *([str(info.with_teachers)] if taught else []),
            plain(left_out),
            str(len(info.shards)),
            f"{size:.1f}",
        )
    return table
