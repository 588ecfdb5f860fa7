"""``ugrl predict``: images become masks, and what else was asked for."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ugrl.command import complain, folder_for
from ugrl.errors import ConfigError, DataError
from ugrl.eval import PALETTES
from ugrl.eval.protocol import PROTOCOLS, words
from ugrl.text import line

if TYPE_CHECKING:
    from ugrl.predict.folder import Folder, Made
    from ugrl.predict.forward import How
    from ugrl.predict.model import Model

EXAMPLES = """\
examples:
  ugrl predict runs/voc photos --out masks --best         masks/NAME.png for each photos/NAME.jpg
  ugrl predict runs/voc a.jpg b.png --out masks --scales 0.75 1 1.25 --mirror
  ugrl predict runs/voc photos --out masks --protocol toco        as `ugrl eval --protocol toco` scores them
  ugrl predict runs/voc photos --out masks --overlay --uncertainty --export scores.csv coco
  ugrl predict runs/voc 'film/**/*.png' --out masks --batch 8     frames, in the order of their numbers
  ugrl predict runs/voc ortho.tif --out masks --tile 1024         larger than memory

The value of a pixel is its class, 0 is background. The same command continues where it was stopped: what is finished,
by the same checkpoint and options, is left as it is. Other masks that `ugrl predict` has written of these images are
written anew; masks of other images, made otherwise, are no place to add to. Any other file is left alone. An image that
cannot be used is named, the others are done, and the status is 2.
"""
#: What --export takes → the file or folder that it writes below --out.
EXPORTS = {
    "scores.csv": "scores.csv",
    "scores.json": "scores.json",
    "coco": "coco.json",
    "voc": "voc",
    "voc-server": "submission.tar.gz",
}
# A checkpoint's folder, and what to tell of the choice.
Choose = Callable[..., tuple[Path, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ugrl predict``, but for those that it shares with ``ugrl eval``."""
    parser.description = "Write masks, and what else is asked for."
    parser.epilog = EXAMPLES + (parser.epilog or "")
    parser.add_argument("checkpoint", help="a run folder or one of its checkpoints/step_…, a path or a URI")
    parser.add_argument("images", type=Path, nargs="+", help="images, folders of images, or patterns in quotes")
    parser.add_argument("--out", type=folder_for, required=True, metavar="DIR", help="folder for the masks")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), help="sizes, scales and CRF as others measure")
    parser.add_argument("--crf", action="store_true", help="sharpen with a dense CRF")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images of one size that pass at a time")
    parser.add_argument("--tile", type=int, metavar="PX", help="take images that are larger in parts of this side")
    parser.add_argument("--overlap", type=int, metavar="PX", help="of neighbouring parts (default: a quarter)")
    parser.add_argument(
        "--palette", choices=PALETTES, default=PALETTES[0], help="colours; safe, tol: for everybody's eyes"
    )
    parser.add_argument("--overlay", action="store_true", help="also the image with its mask and a legend")
    parser.add_argument("--cam", action="store_true", help="also the CAM of each shown class")
    parser.add_argument("--uncertainty", action="store_true", help="also a map of the uncertainty")
    parser.add_argument(
        "--export", nargs="+", choices=EXPORTS, default=[], metavar="WHAT", help=f"one file: {', '.join(EXPORTS)}"
    )
    parser.add_argument(
        "--on-error", choices=("raise", "skip"), default="skip", help="stop at an unusable image (default: skip it)"
    )


def run(args: argparse.Namespace, choose: Choose) -> int:
    """Run ``ugrl predict``.

    Args:
        args: The words, parsed.
        choose: Finds the checkpoint (:func:`ugrl.cli.choose`).

    Returns:
        The exit status: 2 if an image could not be used.

    Raises:
        UgrlError: The words do not go together, a file is in the way, or there is no checkpoint.
    """
    from ugrl.data.progress import Progress
    from ugrl.device import resolve
    from ugrl.predict.folder import KINDS, Folder
    from ugrl.predict.inputs import find_images
    from ugrl.terminal import Terminal

    images = find_images(args.images)
    folder = Folder(images, args.out, tuple(kind for kind in KINDS if getattr(args, kind)))
    check_exports(args.out, args.export)
    resolve(args.device)
    path, chosen = choose(args.checkpoint, best=args.best)
    from ugrl.predict.exports import check_submission
    from ugrl.predict.model import Model

    model = Model(path, device=args.device)
    if "voc-server" in args.export:
        check_submission(model.names)
    how = model.how(
        scales=args.scales,
        mirror=args.mirror or None,
        crf=args.crf,
        tile=args.tile,
        overlap=args.overlap,
        batch=args.batch,
        protocol=args.protocol,
        tag_prior=args.tag_prior,
    )
    job = Job(model, how, args.palette, folder, stop=args.on_error == "raise")
    folder.check_pure(job.fingerprint)
    console = Terminal(stderr=True)
    console.print(f"{chosen}; {len(images)} images", soft_wrap=True)
    if args.protocol is not None:
        told = f"protocol {args.protocol}: {words(how.options())}"
        console.print(told, soft_wrap=True, markup=False, highlight=False)
    with Progress(total=len(images), what="images") as bar:
        made = job.run(images, bar.advance)
    export(args, model, {folder.targets[image]: made[image] for image in images if image in made}, console)
    if job.broken and len(images) > 1:
        console.print(f"{job.broken} of {len(images)} images could not be used")
    return 2 if job.broken else 0


class Job:
    """The images of one command.

    Args:
        model: The network.
        how: How masks are computed.
        palette: Colours of masks and overlays.
        folder: Where they go.
        stop: Whether an image that cannot be used ends the work.

    Attributes:
        broken: Images that could not be used.
        fingerprint: Of the checkpoint and of every option that changes a file.
    """

    def __init__(self, model: Model, how: How, palette: str, folder: Folder, *, stop: bool) -> None:
        from dataclasses import asdict

        from ugrl.predict.folder import FORMAT

        self.model, self.how, self.palette, self.folder, self.stop = model, how, palette, folder, stop
        self.broken = 0
        tiling = None if how.tiling is None else asdict(how.tiling)
        # Not `batch`, which changes when something is computed, and not what.
        told = json.dumps([FORMAT, model.fingerprint, how.options(), tiling, palette], sort_keys=True)
        self.fingerprint = hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    def run(self, images: list[Path], advance: Callable[[int], None]) -> dict[Path, Made]:
        """Write what is not finished, and print a line for each image; returns the notes of all masks.

        Raises:
            DataError: A file cannot be written, or an image cannot be used and that ends the work.
        """
        made: dict[Path, Made] = {}
        for image in images:
            found = self.folder.finished(image, self.fingerprint)
            if found is not None:
                made[image] = found
                print(line(f"{self.folder.targets[image]}: finished before", most=2000))
                advance(1)
        left = [image for image in images if image not in made]

        def skipped(error: DataError) -> None:
            self.broken += 1
            complain(str(error))
            advance(1)

        skip = None if self.stop else skipped
        for index, prediction in self.model.stream(left, self.how, palette=self.palette, skipped=skip):
            image = left[index]
            made[image] = self.folder.write(image, prediction, self.fingerprint)
            shown = ", ".join(sorted(prediction.classes, key=self.model.names.index)) or "background only"
            print(line(f"{self.folder.targets[image]}: {shown}", most=2000))
            advance(1)
        return made


def check_exports(out: Path, names: list[str]) -> None:
    """Refuse to write over what is not ours: a folder with masks of ``ugrl predict`` may have its exports too.

    Raises:
        ConfigError: Such a file lies in a folder without.
    """
    from ugrl.predict.folder import read_note

    there = [out / EXPORTS[name] for name in names if (out / EXPORTS[name]).exists()]
    if there and not any(read_note(path)[0] for path in out.glob("*.png")):
        raise ConfigError(
            f"{line(there[0])}: exists already, and ugrl predict has not written it; choose another --out"
        )


def export(args: argparse.Namespace, model: Model, masks: dict[Path, Made], console: Any) -> None:
    """Write what ``--export`` names, of the images of this command."""
    from ugrl.predict import exports

    if not masks:
        return
    writers: dict[str, exports.Export] = {
        "scores.csv": exports.scores_csv,
        "scores.json": exports.scores_json,
        "coco": exports.coco,
        "voc": lambda out, masks, names: exports.voc(out, masks, names, args.palette),
        "voc-server": exports.submission,
    }
    for name in dict.fromkeys(args.export):
        path = writers[name](args.out, masks, model.names)
        console.print(f"{name}: {path}", soft_wrap=True)
