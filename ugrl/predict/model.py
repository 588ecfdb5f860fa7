"""A trained network that is asked about images."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ugrl.config import SCALES, CamConfig, Config, build
from ugrl.device import resolve
from ugrl.errors import ConfigError, DataError
from ugrl.eval.crf import find_backend
from ugrl.eval.palettes import palette as known_palette
from ugrl.eval.protocol import PROTOCOLS, choose
from ugrl.method.schedule import Schedule
from ugrl.predict.forward import How, Labelled, groups, segment
from ugrl.predict.inputs import Picture, as_picture, find_images
from ugrl.predict.maps import Maps, maps_of
from ugrl.predict.prediction import Prediction
from ugrl.predict.tiles import Tiling
from ugrl.storage import Place
from ugrl.text import line
from ugrl.train import checkpoint
from ugrl.train.restore import restore

# Images that are read ahead to find such of one size, in batches.
AHEAD = 4
Skipped = Callable[[DataError], None]


class Model:
    """A checkpoint, ready to predict. :func:`ugrl.load` makes one.

    Args:
        where: A run's folder, or one of its ``checkpoints/step_…``: a path or a URI.
        best: Take the best checkpoint of the run instead of the newest.
        device: ``cpu``, ``cuda``, ``cuda:1``, …; a GPU where there is one by default.

    Attributes:
        path: Folder of the checkpoint.
        step: Training steps behind it.
        names: Names of the classes 1…F.
        config: Configuration of its run.
        device: Device that it computes on.
        net: The network, in eval mode.
        prototypes: Its prototypes.

    Raises:
        UgrlError: There is no checkpoint, or it cannot be read; no such device.
    """

    def __init__(self, where: str | Path | Place, *, best: bool = False, device: str | None = None) -> None:
        self.device = resolve(device)
        self.path = checkpoint.find(where, best=best)
        got = restore(self.path, device=self.device)
        self.step, self.names = got.step, got.class_names
        self.config: Config = got.cfg
        self.net, self.prototypes = got.net, got.prototypes

    def __repr__(self) -> str:
        return f"Model({line(self.path)}: {self.config.model.backbone}, {len(self.names)} classes, step {self.step})"

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights, the prototypes, the classes, and the keys that predictions depend on."""
        c = self.config
        digest = hashlib.blake2b(digest_size=16)
        keys = (self._cam.scales, self._cam.mirror, c.method.uncertainty.radius, self._affinity)
        digest.update(json.dumps([self.names, asdict(c.model), keys]).encode())
        for part in (self.net, self.prototypes):
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def _cam(self) -> CamConfig:
        """How a CAM is made that is looked at: with the scales at which it is scored."""
        return replace(self.config.method.cam, scales=self.config.eval.cam_scales or self.config.method.cam.scales)

    @property
    def _affinity(self) -> bool:
        return Schedule.of(self.config).affinity_trained(self.step)

    def how(
        self,
        *,
        scales: Sequence[float] | None = None,
        mirror: bool | None = None,
        crf: bool = False,
        tile: int | None = None,
        overlap: int | None = None,
        batch: int = 1,
        protocol: str | None = None,
        tag_prior: float | None = None,
    ) -> How:
        """What :meth:`predict` is asked for, checked; arguments as there.

        Raises:
            ConfigError: A value is out of range, or two do not go together.
        """
        if protocol is not None and protocol not in PROTOCOLS:
            raise ConfigError(f"protocol is {protocol!r}; expected {', '.join(PROTOCOLS)}")
        given: dict[str, Any] = {"seg_scales": tuple(scales)} if scales else {}
        if mirror is not None:
            given["mirror"] = mirror
        if tag_prior is not None:
            given["tag_prior"] = build({"eval": {"tag_prior": tag_prior}}).eval.tag_prior
        e, _ = choose(self.config.eval, protocol, given)
        crf = crf or (protocol is not None and e.crf)
        for scale in e.seg_scales:
            if not SCALES["ge"] <= scale <= SCALES["le"]:
                raise ConfigError(f"scales: {scale!r}; expected {SCALES['ge']:g} … {SCALES['le']:g}")
        if batch < 1:
            raise ConfigError(f"batch is {batch}; expected at least 1")
        if overlap is not None and tile is None:
            raise ConfigError(f"overlap is {overlap} without a tile; expected both, or none")
        if tile is not None and e.resize != "native":
            raise ConfigError(
                f"tile is {tile}, and eval.resize is {e.resize}: a part of an image cannot be resized as the whole; "
                "expected no tile, or another protocol, such as native"
            )
        if crf:
            find_backend(e.crf_backend)
        tiling = None if tile is None else Tiling.of(tile, overlap, self.net.encoder.info.multiple)
        return How(e.seg_scales, e.mirror, crf, tiling, batch, e)

    def predict(
        self,
        images: Any,
        *,
        scales: Sequence[float] | None = None,
        mirror: bool | None = None,
        crf: bool = False,
        tile: int | None = None,
        overlap: int | None = None,
        batch: int = 1,
        palette: str = "voc",
        on_error: Literal["raise", "skip"] = "raise",
        protocol: str | None = None,
        tag_prior: float | None = None,
    ) -> Any:
        """Masks of images.

        Args:
            images: One image, or a list of them. An image is a file's path, a Pillow image, or a uint8 array (H, W, 3)
                in RGB or (H, W). The path of a folder, or a pattern such as ``photos/*.jpg``, stands for a list.
            scales: Scales of the input that are combined; those of ``eval.seg_scales`` by default.
            mirror: Whether to combine with the mirror image; ``eval.mirror`` by default.
            crf: Whether to sharpen with a dense CRF, by the keys ``eval.crf_…``.
            tile: Side in pixels of the parts that a larger image is divided into; ``None`` takes it whole.
            overlap: Pixels that neighbouring parts share; a quarter of ``tile`` by default.
            batch: Images of one size, or parts of one image, that pass at a time.
            palette: Colours: ``voc``, or ``safe`` or ``tol``, which colour-blind people tell apart.
            on_error: What happens to an image that cannot be used: ``raise`` stops, ``skip`` warns and goes on.
            protocol: How others measure, as of ``ugrl eval --protocol``: sizes, scales, how scores are combined, and
                a CRF where it has one. ``None``: what the run's section ``eval`` says.
            tag_prior: γ with which the classifier's p weighs the classes of all pixels;
                ``eval.tag_prior`` by default.

        Returns:
            A :class:`Prediction`; for a list, a list of them, with ``None`` in place of an image that was skipped.

        Raises:
            DataError: An image cannot be used; the message names it.
            ConfigError: An option is out of range.

        Example::

            model = ugrl.load("run")
            one = model.predict("photos/images/a.jpg")
            many = model.predict(["photos/images/a.jpg", one.image], mirror=True, batch=2)
        """
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error is {on_error!r}; expected 'raise' or 'skip'")
        how = self.how(
            scales=scales,
            mirror=mirror,
            crf=crf,
            tile=tile,
            overlap=overlap,
            batch=batch,
            protocol=protocol,
            tag_prior=tag_prior,
        )
        listed, single = _listed(images)
        found: list[Prediction | None] = [None] * len(listed)
        skipped = (lambda error: warnings.warn(str(error), stacklevel=3)) if on_error == "skip" else None
        for index, prediction in self.stream(listed, how, palette=palette, skipped=skipped):
            found[index] = prediction
        return found[0] if single else found

    def stream(
        self, images: Iterable[Any], how: How, *, palette: str = "voc", skipped: Skipped | None = None
    ) -> Iterator[tuple[int, Prediction]]:
        """The number of each image in its order, and its prediction; a few images are held at a time.

        Args:
            images: As :meth:`predict` takes them one by one.
            how: From :meth:`how`.
            palette: Colours of masks and overlays.
            skipped: Told of an image that cannot be used, before the next one; without it the first one is raised.

        Raises:
            DataError: An image cannot be used.
        """
        known_palette(palette)
        self.net.eval()
        numbered = enumerate(images)
        while window := list(islice(numbered, 1 if how.batch == 1 else AHEAD * how.batch)):
            pictures: dict[int, Picture] = {}
            for index, image in window:
                try:
                    pictures[index] = as_picture(image, f"image {index + 1}")
                except DataError as error:
                    _refuse(error, skipped)
            done: dict[int, Labelled] = {}
            order = list(pictures)
            for group in groups([pictures[i].pixels_HW3.shape for i in order], how.batch):
                done |= self._segment({order[g]: pictures[order[g]] for g in group}, how, skipped)
            for index, found in sorted(done.items()):
                yield index, self._prediction(pictures[index], found, how, palette)

    def _segment(self, pictures: dict[int, Picture], how: How, skipped: Skipped | None) -> dict[int, Labelled]:
        """Labels of images of one size; where they do not go together, each by itself."""
        first = next(iter(pictures.values()))
        try:
            found = segment(self.net, [p.pixels_HW3 for p in pictures.values()], how, self.device)
            return dict(zip(pictures, found, strict=True))
        except (DataError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            if len(pictures) > 1:
                each = (self._segment({i: p}, how, skipped) for i, p in pictures.items())
                return {i: found for part in each for i, found in part.items()}
            index = next(iter(pictures))
            name = line(first.path) if first.path is not None else f"image {index + 1}"
            height, width = first.pixels_HW3.shape[:2]
            why = f"{width} × {height} pixels do not fit into the memory of {self.device}; --tile takes them in parts"
            _refuse(DataError(f"{name}: {error if isinstance(error, DataError) else why}"), skipped)
            return {}

    def _prediction(self, picture: Picture, found: Labelled, how: How, palette: str) -> Prediction:
        scores = dict(zip(self.names, found.scores_F.tolist(), strict=True))
        return Prediction(
            mask=found.labels_HW,
            scores=scores,
            image=picture.pixels_HW3,
            names=self.names,
            path=picture.path,
            palette=palette,
            look=lambda prediction: self.look(prediction, how.tiling),
        )

    def look(self, prediction: Prediction, tiling: Tiling | None = None) -> Maps:
        """CAM and uncertainty of a prediction (:mod:`ugrl.predict.maps`)."""
        return maps_of(
            self.net,
            self.prototypes,
            self._cam,
            prediction.image,
            prediction.mask,
            np.array([prediction.scores[name] for name in self.names], np.float32),
            radius=self.config.method.uncertainty.radius,
            affinity=self._affinity,
            tiling=tiling,
            device=self.device,
        )


def _refuse(error: DataError, skipped: Skipped | None) -> None:
    if skipped is None:
        raise error
    skipped(error)


def _listed(images: Any) -> tuple[list[Any], bool]:
    """The images as a list, and whether one was given by itself."""
    if isinstance(images, str | os.PathLike):
        found = find_images([Path(images)])
        return list(found), not Path(images).is_dir() and Path(images).exists()
    if isinstance(images, list | tuple):
        return list(images), False
    if isinstance(images, Iterator):
        return list(images), False
    return [images], True
