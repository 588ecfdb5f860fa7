"""``ugrl eval``: a checkpoint, or the masks of any method, measured on any split or list, by any protocol."""

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
    from ugrl.eval.masks import Masks
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
  ugrl eval runs/voc --data shards --masks sam3 --masks clip --compare    beside masks of others, sam3/ID.png
  ugrl eval --masks sam3 --data shards --split val        masks alone
  ugrl eval runs/a runs/b --data shards --what seg --compare              what b gains by class
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
    parser.add_argument(
        "checkpoint",
        nargs="*",
        metavar="RUN",
        help="a run folder or one of its checkpoints/step_…, a path or a URI; a second one to compare with; none is "
        "needed with --masks",
    )
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
    parser.add_argument(
        "--masks",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="also score the masks of another method, DIR/ID.png with class indices; may be given several times",
    )
    parser.add_argument("--compare", action="store_true", help="show the others' differences to the first, by class")
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
    if args.tag_prior is not None:
        given["tag_prior"] = config_mod.build({"eval": {"tag_prior": args.tag_prior}}).eval.tag_prior
    return choose(cfg.eval, args.protocol, given)


def check_together(args: argparse.Namespace) -> None:
    """Refuse options that do not go together; ``--split`` gets its default.

    Raises:
        ConfigError: One of them would do nothing.
    """
    _check_columns(args)
    if args.threshold is not None and args.threshold_from is not None:
        raise ConfigError("--threshold and --threshold-from; expected one of the two")
    if args.list is not None and args.split is not None:
        raise ConfigError("--list and --split; expected one of the two: a list names images of any split")
    args.split = args.split or "val"
    what = " ".join(args.what or WHAT)
    if args.what and "seg" not in args.what:
        for option in ("crf", "scales", "mirror", "tag_prior"):
            if getattr(args, option):
                instead = "--set eval.cam_scales=[1,2]" if option == "scales" else "--what seg beside it"
                name = option.replace("_", "-")
                raise ConfigError(f"--{name} is for the segmentation, which --what {what} leaves out; try {instead}")
    if args.what == ["seg"] and not args.refined_cam:
        for option in ("threshold", "threshold_from"):
            if getattr(args, option) is not None:
                name = option.replace("_", "-")
                raise ConfigError(
                    f"--{name} is for the CAM, which --what seg leaves out; expected cam or refined beside it"
                )


def _check_columns(args: argparse.Namespace) -> None:
    """Refuse too many runs, none, and options that need one.

    Raises:
        ConfigError: Says which.
    """
    runs: list[str] = args.checkpoint
    if len(runs) > 2:
        raise ConfigError(f"{len(runs)} runs ({line(runs[2], 60)} is the third); expected one, or two to compare")
    if not runs and not args.masks:
        raise ConfigError("neither a run nor --masks; expected one of the two")
    if args.compare and len(runs) + len(args.masks) < 2:
        raise ConfigError("--compare of one thing; expected a second run, or --masks beside it")
    if len(runs) == 2 and args.out is not None:
        raise ConfigError("--out and two runs; expected one run, whose labels are written")
    if runs:
        return
    given = [
        name for name in ("what", "crf", "refined_cam", "threshold", "threshold_from", "out") if getattr(args, name)
    ]
    given += [name for name in ("best", "scales", "mirror", "tag_prior", "device") if getattr(args, name)]
    given += ["protocol"] if args.protocol not in (None, "native") else []
    if given:
        name = given[0].replace("_", "-")
        raise ConfigError(f"--{name} is for a run; expected one before --masks: masks are counted as they are")
    if other := [word for word in args.overrides if word.partition("=")[0].strip() != "eval.limit"]:
        raise ConfigError(f"--set {line(other[0], 80)} is for a run; expected eval.limit alone beside --masks")


@dataclass
class OpenRun:
    """A run that is about to be measured, how, and what to tell of that."""

    where: str
    got: Restored
    how: EvalConfig
    told: list[str]
    device: Any


@dataclass
class Measured:
    """What an evaluation was, and what it gave."""

    name: str
    where: str
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
    from ugrl.eval.masks import comparison
    from ugrl.terminal import Terminal
    from ugrl.train.progress import result_table

    check_together(args)
    manifest = Manifest.load(args.data)
    reader = ShardReader(manifest, args.split) if args.list is None else _listed(manifest, args.list)
    console = Terminal(stderr=True)
    opened = [_open_run(args, where, choose_checkpoint, reader) for where in args.checkpoint]
    limits = {min(run.how.limit or len(reader), len(reader)) for run in opened}
    if len(limits) > 1:
        raise ConfigError(
            f"the runs look at {' and '.join(map(str, sorted(limits)))} images; expected the same: --set eval.limit=0"
        )
    limit = how_to_measure(Config(), args)[0].limit or len(reader)
    count = limits.pop() if limits else min(limit, len(reader))
    # The cheap things first: a mask that is missing is not to be found after an hour.
    masks = _score_masks(args, reader, count, console)
    runs = [_measure_run(args, run, reader, count, console) for run in opened]
    if args.json:
        print(json.dumps(_json_of(args, runs, masks, count), indent=1))
        return 0
    for found in runs:
        Terminal().print(result_table(found.result))
    if masks or len(runs) > 1:
        title = f"{_where(args)}: {count} images, IoU in percent"
        Terminal().print(comparison(_columns(runs, masks), title, differences=args.compare))
    return 0


def _score_masks(args: argparse.Namespace, reader: ShardReader, count: int, console: Terminal) -> list[Masks]:
    """The scores of the folders of masks on the first so many images.

    Raises:
        DataError: An image has no ground truth, or a mask cannot be used.
    """
    from ugrl.data.progress import Progress
    from ugrl.eval.masks import names_of, score_masks
    from ugrl.eval.selection import masks_text

    if not args.masks:
        return []
    if not reader.has_masks:
        have = masks_text(reader.manifest, args.split) if args.list is None else "some of its images have none"
        raise DataError(f"--masks: {_where(args)}: {have}; expected a true mask for every image, to score by")
    found = []
    for name, root in zip(names_of(args.masks), args.masks, strict=True):
        console.print(f"masks {line(root)}; {_where(args)}: {count} images", soft_wrap=True, markup=False)
        with Progress(total=count, what="masks") as bar:
            found.append(score_masks(name, root, reader, count, on_image=lambda _: bar.advance(1)))
    return found


def _columns(runs: list[Measured], masks: list[Masks]) -> list[Masks]:
    """All that is set side by side: what was measured of each run, then the folders."""
    from ugrl.eval.masks import Masks, names_of

    found = []
    for run, name in zip(runs, names_of([Path(run.name) for run in runs]), strict=True):
        kinds = [kind for kind in ("seg", "crf", "cam", "refined") if f"{kind}_iou" in run.result.classes]
        for kind in kinds:
            table, mean = run.result.classes[f"{kind}_iou"], run.result.metrics.get(f"{kind}_miou", math.nan)
            found.append(Masks(f"{name} {kind}", table, mean))
    return found + masks


def _open_run(
    args: argparse.Namespace, where: str, choose_checkpoint: Callable[..., tuple[Path, str]], reader: ShardReader
) -> OpenRun:
    from ugrl.device import resolve
    from ugrl.storage import place
    from ugrl.train.restore import restore

    device, manifest = resolve(args.device), reader.manifest
    path, chosen = choose_checkpoint(where, best=args.best)
    got = restore(path, device=device)
    if manifest.class_names != got.class_names:
        raise CheckpointError(
            f"{place(where)}: trained on {_names(got.class_names)}; {manifest.root} has {_names(manifest.class_names)}"
        )
    how, told = how_to_measure(got.cfg, args)
    return OpenRun(where, got, how, [chosen, *told], device)


def _measure_run(
    args: argparse.Namespace, run: OpenRun, reader: ShardReader, count: int, console: Terminal
) -> Measured:
    from ugrl.storage import place

    chosen, *told = run.told
    for text in [f"{chosen}; {_where(args)}: {count} images", *told]:
        console.print(text, soft_wrap=True, markup=False, highlight=False)
    found = _measure(args, run.got, reader, run.how, console, run.device)
    return Measured(place(run.where).public, run.where, run.got, reader, *found)


def _where(args: argparse.Namespace) -> str:
    return f"split '{args.split}'" if args.list is None else f"list {line(args.list)}"


def _listed(manifest: Manifest, path: Path) -> ShardReader:
    from ugrl.data.listed import ListReader

    return ListReader(manifest, path)


def _measure(
    args: argparse.Namespace, got: Restored, reader: ShardReader, how: EvalConfig, console: Terminal, device: Any
) -> tuple[Config, EvalResult, dict[str, Threshold], str]:
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
    return cfg, result, thresholds, on


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


def _json_of(args: argparse.Namespace, runs: list[Measured], masks: list[Masks], count: int) -> dict[str, Any]:
    """All of an evaluation for another program: the first run, the other one, and the masks."""
    from ugrl.storage import place

    told: dict[str, Any] = {"data": place(args.data).public, "split": None if args.list else args.split}
    told |= {"list": None if args.list is None else str(args.list), "images": count}
    if runs:
        told = _told(args, runs[0])
    if len(runs) > 1:
        told["other"] = _told(args, runs[1])
    if masks:
        told["masks"] = [
            {
                "name": m.name,
                "miou": m.miou if math.isfinite(m.miou) else None,
                "left_out": m.left_out,
                "iou": {name: v if math.isfinite(v) else None for name, v in m.iou.items()},
            }
            for m in masks
        ]
    return told


def _told(args: argparse.Namespace, found: Measured) -> dict[str, Any]:
    """An evaluation for another program."""
    from ugrl.storage import place

    how, result = found.cfg.eval, found.result
    told: dict[str, Any] = {
        "checkpoint": place(found.where).public,
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
