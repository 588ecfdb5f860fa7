"""``ugrl export --to labels``: the pseudo-labels of a run as a folder of VOC's layout, to train any other model.

Below the folder lie::

    JPEGImages/ID.jpg                       the images as they are in the shards
    SegmentationClass/ID.png                palette PNGs of pseudo-labels; 255 is undecided
    Annotations/ID.xml                      the tags
    ImageSets/Segmentation/train.txt        the labelled images
    ImageSets/Segmentation/val.txt          images with their true masks, where the shards have such a split
    labelmap.txt                            the classes in the order of their labels
    weights.csv                             u and the weight of each image and class
    Uncertainty/ID.png                      u of each pixel's label, of a run that judges pixels

A run judges pixels with ``method.uncertainty.level: pixel``. Its weights are of single pixels, which no table holds.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ugrl.data.progress import Progress
from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest
from ugrl.device import resolve
from ugrl.errors import CheckpointError, ConfigError, DataError
from ugrl.eval.labels import Labelled, label
from ugrl.eval.palette import write_mask
from ugrl.eval.passes import BatchPasses, shape_batches
from ugrl.files import replacing
from ugrl.foreign import under
from ugrl.method.per_position import judge_pixels
from ugrl.method.targets import TargetMaker, pixel_counts
from ugrl.method.teacher import taught
from ugrl.method.weighting import modulation_weights
from ugrl.predict.exports import labelmap, plain_name
from ugrl.predict.folder import PER_U, UNKNOWN, write_uncertainty
from ugrl.row import Row
from ugrl.text import csv_cell, line
from ugrl.train.build import build_par
from ugrl.train.check import check_teachers
from ugrl.train.restore import Restored, restore

SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}
UNCERTAINTY = "Uncertainty"
HEAD = ("image", "label", "class", "pixels", "u", "weight")


@dataclass(frozen=True, slots=True)
class Marks:
    """What is told of the pseudo-labels of one image.

    Attributes:
        id: Of its row.
        area: Its pixels.
        u_C: Uncertainty by class.
        known_C: bool, where there is one.
        pixels_C: Pixels of each class.
    """

    id: str
    area: int
    u_C: Tensor
    known_C: Tensor
    pixels_C: Tensor


def run(args: argparse.Namespace, path: Path, chosen: str) -> int:
    """Write the folder.

    Args:
        args: Of the command.
        path: The checkpoint.
        chosen: What to tell of its choice.

    Returns:
        The exit status, 0.

    Raises:
        UgrlError: Other classes than the shards', teacher masks that are missing, or a folder that cannot be written.
    """
    from ugrl.terminal import Terminal

    got = restore(path, device=resolve(args.device))
    manifest = Manifest.load(args.data)
    if manifest.class_names != got.class_names:
        raise CheckpointError(
            f"{path.name}: trained on {len(got.class_names)} classes ({line(', '.join(got.class_names), 60)}); "
            f"{manifest.root} has {len(manifest.class_names)} ({line(', '.join(manifest.class_names), 60)})"
        )
    if taught(got.cfg):
        check_teachers(got.cfg, manifest, args.split)
    reader = ShardReader(manifest, args.split, teacher=taught(got.cfg))
    held = got.cfg.data.val_split
    val = ShardReader(manifest, held) if held in manifest.splits and held != args.split else None
    if val is not None and not val.has_masks:
        val = None
    Terminal(stderr=True).print(f"{chosen}; split '{args.split}': {len(reader)} images", soft_wrap=True)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.out, durable=False) as draft:
            text = write(draft, got, reader, val)
    except OSError as error:
        raise DataError(f"{line(args.out)}: cannot be written ({error.strerror or error})") from None
    print(f"{line(args.out, 1000)}: {text}")
    return 0


def refuse_taken(out: Path) -> None:
    """Refuse a folder that is there.

    Raises:
        ConfigError: It is.
    """
    if out.exists():
        raise ConfigError(f"--out {line(out)}: exists already; choose another folder or remove it")


def write(root: Path, got: Restored, reader: ShardReader, val: ShardReader | None) -> str:
    """Fill the folder; returns what it holds, in words."""
    names = got.class_names
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (root / "labelmap.txt").write_text(labelmap(names, "voc"), encoding="utf-8")
    index = {id: k for k, id in enumerate(reader.ids)}
    made: list[Marks] = []
    with Progress(total=len(reader) + (0 if val is None else len(val)), what="images") as bar:
        for marks, labels_HW, u_HW in labelled(got, reader):
            _write_row(root, reader[index[marks.id]], labels_HW, names)
            if u_HW is not None:
                write_uncertainty(_target(root, UNCERTAINTY, marks.id, ".png"), u_HW)
            made.append(marks)
            bar.advance(1)
        (lists / "train.txt").write_text("".join(f"{id}\n" for id in reader.ids), encoding="utf-8")
        if val is not None:
            for row in (val[k] for k in range(len(val))):
                _write_row(root, row, None, names)
                bar.advance(1)
            (lists / "val.txt").write_text("".join(f"{id}\n" for id in val.ids), encoding="utf-8")
    made.sort(key=lambda marks: index[marks.id])
    (root / "weights.csv").write_text(weights_csv(made, got), encoding="utf-8")
    decided = sum(int(marks.pixels_C.sum()) for marks in made) / max(1, sum(marks.area for marks in made))
    more = "no val.txt: the shards have no split of other images with masks" if val is None else f"{len(val)} of val"
    pixels = f"; u of each pixel in {UNCERTAINTY}/ID.png: the value / {PER_U}, {UNKNOWN} is unknown"
    return f"{len(made)} images labelled ({100 * decided:.1f} % of their pixels), {more}" + pixels * _by_pixel(got)


@torch.no_grad()
def labelled(got: Restored, reader: ShardReader) -> Iterator[tuple[Marks, np.ndarray, np.ndarray | None]]:
    """The pseudo-labels of a split, uint8 (H, W) each, in batches of one size (so in another order).

    Of a run that judges pixels, the u of each pixel's label comes with them: float32 (H, W), NaN where unknown.
    """
    # The CAM as training makes it, whatever scales it is scored at.
    cfg = replace(got.cfg, eval=replace(got.cfg.eval, cam_scales=None, cam_side=0))
    maker = TargetMaker(cfg, got.prototypes, build_par(cfg), stride=got.net.stride)
    local = maker.schedule.affinity_trained(got.step)
    device = next(got.net.parameters()).device
    for read in shape_batches(reader, list(range(len(reader))), cfg.data.threads, got.net.min_size):
        batch = read.to(device)
        plain = got.net(
            batch.images_B3HW, decode=False, affinity=local or maker.schedule.propagates(got.step), embed=False
        )
        seen = BatchPasses(got.net, cfg, batch, read.images_B3HW, plain)
        found = label(maker, seen, got.step)
        u_BHW = _pixel_uncertainty(got, seen, found) if _by_pixel(got) else None
        pixels_BC = pixel_counts(found.labels_BHW, len(got.class_names) + 1).long().cpu()
        host_BHW = found.labels_BHW.to(torch.uint8).cpu().numpy()
        u_BC, known_BC = found.u_BC.float().cpu(), found.known_BC.cpu()
        for k, (id, (y0, y1, x0, x1)) in enumerate(zip(batch.ids, batch.boxes_B4.tolist(), strict=True)):
            labels_HW = host_BHW[k, y0:y1, x0:x1]
            u_HW = None if u_BHW is None else u_BHW[k, y0:y1, x0:x1]
            yield Marks(id, labels_HW.size, u_BC[k], known_BC[k], pixels_BC[k]), labels_HW, u_HW


def _by_pixel(got: Restored) -> bool:
    return got.cfg.method.uncertainty.level == "pixel"


def _pixel_uncertainty(got: Restored, seen: BatchPasses, found: Labelled) -> np.ndarray:
    """The u of each pixel's label (B, H, W), NaN where unknown."""
    labelled = found.labels_BHW, found.conf_BHW
    pairs_P2, f4_BDhw = seen.batch.pairs_P2, seen.cam.f4_BDhw
    judged = judge_pixels(got.cfg, got.prototypes, seen, f4_BDhw, labelled, pairs_P2, found.present_BC)
    u_BHW, known_BHW = got.prototypes.calibration.pixels(*judged), judged[1]
    return u_BHW.masked_fill(~known_BHW, torch.nan).float().cpu().numpy()


def weights_csv(made: list[Marks], got: Restored) -> str:
    """A line for each class that the pseudo-labels of an image have: its pixels, u, and weight (Eq. 8).

    The weights are those of the segmentation loss, by the run's ``method.uncertainty``, over all images at once: the
    mean weight of the pixels of each class is 1. Where u is unknown, it is empty and the weight is 1.
    """
    text = io.StringIO()
    writer: Any = csv.writer(text, lineterminator="\n")
    writer.writerow(HEAD)
    if made:
        u_NC, known_NC = torch.stack([m.u_C for m in made]), torch.stack([m.known_C for m in made])
        pixels_NC = torch.stack([m.pixels_C for m in made])
        c = got.cfg.method.uncertainty
        w_NC = modulation_weights(
            u_NC.double(),
            known_NC,
            pixels_NC,
            strength=c.beta,
            kind=c.weighting,
            per_class=True,
            u_min=c.u_min,
            bound=c.bound,
        )
        names = ("background", *got.class_names)
        for n, number in (pixels_NC > 0).nonzero().tolist():
            u = f"{float(u_NC[n, number]):.6f}" if known_NC[n, number] else ""
            cells = (csv_cell(made[n].id), number, csv_cell(names[number]), int(pixels_NC[n, number]))
            writer.writerow((*cells, u, f"{float(w_NC[n, number]):.6f}"))
    return text.getvalue()


def _write_row(root: Path, row: Row, labels_HW: np.ndarray | None, names: tuple[str, ...]) -> None:
    """The files of one image; its own mask where no labels are given."""
    with Image.open(io.BytesIO(row.image)) as image:
        suffix = SUFFIXES[image.format or "JPEG"]
    _target(root, "JPEGImages", row.id, suffix).write_bytes(row.image)
    mask = _target(root, "SegmentationClass", row.id, ".png")
    if labels_HW is None:
        mask.write_bytes(row.mask or b"")
    else:
        write_mask(mask, labels_HW)
    tree = ElementTree.Element("annotation")
    ElementTree.SubElement(tree, "filename").text = f"{row.id}{suffix}"
    size = ElementTree.SubElement(tree, "size")
    for name, value in (("width", row.width), ("height", row.height), ("depth", 3)):
        ElementTree.SubElement(size, name).text = str(value)
    for tag in row.tags:
        ElementTree.SubElement(ElementTree.SubElement(tree, "object"), "name").text = plain_name(names[tag - 1])
    ElementTree.ElementTree(tree).write(_target(root, "Annotations", row.id, ".xml"), encoding="utf-8")


def _target(root: Path, folder: str, id: str, suffix: str) -> Path:
    """A file of an image, in a folder that is there."""
    path = under(root / folder, f"{id}{suffix}", f"image {line(id, 80)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
