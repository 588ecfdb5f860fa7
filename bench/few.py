"""A devkit of a few photographs out of a larger one: so many of each class to train on, all validation photographs.

    python -m bench.few --out DIR [--voc DEVKIT] [--classes aeroplane bird boat cat sheep train] [--each 10]
    python -m bench.real --voc DIR --config own --arms bench/few.yaml --out runs/few

Only photographs that show nothing but these classes take part. The folders are links into the larger devkit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from bench.real import DEVKIT
from ugrl.command import enter, folder_for
from ugrl.data.voc import VocSource
from ugrl.errors import ConfigError
from ugrl.files import write_whole
from ugrl.text import line, nearest

CLASSES = ("aeroplane", "bird", "boat", "cat", "sheep", "train")


def chosen(source: VocSource, classes: list[str], each: int) -> dict[str, list[str]]:
    """Ids of both splits; of train the first ones of each class, class by class.

    Raises:
        ConfigError: No such class, or too few photographs of one.
    """
    for name in classes:
        if name not in source.class_names:
            raise ConfigError(f"--classes: no '{line(name, 40)}'{nearest(name, source.class_names)}")
    wanted = {source.class_names.index(name) + 1: name for name in classes}
    alone = {
        split: {id: tags for id in ids if set(tags := source.tags(split, id) or ()) <= wanted.keys() and tags}
        for split, ids in source.splits().items()
    }
    train: list[str] = []
    for label, name in wanted.items():
        found = [id for id, tags in alone["train"].items() if label in tags and id not in train][:each]
        if len(found) < each:
            raise ConfigError(f"--each is {each}: {len(found)} more photographs of {name} alone, or with the others")
        train += found
    return {"train": train, "val": list(alone["val"])}


def main(words: list[str] | None = None) -> int:
    """0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.few", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--voc", type=Path, default=DEVKIT, metavar="DEVKIT", help="default: %(default)s")
    parser.add_argument("--out", type=folder_for, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), metavar="NAME", help=" ".join(CLASSES))
    parser.add_argument("--each", type=int, default=10, metavar="N", help="training photographs a class; default: 10")

    def body(args: argparse.Namespace, console: Console) -> int:
        source = VocSource(args.voc)
        lists = chosen(source, list(dict.fromkeys(args.classes)), args.each)
        root = args.out / "VOC2012"
        if root.exists():
            raise ConfigError(f"{line(root)}: is there already; choose another --out")
        (root / "ImageSets" / "Segmentation").mkdir(parents=True)
        for folder in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationClassAug"):
            if (source.root / folder).is_dir():
                (root / folder).symlink_to((source.root / folder).absolute(), target_is_directory=True)
        for split, ids in lists.items():
            write_whole(root / "ImageSets" / "Segmentation" / f"{split}.txt", "\n".join(ids) + "\n")
        print(f"{len(lists['train'])} photographs to train on, {len(lists['val'])} to judge by: {args.out}")
        return 0

    return enter(parser, sys.argv[1:] if words is None else words, body, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
