"""The contracts of CONTRIBUTING.md, kept by what is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.contracts import BackboneContract, Case, LossContract, SamplerContract, SourceContract
from tests.reference import affinity_loss_loops, classification_loss_loops, segmentation_loss_loops
from ugrl.data.source import Source, open_source
from ugrl.method.losses import affinity_loss, classification_loss, segmentation_loss


class TestTiny(BackboneContract):
    name = "tiny"


class TestMiTB0(BackboneContract):
    name = "mit_b0"


def picture(path: Path, label: int = 0) -> None:
    """A photograph of 24 × 16 pixels, or with a label the mask of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not label:
        Image.new("RGB", (24, 16), (90, 120, 30)).save(path)
        return
    labels = np.zeros((16, 24), np.uint8)
    labels[2:9, 3:12] = label
    Image.fromarray(labels).save(path)


class TestShapes(SourceContract):
    name = "shapes"

    def source(self, folder: Path) -> Source:
        return open_source("shapes", train=3, val=2, size=32)


class TestFolder(SourceContract):
    name = "folder"

    def source(self, folder: Path) -> Source:
        if not folder.joinpath("tags.csv").is_file():
            for name in ("a.jpg", "deep/b.jpg", "c.png"):
                picture(folder / "images" / name)
            picture(folder / "masks" / "c.png", label=1)
            (folder / "tags.csv").write_text("file,split,tags\na.jpg,train,car;dog\ndeep/b.jpg,train,\nc.png,val,car\n")
        return open_source("folder", folder)


class TestVoc(SourceContract):
    name = "voc"

    def source(self, folder: Path) -> Source:
        lists = folder / "ImageSets" / "Segmentation"
        if not lists.is_dir():
            lists.mkdir(parents=True)
            for split, id in (("train", "a"), ("val", "v")):
                (lists / f"{split}.txt").write_text(f"{id}\n")
                picture(folder / "JPEGImages" / f"{id}.jpg")
                picture(folder / "SegmentationClass" / f"{id}.png", label=12)
                (folder / "Annotations").mkdir(exist_ok=True)
                (folder / "Annotations" / f"{id}.xml").write_text(
                    "<annotation><object><name>dog</name></object></annotation>"
                )
        return open_source("voc", folder)


class TestCoco(SourceContract):
    name = "coco"

    def source(self, folder: Path) -> Source:
        if not folder.joinpath("annotations").is_dir():
            (folder / "annotations").mkdir(parents=True)
            for split in ("train", "val"):
                name = f"{split}_1.jpg"
                picture(folder / f"{split}2017" / name)
                polygon = {"image_id": 1, "category_id": 7, "iscrowd": 0, "segmentation": [[2, 2, 12, 2, 12, 9, 2, 9]]}
                tree = {
                    "images": [{"id": 1, "file_name": name, "width": 24, "height": 16}],
                    "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "car"}],
                    "annotations": [{"id": 1, **polygon}],
                }
                (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(tree))
        return open_source("coco", folder)


class TestTPE(SamplerContract):
    name = "tpe"


class TestRandom(SamplerContract):
    name = "random"


class TestGP(SamplerContract):
    name = "gp"
    trials = 5


class TestCmaEs(SamplerContract):
    name = "cmaes"
    choices = False


class TestNsga2(SamplerContract):
    name = "nsga2"


class TestClassification(LossContract):
    names = ("mixed", "none")

    def case(self, name: str) -> Case:
        g = torch.Generator().manual_seed(0)
        y = (torch.rand(3, 4, generator=g) < (0.5 if name == "mixed" else 0)).float()
        w = torch.rand(3, 4, generator=g, dtype=torch.float64) + 0.3
        x = torch.randn(3, 4, generator=g, dtype=torch.float64) * 3
        return lambda v: classification_loss(v, y, w), lambda v: classification_loss_loops(v, y.numpy(), w.numpy()), x


class TestSegmentation(LossContract):
    names = ("plain", "ignored")
    empty = ("ignored",)

    def case(self, name: str) -> Case:
        g = torch.Generator().manual_seed(1)
        labels = torch.randint(0, 3, (2, 5, 7), generator=g)
        labels[torch.rand(2, 5, 7, generator=g) < (0.2 if name == "plain" else 2)] = 255
        w = torch.rand(2, 3, generator=g, dtype=torch.float64) + 0.3
        x = torch.randn(2, 3, 2, 3, generator=g, dtype=torch.float64)
        return (
            lambda v: segmentation_loss(v, labels, w),
            lambda v: segmentation_loss_loops(v, labels.numpy(), w.numpy()),
            x,
        )


class TestAffinity(LossContract):
    names = ("plain", "none")
    empty = ("none",)

    def case(self, name: str) -> Case:
        g = torch.Generator().manual_seed(2)
        labels = torch.randint(0, 3, (2, 3, 4), generator=g)
        eligible = torch.rand(2, 3, 4, generator=g) < (0.8 if name == "plain" else 0)
        x = torch.randn(2, 12, 12, generator=g, dtype=torch.float64)
        return (
            lambda v: affinity_loss(v, labels, eligible, radius=2),
            lambda v: affinity_loss_loops(v, labels.numpy(), eligible.numpy(), 2),
            x,
        )
