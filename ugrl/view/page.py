"""The page: pictures and numbers of every photograph, and the script that sorts and filters them."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from ugrl.data.reader import ShardReader
from ugrl.errors import ConfigError, DataError
from ugrl.eval.looks import Look
from ugrl.eval.metrics import Confusion
from ugrl.eval.palettes import U_COLOURS, u_share
from ugrl.eval.palettes import palette as known_palette
from ugrl.files import write_whole
from ugrl.text import html, line
from ugrl.view import pictures
from ugrl.view.collect import Run, looks, marks_of

MARK = "ugrl view"
# Classes of less than this share of the pixels are not named under a picture.
LEAST_SHARE = 0.002
SHARED = ("photo", "truth")
OF_RUN = ("cam", "pseudo", "predicted", "u")
_SUFFIX = {"photo": "webp", "cam": "webp"}


@dataclass(slots=True)
class Shown:
    """One photograph on the page: what the script reads, and its pictures by name (``photo``, ``cam0``, ``cam1``)."""

    facts: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Page:
    """A page and the files beside it, by relative name; the page is the first."""

    files: dict[str, bytes]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.files.values()))


@dataclass(slots=True)
class Album:
    """What is shown of some photographs.

    Attributes:
        runs: One or two.
        split: Name of the split.
        names: The foreground classes.
        palette: Name of the colours.
        photographs: In the order of the split.
        counts: Of each run, over all masks.
    """

    runs: Sequence[Run]
    split: str
    names: tuple[str, ...]
    palette: str
    photographs: list[Shown]
    counts: list[Confusion]


def gather(
    runs: Sequence[Run],
    reader: ShardReader,
    indices: Sequence[int],
    *,
    size: int,
    palette: str = "safe",
    on_batch: Callable[[int], None] = lambda n: None,
) -> Album:
    """Show photographs to one or two runs.

    Args:
        runs: Of the same classes as the shards.
        reader: Of the split.
        indices: Positions in the split.
        size: Longest side of a picture, in pixels.
        palette: One of :data:`ugrl.eval.PALETTES`.
        on_batch: Told how many photographs a run is through with.

    Raises:
        DataError: A row cannot be read.
    """
    names = reader.manifest.class_names
    album = Album(runs, reader.split, names, palette, [], [Confusion(len(names) + 1) for _ in runs])
    found: dict[int, Shown] = {}
    colours = known_palette(palette)
    for k, run in enumerate(runs):
        for batch in looks(run, reader, indices):
            for look in batch:
                shown = found.get(look.index) or found.setdefault(look.index, _photograph(look, size, colours))
                _add(shown, look, k, size, colours, run.u_kind)
                if look.truth_HW is not None:
                    album.counts[k].add(torch.from_numpy(look.predicted_HW), torch.from_numpy(look.truth_HW))
            on_batch(len(batch))
    album.photographs = [found[i] for i in sorted(found)]
    return album


def _photograph(look: Look, size: int, colours: np.ndarray) -> Shown:
    h, w = look.pseudo_HW.shape
    at = pictures.fitted((h, w), size)
    facts: dict[str, Any] = {"id": line(look.id), "w": w, "h": h, "tags": look.tags, "runs": []}
    shown = Shown(facts, {"photo": pictures.photo(look.image_HW3, at)})
    if look.truth_HW is not None:
        facts["truth"] = _named(look.truth_HW)
        shown.files["truth"] = pictures.labels(look.truth_HW, at, colours)
    return shown


def _add(shown: Shown, look: Look, k: int, size: int, colours: np.ndarray, u_kind: str) -> None:
    at, marks = pictures.fitted(look.pseudo_HW.shape, size), marks_of(look)
    shown.facts["runs"].append(
        {
            "error": _round(marks.error),
            "miou": _round(marks.miou),
            "most_u": _round(marks.u),
            "iou": {c: _round(v) for c, v in marks.iou.items()},
            "u": {c: _round(v) for c, v in look.u.items()},
            "cam_iou": {c: _round(v) for c, v in look.cam_iou.items()},
            "p": {f: _round(look.probs_F[f - 1]) for f in look.tags},
            "guessed": [f + 1 for f, p in enumerate(look.probs_F) if p > 0.5 and f + 1 not in look.tags],
            "pseudo": _named(look.pseudo_HW),
            "predicted": _named(look.predicted_HW),
        }
    )
    shown.files[f"cam{k}"] = pictures.warm(look.cam_HW, at)
    shown.files[f"pseudo{k}"] = pictures.labels(look.pseudo_HW, at, colours)
    shown.files[f"predicted{k}"] = pictures.labels(look.predicted_HW, at, colours)
    shown.files[f"u{k}"] = pictures.levels(u_share(look.u_HW, u_kind), at)


def _round(x: float) -> float | None:
    return round(float(x), 4) if math.isfinite(x) else None


def _named(labels_HW: np.ndarray) -> list[int]:
    """The classes that a label map shows, the largest first."""
    n = np.bincount(labels_HW.ravel(), minlength=256)
    n[[0, 255]] = 0
    return [int(c) for c in np.argsort(-n, kind="stable")[:6] if n[c] > LEAST_SHARE * labels_HW.size]


def build(album: Album, name: str, *, embed: int) -> Page:
    """The page as files: one that holds everything, or one with a folder of pictures where that would be too large.

    Args:
        album: From :func:`gather`.
        name: File name of the page.
        embed: Most bytes of pictures that the page itself holds.
    """
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    files: dict[str, bytes] = {name: b""}
    inside = sum(len(data) for shown in album.photographs for data in shown.files.values()) <= embed
    names, folder = _names_of_files(album), folder_of(name)
    pictures_of = [
        _sources(shown, names, f"{folder}/{k:06d}", None if inside else files)
        for k, shown in enumerate(album.photographs)
    ]
    pages = Environment(
        loader=PackageLoader("ugrl.view"), autoescape=True, finalize=_escape, trim_blocks=True, lstrip_blocks=True
    )
    here = Path(__file__).parent / "templates"
    text = pages.get_template("page.html.j2").render(
        mark=MARK,
        title=" and ".join(run.name for run in album.runs),
        data=Markup(_json(_facts(album))),
        pictures_of=[Markup("\n".join(sources)) for sources in pictures_of],
        page_css=Markup((here / "page.css").read_text(encoding="utf-8")),
        page_js=Markup((here / "page.js").read_text(encoding="utf-8")),
    )
    files[name] = text.encode(errors="backslashreplace")
    return Page(files)


def _names_of_files(album: Album) -> list[str]:
    return [*SHARED, *(f"{name}{k}" for k in range(len(album.runs)) for name in OF_RUN)]


def _sources(shown: Shown, names: Sequence[str], start: str, files: dict[str, bytes] | None) -> list[str]:
    """Where the pictures of a photograph are, in the order of their names; empty where there is none.

    Args:
        shown: The photograph.
        names: Of its pictures.
        start: Of the names of its files.
        files: Takes the files; without it the pictures are their own addresses.
    """
    sources = []
    for name in names:
        data, kind = shown.files.get(name), _SUFFIX.get(name.rstrip("01"), "png")
        if data is None:
            sources.append("")
        elif files is None:
            sources.append(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")
        else:
            files[where := f"{start}-{name}.{kind}"] = data
            sources.append(quote(where))
    return sources


def folder_of(page: str) -> str:
    """Name of the folder beside a page."""
    return f"{Path(page).stem}_files"


def _facts(album: Album) -> dict[str, Any]:
    colours = known_palette(album.palette)
    return {
        "split": line(album.split, 60),
        "classes": ["background", *(line(n, 60) for n in album.names)],
        "colours": ["#" + bytes(colours[c].tolist()).hex() for c in range(len(album.names) + 1)],
        "ignored": "#" + bytes(colours[255].tolist()).hex(),
        "heat": ["#" + bytes(pictures.heat(np.array([x]))[0].tolist()).hex() for x in np.linspace(0, 1, 9)],
        "runs": [
            {
                "name": run.name,
                "checkpoint": line(run.checkpoint, 80),
                "step": run.got.step,
                "miou": _round(c.miou),
                "u_colours": U_COLOURS[run.u_kind],
            }
            for run, c in zip(album.runs, album.counts, strict=True)
        ],
        "pictures": _names_of_files(album),
        "photographs": [shown.facts for shown in album.photographs],
    }


def _json(tree: Any) -> str:
    """JSON for within a script element, which no text can end."""
    text = json.dumps(tree, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


def _escape(value: Any) -> Any:
    from markupsafe import Markup

    return value if isinstance(value, Markup) else Markup(html(str(value)))


def check_target(out: Path) -> Path:
    """The file that a page may be written to, checked before any work is paid for.

    Raises:
        ConfigError: It is a folder, or a file that ``ugrl view`` has not written.
    """
    from ugrl.command import folder_for

    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {line(out)}: expected the name of a page, such as {line(out.name or 'view')}.html")
    folder_for(out.parent, "--out")
    if out.is_dir():
        raise ConfigError(f"--out {line(out)}: is a folder; expected the name of a page, such as {line(out)}/view.html")
    if out.exists() and MARK.encode() not in out.read_bytes()[:600]:
        raise ConfigError(f"--out {line(out)}: exists already, and ugrl view has not written it; choose another --out")
    beside = out.parent / folder_of(out.name)
    if beside.exists() and not out.exists():
        raise ConfigError(f"--out {line(out)}: {line(beside)} exists already, without its page; choose another --out")
    return out


def write(page: Page, out: Path) -> None:
    """Write a page, the pictures beside it first; pictures of an older page of that name are removed.

    Raises:
        DataError: A file cannot be written.
    """
    (_, text), *rest = page.files.items()
    beside = out.parent / folder_of(out.name)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for old in beside.glob("[0-9]*-*.[pw]*"):
            old.unlink()
        for name, data in rest:
            (out.parent / name).parent.mkdir(exist_ok=True)
            (out.parent / name).write_bytes(data)
        write_whole(out, text)
    except OSError as error:
        raise DataError(f"{line(error.filename or out)}: cannot be written ({error.strerror or error})") from None
