"""Where a run's batches come from: what the run asks its loader for, and the loader of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ugrl.config import Config
from ugrl.data.cache import PixelCache
from ugrl.data.loader import LocalLoader
from ugrl.data.make import Loaded
from ugrl.data.spec import LoaderSpec
from ugrl.distributed import rank, world_size
from ugrl.method.schedule import Schedule
from ugrl.method.teacher import taught
from ugrl.storage import Place

LoaderFactory = Callable[[LoaderSpec], Iterator[Loaded]]


def local_loader(spec: LoaderSpec, cache: PixelCache | None = None) -> Iterator[Loaded]:
    """Batches read and decoded by threads of this process; ``cache`` holds decoded images from before."""
    return LocalLoader(spec, cache=cache)


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
        masks: Whether this rank draws pictures, which show masks. With the setting Full every step has them.
        say: Told in one line what is waited for.
    """
    return LoaderSpec(
        shards=shards,
        split=cfg.data.train_split,
        num_classes=num_classes,
        data=cfg.data,
        seed=cfg.seed,
        global_batch=cfg.train.global_batch,
        rank=rank(),
        world=world_size(),
        start_step=start_step,
        total_steps=cfg.train.steps,
        pin_memory=device.type == "cuda",
        masks_every=1 if Schedule.of(cfg).supervised else cfg.train.at(cfg.train.picture_every) if masks else 0,
        stall_s=cfg.train.stall_s,
        say=say,
        teacher=taught(cfg),
    )
