"""A folder of predictions: what lies in it, what is finished already, and one image's files.

Every mask says in a note of its own (a text of the PNG) what it was made of: a fingerprint of checkpoint and options, a
hash of the image, the scores, and which other files belong to it. So a folder needs no list beside its masks. An image
whose mask says the same fingerprint and the same image, and whose other files are there, is finished. The mask is
written last.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ugrl.errors import DataError
from ugrl.eval.palette import WRITER, write_mask
from ugrl.eval.palettes import palette
from ugrl.files import replacing
from ugrl.foreign import read_bytes
from ugrl.predict.inputs import check_apart, plan_targets
from ugrl.predict.prediction import Prediction
from ugrl.text import line

NOTE = "ugrl"
#: Files that may be written of an image beside its mask, each in a folder of its kind.
KINDS = ("overlay", "cam", "uncertainty")
# Of an uncertainty's picture: 0…254 stand for u from 0 to 2, and 255 for unknown.
PER_U, UNKNOWN = 127, 255
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Made:
    """The note in a mask.

    Attributes:
        fingerprint: Of checkpoint and options.
        image: Hash of the image file's bytes.
        name: Name of the image file.
        scores: Class name → the classifier's probability.
        u: Class name → uncertainty, or ``None`` where it was not asked for.
        files: Kind → files beside the mask, below the folder.
    """

    fingerprint: str
    image: str
    name: str
    scores: dict[str, float]
    u: dict[str, float] | None
    files: dict[str, list[str]]

    def text(self) -> str:
        """As JSON."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}, ensure_ascii=False)

    @classmethod
    def parse(cls, text: object) -> Made | None:
        """From the note; ``None`` where it is none that this version writes."""
        try:
            tree: dict[str, Any] = json.loads(str(text))
            return cls(**tree)
        except (ValueError, TypeError):
            return None


def read_note(path: Path) -> tuple[bool, Made | None]:
    """Whether ``ugrl predict`` has written a picture, and the note of a mask that has one."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            comment = image.info.get("comment", b"")
            ours = WRITER in (image.info.get("Software"), comment.decode() if isinstance(comment, bytes) else "")
            return path.is_file() and ours, Made.parse(image.info.get(NOTE)) if ours else None
    except Exception:  # whatever a file that is none of ours may make of Pillow
        return False, None


def digest_of(path: Path) -> str:
    """A hash of an image file's bytes.

    Raises:
        DataError: It cannot be read.
    """
    return hashlib.blake2b(read_bytes(path, "image"), digest_size=16).hexdigest()


class Folder:
    """The masks of some images, and what belongs to them.

    Args:
        images: Files, each once.
        out: The folder; it need not exist yet.
        kinds: Of :data:`KINDS`, what is wanted beside masks.

    Attributes:
        targets: Image → its mask.

    Raises:
        DataError: Two images would be written to one file, an image would be written over, or a file that
            ``ugrl predict`` has not written.
    """

    def __init__(self, images: list[Path], out: Path, kinds: tuple[str, ...] = ()) -> None:
        self.out, self.kinds = out, kinds
        self.targets = plan_targets(images, out)
        for kind, suffix in (("overlay", ".jpg"), ("uncertainty", ".png")):
            if kind in kinds:
                sides = {path: out / kind / f"{path.stem}{suffix}" for path in images}
                check_apart(images, sides, kind)
                _check_ours(sides.values())
        _check_ours(self.targets.values())

    def check_pure(self, fingerprint: str) -> None:
        """Refuse to add to masks that were made otherwise and that would stay.

        Raises:
            DataError: The folder holds one.
        """
        mine = {target.name for target in self.targets.values()}
        for path in sorted(self.out.glob("*.png")) if self.out.is_dir() else ():
            ours, made = (False, None) if path.name in mine else read_note(path)
            if ours and (made is None or made.fingerprint != fingerprint):
                raise DataError(
                    f"{line(path)}: a mask of another checkpoint or of other options, which would stay beside the new "
                    "ones; choose another --out, or remove it"
                )

    def finished(self, image: Path, fingerprint: str) -> Made | None:
        """The note of an image's mask, if nothing is left to do; an image that cannot be read is never finished."""
        made = read_note(self.targets[image])[1]
        if made is None or made.fingerprint != fingerprint:
            return None
        there = all(k in made.files and all((self.out / f).is_file() for f in made.files[k]) for k in self.kinds)
        try:
            return made if there and made.image == digest_of(image) else None
        except DataError:
            return None

    def write(self, image: Path, prediction: Prediction, fingerprint: str) -> Made:
        """Write an image's files, the mask last.

        Raises:
            DataError: A file cannot be written, or somebody else's is in its place.
        """
        target = self.targets[image]
        before = read_note(target)[1]
        kept: dict[str, list[str]] = {}
        if before is not None:
            same = before.fingerprint == fingerprint and before.image == digest_of(image)
            kept = {k: files for k, files in before.files.items() if same}
            self._remove(before, {k for k in KINDS if k not in kept})
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            files = kept | {kind: self._beside(kind, image.stem, prediction) for kind in self.kinds}
            u = prediction.class_uncertainty if {"cam", "uncertainty"} & set(self.kinds) else before_u(before, kept)
            scores = {name: round(score, 6) for name, score in prediction.scores.items()}
            made = Made(fingerprint, digest_of(image), image.name, scores, u, files)
            write_mask(target, prediction.mask, palette(prediction.palette), {NOTE: made.text()})
        except OSError as error:
            raise DataError(f"{target}: cannot be written ({error.strerror or error})") from None
        return made

    def _remove(self, made: Made, kinds: set[str]) -> None:
        """Remove what belonged to a mask that is written anew by other options."""
        for kind in kinds & set(made.files):
            for name in made.files[kind]:
                path = self.out / kind / Path(name).name
                if read_note(path)[0]:
                    path.unlink()

    def _beside(self, kind: str, stem: str, prediction: Prediction) -> list[str]:
        folder = self.out / kind
        folder.mkdir(exist_ok=True)
        if kind == "overlay":
            path = folder / f"{stem}.jpg"
            with replacing(path, durable=False) as draft:
                prediction.overlay().save(draft, format="JPEG", quality=92, subsampling=0, comment=WRITER.encode())
            return [f"{kind}/{path.name}"]
        if kind == "uncertainty":
            write_uncertainty(folder / f"{stem}.png", prediction.uncertainty)
            return [f"{kind}/{stem}.png"]
        names = []
        for name, cam_HW in prediction.cam.items():
            label = prediction.names.index(name) + 1
            path = folder / f"{stem}_{label:03d}_{_plain(name)}.png"
            _check_ours([path])
            _write_grey(path, (cam_HW * 255).round())
            names.append(f"{kind}/{path.name}")
        return names


def before_u(before: Made | None, kept: Mapping[str, list[str]]) -> dict[str, float] | None:
    """The uncertainties that an earlier mask of the same fingerprint knew."""
    return before.u if before is not None and kept else None


def _check_ours(paths: Any) -> None:
    for path in paths:
        if os.path.lexists(path) and not read_note(path)[0]:
            raise DataError(f"{path}: exists already, and ugrl predict has not written it; choose another --out")


def _plain(name: str) -> str:
    """A class name as a part of a file name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:60]


def write_uncertainty(path: Path, u_HW: np.ndarray) -> None:
    """Write u as a grey PNG: the value of a pixel / 127 is its u, 255 is unknown.

    Args:
        path: The file, in a folder that is there.
        u_HW: u in [0, 2], NaN where unknown.
    """
    _write_grey(path, np.where(np.isfinite(u_HW), np.nan_to_num(u_HW) * PER_U, UNKNOWN).round().clip(0, 255))


def _write_grey(path: Path, values_HW: np.ndarray) -> None:
    texts = PngInfo()
    texts.add_text("Software", WRITER)
    with replacing(path, durable=False) as draft:
        Image.fromarray(values_HW.astype(np.uint8)).save(draft, format="PNG", pnginfo=texts)
