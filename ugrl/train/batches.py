"""Where a run's batches come from: what a loader must deliver, and the loader of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ugrl.config import Config
from ugrl.data.augment import Augment
from ugrl.data.cache import PixelCache
from ugrl.data.loader import LocalLoader
from ugrl.data.make import Loaded, OnDevice, silent
from ugrl.data.reader import ShardReader
from ugrl.distributed import rank, world_size
from ugrl.storage import Place


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """What a loader must deliver: this rank's batches of steps ``start_step … total_steps - 1``.

    Fields with defaults are those of :class:`ugrl.data.loader.LocalLoader`.
    """

    shards: str | Path | Place
    split: str
    augment: Augment
    seed: int
    global_batch: int
    rank: int
    world: int
    start_step: int
    total_steps: int
    threads: int
    prefetch: int
    pin_memory: bool = False
    on_device: OnDevice = "none"
    cache_mb: int = 0
    masks_every: int = 1
    cache_dir: str | None = None
    cache_disk_mb: int = 0
    patience_s: float = 120.0
    stall_s: float = 600.0
    say: Callable[[str], None] = silent


LoaderFactory = Callable[[LoaderSpec], Iterator[Loaded]]


def local_loader(spec: LoaderSpec, cache: PixelCache | None = None) -> Iterator[Loaded]:
    """Batches read and decoded by threads of this process; ``cache`` holds decoded images from before."""
    return LocalLoader(
        ShardReader(
            spec.shards,
            spec.split,
            cache_dir=spec.cache_dir,
            cache_disk_mb=spec.cache_disk_mb,
            patience_s=spec.patience_s,
        ),
        spec.augment,
        seed=spec.seed,
        global_batch=spec.global_batch,
        rank=spec.rank,
        world=spec.world,
        threads=spec.threads,
        start_step=spec.start_step,
        prefetch=spec.prefetch,
        pin_memory=spec.pin_memory,
        on_device=spec.on_device,
        cache_mb=spec.cache_mb,
        masks_every=spec.masks_every,
        cache=cache,
        stall_s=spec.stall_s,
        say=spec.say,
    )


def spec_of(
    cfg: Config,
    *,
    shards: Place,
    num_classes: int,
    start_step: int,
    device: torch.device,
    masks: bool,
    say: Callable[[str], None],
) -> LoaderSpec:
    """What a run asks its loader for, on this rank.

    Args:
        cfg: Configuration of the run.
        shards: Folder that ``ugrl prepare`` has written.
        num_classes: Number of foreground classes F (without background).
        start_step: Number of steps done before.
        device: Device of the training.
        masks: Whether this rank draws pictures, which alone show masks.
        say: Told in one line what is waited for.
    """
    data, train = cfg.data, cfg.train
    wanted = data.on_device
    if wanted == "auto":  # a quarter of the bytes is enough for a GPU; a CPU gains nothing
        wanted = "normalize" if device.type == "cuda" else "none"
    return LoaderSpec(
        shards=shards,
        split=data.train_split,
        augment=Augment(
            crop=data.crop,
            scale_min=data.scale_min,
            scale_max=data.scale_max,
            mirror=data.mirror,
            num_classes=num_classes,
        ),
        seed=cfg.seed,
        global_batch=train.global_batch,
        rank=rank(),
        world=world_size(),
        start_step=start_step,
        total_steps=train.steps,
        threads=data.threads,
        prefetch=data.prefetch,
        pin_memory=device.type == "cuda",
        on_device=wanted,
        cache_mb=data.cache_mb,
        masks_every=train.at(train.picture_every) if masks else 0,
        cache_dir=data.cache_dir,
        cache_disk_mb=data.cache_disk_mb,
        patience_s=data.storage_patience_s,
        stall_s=train.stall_s,
        say=say,
    )
