"""``ugrl eval``: a checkpoint measured on any split or list, by any protocol."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ugrl import config as config_mod
from ugrl.command import folder_for
from ugrl.config import Config, EvalConfig
from ugrl.errors import CheckpointError, ConfigError, DataError
from ugrl.eval.protocol import PROTOCOLS, choose
from ugrl.text import line

if TYPE_CHECKING:
    import numpy as np

    from ugrl.data.reader import ShardReader
    from ugrl.data.shards import Manifest
    from ugrl.eval.evaluate import EvalResult
    from ugrl.eval.thresholds import Threshold
    from ugrl.terminal import Terminal
    from ugrl.train.restore import Restored

WHAT = ("seg", "cam", "refined")
EXAMPLES = """\
examples:
  ugrl eval runs/voc --data shards                        the newest checkpoint on split 'val'
  ugrl eval runs/voc --data shards --best --json          the best one, for another program
  ugrl eval runs/voc --data shards --protocol toco        several scales and a CRF, as ToCo measures
  ugrl eval runs/voc --data shards --what cam refined     the CAM at the threshold that is best on 'train'
  ugrl eval runs/voc --data shards --what refined --list train.txt --out labels
  ugrl eval runs/voc --data shards --scales 0.75 1 1.25 --mirror --crf --set eval.crf_bi_w=5
"""


def threshold(text: str) -> float:
    """A threshold of ``--threshold``, by the rule of ``eval.cam_background``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no threshold; expected a number between 0 and 1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ugrl eval``, but for those of every command that takes a checkpoint."""
    parser.description, parser.epilog = "Measure.", EXAMPLES + (parser.epilog or "")
    parser.add_argument("checkpoint", help="a run folder or one of its checkpoints/step_…, a path or a URI")
    parser.add_argument("--data", required=True, metavar="DIR|URI", help="prepared shards")
    parser.add_argument("--split", help="default: val")
    parser.add_argument("--list", type=Path, metavar="FILE", help="the images that a text file names, one id a line")
    parser.add_argument(
        "--what", nargs="+", choices=WHAT, help="segmentation, CAM, CAM refined by PAR (default: what the run measures)"
    )
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), help="sizes, scales and CRF as others measure")
    parser.add_argument("--crf", action="store_true", help="also with a dense CRF")
    parser.add_argument("--refined-cam", action="store_true", help="also the CAM refined by PAR")
    parser.add_argument("--threshold", type=threshold, metavar="T", help="background threshold of the CAM")
    parser.add_argument(
        "--threshold-from",
        metavar="SPLIT|FILE",
        help="search it on a split, or on the images of a list (default with --what cam or refined: train)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="eval.KEY=VALUE",
        dest="overrides",
        help="any other key of the section eval",
    )
    parser.add_argument("--out", type=folder_for, metavar="DIR", help="also write the labels: DIR/cam/ID.png, …")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def how_to_measure(cfg: Config, args: argparse.Namespace) -> tuple[EvalConfig, list[str]]:
    """The options of ``eval`` that a command asks for, and what to tell of them.

    Raises:
        ConfigError: ``--set`` names no key of ``eval``, or a value that it cannot have.
    """
    found = config_mod.parse_overrides(args.overrides)
    if wrong := [key for key in found if not key.startswith("eval.")]:
        raise ConfigError(f"--set {line(wrong[0], 80)}: expected a key of the section eval, such as eval.crf_bi_w=5")
    built = config_mod.build(config_mod.override({}, found)).eval
    given = {key.removeprefix("eval."): getattr(built, key.removeprefix("eval.")) for key in found}
    if args.scales:
        given["seg_scales"] = tuple(args.scales)
    given |= {key: True for key in ("mirror", "crf") if getattr(args, key)}
    return choose(cfg.eval, args.protocol, given)


def check_together(args: argparse.Namespace) -> None:
    """Refuse options that do not go together; ``--split`` gets its default.

    Raises:
        ConfigError: One of them would do nothing.
    """
    if args.threshold is not None and args.threshold_from is not None:
        raise ConfigError("--threshold and --threshold-from; expected one of the two")
    if args.list is not None and args.split is not None:
        raise ConfigError("--list and --split; expected one of the two: a list names images of any split")
    args.split = args.split or "val"
    what = " ".join(args.what or WHAT)
    if args.what and "seg" not in args.what:
        for option in ("crf", "scales", "mirror"):
            if getattr(args, option):
                instead = "--set eval.cam_scales=[1,2]" if option == "scales" else "--what seg beside it"
                raise ConfigError(f"--{option} is for the segmentation, which --what {what} leaves out; try {instead}")
    if args.what == ["seg"] and not args.refined_cam:
        for option in ("threshold", "threshold_from"):
            if getattr(args, option) is not None:
                name = option.replace("_", "-")
                raise ConfigError(
                    f"--{name} is for the CAM, which --what seg leaves out; expected cam or refined beside it"
                )


@dataclass
class Measured:
    """What an evaluation was, and what it gave."""

    got: Restored
    reader: ShardReader
    cfg: Config
    result: EvalResult
    thresholds: dict[str, Threshold] = field(default_factory=dict)
    searched_on: str = ""


def run(args: argparse.Namespace, choose_checkpoint: Callable[..., tuple[Path, str]]) -> int:
    """``ugrl eval``.

    Args:
        args: Of the command.
        choose_checkpoint: Finds the checkpoint, and says which one it is.

    Raises:
        UgrlError: It cannot be measured.
    """
    from ugrl.data.reader import ShardReader
    from ugrl.data.shards import Manifest
    from ugrl.device import resolve
    from ugrl.storage import place
    from ugrl.terminal import Terminal
    from ugrl.train.progress import result_table
    from ugrl.train.restore import restore

    check_together(args)
    device = resolve(args.device)
    path, chosen = choose_checkpoint(args.checkpoint, best=args.best)
    manifest = Manifest.load(args.data)
    reader = ShardReader(manifest, args.split) if args.list is None else _listed(manifest, args.list)
    got = restore(path, device=device)
    if manifest.class_names != got.class_names:
        raise CheckpointError(
            f"{place(args.checkpoint)}: trained on {_names(got.class_names)}; {manifest.root} has "
            f"{_names(manifest.class_names)}"
        )
    how, told = how_to_measure(got.cfg, args)
    console = Terminal(stderr=True)
    total = min(how.limit or len(reader), len(reader))
    for text in [f"{chosen}; {_where(args)}: {total} images", *told]:
        console.print(text, soft_wrap=True, markup=False, highlight=False)
    found = _measure(args, got, reader, how, console, device)
    if args.json:
        print(json.dumps(_told(args, found), indent=1))
    else:
        Terminal().print(result_table(found.result))
    return 0


def _where(args: argparse.Namespace) -> str:
    return f"split '{args.split}'" if args.list is None else f"list {line(args.list)}"


def _listed(manifest: Manifest, path: Path) -> ShardReader:
    from ugrl.data.listed import ListReader

    return ListReader(manifest, path)


def _measure(
    args: argparse.Namespace, got: Restored, reader: ShardReader, how: EvalConfig, console: Terminal, device: Any
) -> Measured:
    """Search the thresholds where that is asked for, then measure."""
    from ugrl.data.progress import Progress
    from ugrl.eval.thresholds import search_thresholds
    from ugrl.train.build import build_par
    from ugrl.train.measure import measure

    what = set(args.what or ()) | ({"refined"} if args.what and args.refined_cam else set())
    if what:
        how = replace(how, cam=bool(what & {"cam", "refined"}), refined_cam="refined" in what)
    searched = args.threshold is not None or args.threshold_from is not None
    how = replace(how, refined_cam=how.refined_cam or args.refined_cam)
    how = replace(how, cam=how.cam or args.refined_cam or searched)  # which the run may have switched off
    cfg = replace(got.cfg, eval=how)
    par = build_par(replace(cfg, method=replace(cfg.method, cam=replace(cfg.method.cam, refine="par"))))
    thresholds: dict[str, Threshold] = {}
    on = ""
    if args.threshold is not None:
        how = replace(how, cam_background=args.threshold, refined_background=None)
    elif args.threshold_from is not None or what & {"cam", "refined"}:
        source, on = _threshold_images(args, got.cfg, reader.manifest)
        rows = min(how.limit or len(source), len(source))
        with Progress(total=rows, what=f"images of {on}, for the threshold") as bar:
            thresholds = search_thresholds(
                got.net,
                source,
                cfg,
                device=device,
                par=par if how.refined_cam else None,
                on_batch=lambda ids: bar.advance(len(ids)),
            )
        for name, t in thresholds.items():
            text = f"background threshold of {name}: {t.value:g}, the best of {on} ({100 * t.miou:.1f} % mIoU there)"
            console.print(text, soft_wrap=True, markup=False, highlight=False)
        refined = thresholds["refined"].value if "refined" in thresholds else how.refined_background
        how = replace(how, cam_background=thresholds["cam"].value, refined_background=refined)
    cfg = replace(cfg, eval=how)
    with Progress(total=min(how.limit or len(reader), len(reader)), what="images") as bar:
        result = measure(
            got,
            reader,
            device=device,
            cfg=cfg,
            par=par,
            on_batch=lambda ids: bar.advance(len(ids)),
            segment=not what or "seg" in what,
            keep=None if args.out is None else keeper(args.out),
        )
    if args.out is not None:
        console.print(f"labels: {args.out}", soft_wrap=True, markup=False, highlight=False)
    return Measured(got, reader, cfg, result, thresholds, on)


def _threshold_images(args: argparse.Namespace, cfg: Config, manifest: Manifest) -> tuple[ShardReader, str]:
    """The images on which a threshold is searched, and what they are called.

    Raises:
        ConfigError: They are those of the validation, or those that are measured.
        DataError: There are none, or some have no mask.
    """
    from ugrl.data.reader import ShardReader
    from ugrl.eval.selection import masks_text

    name = args.threshold_from or cfg.data.train_split
    instead = "--threshold T, or --threshold-from with another split or with a list of training images that have masks"
    if name in manifest.splits:
        reader, on, splits = ShardReader(manifest, name), f"split '{name}'", (name,)
    elif os.path.isfile(name):
        reader, on = _listed(manifest, Path(name)), f"list {line(name)}"
        splits = reader.splits  # type: ignore[attr-defined]
    else:
        have = ", ".join(f"'{split}'" for split in manifest.splits)
        raise DataError(f"threshold: {manifest.root} has no split '{line(name, 60)}', only {have}; expected {instead}")
    held = {"val", cfg.data.val_split, *([] if args.list or args.split == cfg.data.train_split else [args.split])}
    if shown := [split for split in splits if split in held]:
        raise ConfigError(
            f"threshold: {on} has images of split '{shown[0]}', which the score is for: a threshold that is searched "
            f"there makes it too good; expected {instead}"
        )
    if not reader.has_masks:
        have = masks_text(manifest, name) if name in manifest.splits else "some of its images have none"
        raise DataError(f"threshold: {on}: {have}, and it is searched by masks; expected {instead}")
    return reader, on


def keeper(out: Path) -> Callable[[str, str, np.ndarray], None]:
    """Writes labels as palette PNGs, ``out/KIND/ID.png``.

    Raises:
        DataError: A file is there that was not written by this command, or it cannot be written.
    """
    from ugrl.eval.palette import WRITER, write_mask
    from ugrl.foreign import under

    def written_here(target: Path) -> bool:
        from PIL import Image

        try:
            with Image.open(target, formats=("PNG",)) as image:
                return image.info.get("Software") == WRITER
        except Exception:  # whatever a file that is no PNG of ours may make of Pillow
            return False

    def keep(kind: str, id: str, labels_HW: np.ndarray) -> None:
        target = under(out / kind, f"{id}.png", f"image {line(id, 80)}")
        try:
            if os.path.lexists(target) and not written_here(target):
                raise DataError(f"{line(target)}: exists already, and ugrl has not written it; choose another --out")
            target.parent.mkdir(parents=True, exist_ok=True)
            write_mask(target, labels_HW)
        except OSError as error:
            raise DataError(f"{line(target)}: cannot be written ({error.strerror or error})") from None

    return keep


def _told(args: argparse.Namespace, found: Measured) -> dict[str, Any]:
    """An evaluation for another program."""
    from ugrl.storage import place

    how, result = found.cfg.eval, found.result
    told: dict[str, Any] = {
        "checkpoint": place(args.checkpoint).public,
        "step": found.got.step,
        "data": place(args.data).public,
        "split": args.split if args.list is None else None,
        "list": None if args.list is None else str(args.list),
        "images": result.images,
        "protocol": args.protocol,
        "options": {f.name: getattr(how, f.name) for f in fields(how)},
        "crf": result.crf or None,
        "metrics": result.metrics,
        "classes": {k: {n: v if math.isfinite(v) else None for n, v in c.items()} for k, c in result.classes.items()},
    }
    if found.thresholds:
        each = {name: {"value": t.value, "miou": t.miou} for name, t in found.thresholds.items()}
        told["thresholds"] = {"searched_on": found.searched_on, **each}
    return told


def _names(names: tuple[str, ...]) -> str:
    shown = ", ".join(line(n, 40) for n in names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} classes ({shown})"
