"""The loop: batches in, checkpoints and metrics out. It knows no method and no Ray.

It runs as one process, or as one rank of a process group that somebody else set up; files are
written by rank 0 alone.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ugrl import config as config_mod
from ugrl.config import Config
from ugrl.data.augment import Augment
from ugrl.data.make import Loaded, OnDevice
from ugrl.data.order import steps_per_epoch
from ugrl.data.reader import LocalLoader, ShardReader
from ugrl.data.shards import Manifest
from ugrl.distributed import barrier, is_main, mean_over_ranks, rank, world_size
from ugrl.errors import CheckpointError, ConfigError, UgrlError
from ugrl.eval.evaluate import EvalResult, evaluate
from ugrl.method.build import build_par, build_prototypes
from ugrl.model.build import build_net
from ugrl.train import checkpoint
from ugrl.train.board import Board
from ugrl.train.interrupt import StopRequest
from ugrl.train.objective import resolve_objective
from ugrl.train.optim import Optimizer
from ugrl.train.progress import Progress
from ugrl.train.step import Step


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """What a loader must deliver: this rank's batches of steps ``start_step … total_steps - 1``.

    The last four fields are those of :class:`ugrl.data.reader.LocalLoader`.
    """

    shards: Path
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


LoaderFactory = Callable[[LoaderSpec], Iterator[Loaded]]


def local_loader(spec: LoaderSpec) -> Iterator[Loaded]:
    """Batches read and decoded by threads of this process."""
    return LocalLoader(
        ShardReader(spec.shards, spec.split),
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
    )


def _nothing(*_: Any) -> None:
    return None


@dataclass(slots=True)
class Hooks:
    """Called on every rank.

    Attributes:
        on_eval: ``(steps done, metrics)`` after each validation.
        on_checkpoint: ``(steps done, finished directory on rank 0, else None, last metrics)``.
    """

    on_eval: Callable[[int, dict[str, float]], None] = _nothing
    on_checkpoint: Callable[[int, Path | None, dict[str, float]], None] = _nothing


class Trainer:
    """One run of one configuration on one data set.

    Args:
        cfg: The run.
        shards: A prepared folder.
        out: Where to write; ``None`` writes nothing.
        loader: Where batches come from; by default from the shards, in this process.
        hooks: What to tell others.
        resume_from: A checkpoint folder to continue from.
        console: For progress and tables.
        quiet: No progress.
        device: ``"cuda"`` where there is one, by default.
        dtype: Of weights and images; float64 for tests of equality.

    Raises:
        UgrlError: The shards, the configuration or the checkpoint cannot be used together.
    """

    def __init__(
        self,
        cfg: Config,
        *,
        shards: Path,
        out: Path | None,
        loader: LoaderFactory | None = None,
        hooks: Hooks | None = None,
        resume_from: Path | None = None,
        console: Console | None = None,
        quiet: bool = False,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.cfg, self.shards, self.out = cfg, shards, out
        self.hooks = hooks or Hooks()
        self.loader = loader or local_loader
        self.console = console or Console(stderr=True)
        self.quiet = quiet or not is_main()
        self.dtype = dtype
        if cfg.train.cpu_threads > 0:
            torch.set_num_threads(cfg.train.cpu_threads)
        self.device = torch.device(device or _default_device())
        if cfg.train.global_batch % world_size() != 0:
            raise ConfigError(
                f"train.global_batch is {cfg.train.global_batch}; expected a multiple of the {world_size()} workers"
            )
        self.manifest = Manifest.load(shards)
        self.class_names = self.manifest.class_names
        num = len(self.class_names)
        self.train_ids = len(self.manifest.ids(cfg.data.train_split))
        self.val_reader = ShardReader(shards, cfg.data.val_split)
        self.objective = resolve_objective(cfg, self.manifest, cfg.data.val_split)
        steps_per_epoch(self.train_ids, cfg.train.global_batch)  # refuses a split smaller than a batch

        self.net = build_net(cfg, num, pretrained=resume_from is None).to(self.device, dtype)
        self.prototypes = build_prototypes(cfg, num, self.net.dim).to(self.device, dtype)
        groups = self.net.parameter_groups(
            cfg.train.lr, cfg.train.head_lr_ratio, cfg.train.weight_decay, cfg.train.norm_lr_mult
        )
        self.optimizer = Optimizer(self.net, groups, cfg.train)
        self.compiled = cfg.train.compile != "none"
        if self.compiled:
            # The encoder alone: nine tenths of a step, one graph, and shapes that do not change from step to step. The
            # last two modes replay CUDA graphs; parameters keep their names.
            self.net.encoder.compile(dynamic=False, fullgraph=True, mode=cfg.train.compile)
        self.par = build_par(cfg)
        self.step_fn = Step(cfg, self.net, self.prototypes, self.par)
        self.done = 0
        self.metrics: dict[str, float] = {}
        if resume_from is not None:
            self._load(resume_from)

    # -- state --------------------------------------------------------------------------------

    def _load(self, path: Path) -> None:
        state = checkpoint.read_state(path)
        if state.class_names != self.class_names:
            raise CheckpointError(
                f"{path}: trained on classes {list(state.class_names)}, not on those of {self.shards}"
            )
        if state.step > self.cfg.train.steps:
            raise CheckpointError(f"{path}: holds step {state.step}; the run has train.steps {self.cfg.train.steps}")
        checkpoint.load_module(self.net, checkpoint.read_part(path, "model"), path)
        checkpoint.load_module(self.prototypes, checkpoint.read_part(path, "prototypes"), path)
        self.optimizer.load(checkpoint.read_part(path, "optimizer"))
        checkpoint.set_random_state(checkpoint.read_part(path, "random"))
        self.done = state.step
        self.metrics = dict(state.metrics)

    def save(self) -> Path | None:
        """Write a checkpoint of the steps done (rank 0) and tell the hooks (every rank)."""
        path = None
        if self.out is not None and is_main():
            path = checkpoint.save(
                self.out / "checkpoints",
                self.done,
                config=config_mod.to_dict(self.cfg),
                class_names=self.class_names,
                metrics=self.metrics,
                parts={
                    "model": self.net.state_dict(),
                    "prototypes": self.prototypes.state_dict(),
                    "optimizer": self.optimizer.state(),
                    "random": checkpoint.random_state(),
                },
            )
            self._mark_best(path)
            checkpoint.prune(path.parent, self.cfg.train.keep_checkpoints)
        self.hooks.on_checkpoint(self.done, path, dict(self.metrics))
        return path

    def _mark_best(self, path: Path) -> None:
        if self.metrics.get("step") != self.done or self.objective not in self.metrics:
            return
        mark = path.parent / "best.json"
        value = self.metrics[self.objective]
        try:
            old = float(json.loads(mark.read_text())["value"])
        except (OSError, ValueError, KeyError):
            old = -math.inf
        if value > old:
            checkpoint.write_json(mark, {"checkpoint": path.name, "objective": self.objective, "value": value})

    # -- the run ------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Train to ``train.steps``; returns the metrics of the last validation.

        The first Ctrl-C or SIGTERM ends the step, writes a checkpoint (one process only) and raises
        KeyboardInterrupt; the second one acts at once.
        """
        cfg = self.cfg
        if self.out is not None and is_main():
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "config.yaml").write_text(yaml.safe_dump(config_mod.to_dict(cfg), sort_keys=False))
            _cut_log(self.out / "metrics.jsonl", self.done)
        board = Board(self.out / "tb" if self.out is not None and is_main() else None)
        model: torch.nn.Module = self.net
        self.net.train()
        if world_size() > 1:
            ids = [self.device.index or 0] if self.device.type == "cuda" else None
            with warnings.catch_warnings():
                # Newer torch renames broadcast_buffers; older ones know only that name.
                warnings.simplefilter("ignore", FutureWarning)
                model = DistributedDataParallel(
                    self.net, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        batches = self.loader(self._spec())
        amp = self.device.type == "cuda" and cfg.train.amp == "auto" and self.dtype == torch.float32
        window: list[dict[str, Tensor]] = []
        since = time.perf_counter()
        try:
            bar = Progress(self.console, cfg.train.steps, self.done, enabled=not self.quiet)
            with bar as progress, StopRequest() as stop:
                while self.done < cfg.train.steps:
                    step = self.done
                    batch = next(batches).to(self.device, self.dtype)
                    if self.compiled:
                        torch.compiler.cudagraph_mark_step_begin()
                    pictures = board.writer is not None and (step + 1) % cfg.train.picture_every == 0
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=amp):
                        out = self.step_fn(batch, step, model=model, views=pictures)
                    out.loss.backward()
                    if self.device.type == "cpu":  # where reading a value waits for nothing
                        self._finite(self._means([out.terms]), step)
                    lr = self.optimizer.step(step)
                    self.optimizer.zero_grad()
                    self.done += 1
                    window.append({**out.terms, **{f"stat/{k}": v for k, v in out.stats.items()}})
                    progress.advance(self.done)
                    if self.done % cfg.train.log_every == 0 or self.done == cfg.train.steps:
                        values = self._flush(window)
                        now = time.perf_counter()
                        values["images_per_s"] = len(window) * cfg.train.global_batch / (now - since)
                        values["lr"] = lr
                        window, since = [], now
                        self._record({"step": self.done, **values})
                        board.scalars("train", values, self.done)
                        progress.losses(self.done, values)
                    if pictures:
                        board.pictures(batch, out.views, self.done)
                    evaluated = self.done % cfg.train.eval_every == 0 or self.done == cfg.train.steps
                    if evaluated:
                        result = self.validate()
                        self.metrics = {**result.metrics, "step": float(self.done)}
                        self._record({"step": self.done, **{f"val/{k}": v for k, v in result.metrics.items()}})
                        board.scalars("val", result.metrics, self.done)
                        for group, table in result.classes.items():
                            board.scalars(f"val_{group}", table, self.done)
                        progress.evaluated(self.done, result, self.objective)
                    if evaluated or self.done % cfg.train.checkpoint_every == 0:
                        self.save()
                    if evaluated:
                        self.hooks.on_eval(self.done, dict(self.metrics))
                        since = time.perf_counter()
                    if stop.requested and self.done < cfg.train.steps:
                        if world_size() == 1:  # other ranks may be a step behind
                            self.save()
                        raise KeyboardInterrupt
        finally:
            close = getattr(batches, "close", None)
            if close:
                close()
            board.close()
        barrier()
        return dict(self.metrics)

    def validate(self) -> EvalResult:
        """Evaluate the present network on ``data.val_split``."""
        cfg = self.cfg
        # Whole images come in many sizes: compiling for each would cost more than it saves.
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            return evaluate(
                self.net,
                self.val_reader,
                cfg,
                device=self.device,
                prototypes=self.prototypes,
                affinity_trained=self.step_fn.uses_affinity and self.done > cfg.train.cls_warmup_iters,
                par=self.par,
                dtype=self.dtype,
            )

    def _spec(self) -> LoaderSpec:
        cfg = self.cfg
        return LoaderSpec(
            shards=self.shards,
            split=cfg.data.train_split,
            augment=Augment(
                crop=cfg.data.crop,
                scale_min=cfg.data.scale_min,
                scale_max=cfg.data.scale_max,
                mirror=cfg.data.mirror,
                num_classes=len(self.class_names),
            ),
            seed=cfg.seed,
            global_batch=cfg.train.global_batch,
            rank=rank(),
            world=world_size(),
            start_step=self.done,
            total_steps=cfg.train.steps,
            threads=cfg.data.threads,
            prefetch=cfg.data.prefetch,
            pin_memory=self.device.type == "cuda",
            on_device=self._on_device(),
            cache_mb=cfg.data.cache_mb,
            # Only pictures show masks, and rank 0 draws them.
            masks_every=cfg.train.picture_every if self.out is not None and is_main() else 0,
        )

    def _on_device(self) -> OnDevice:
        """What the loader leaves to the device; a quarter of the bytes is enough for a GPU, a CPU gains nothing."""
        wanted = self.cfg.data.on_device
        if wanted == "auto":
            return "normalize" if self.device.type == "cuda" else "none"
        return wanted

    def _flush(self, window: list[dict[str, Tensor]]) -> dict[str, float]:
        values = self._means(window)
        self._finite(values, self.done - 1)
        return values

    @staticmethod
    def _means(window: list[dict[str, Tensor]]) -> dict[str, float]:
        """Mean of each named value over the steps that have it, over ranks; one transfer."""
        names = sorted({k for w in window for k in w})
        means = torch.stack([torch.stack([w[k].double() for w in window if k in w]).mean() for k in names])
        return dict(zip(names, mean_over_ranks(means).tolist(), strict=True))

    @staticmethod
    def _finite(values: dict[str, float], step: int) -> None:
        """Stop at a NaN or an infinity; the values are global, so every rank stops."""
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        if bad:
            raise UgrlError(f"step {step}: loss '{bad[0]}' is {values[bad[0]]}; nothing was saved after it")

    def _record(self, line: dict[str, float]) -> None:
        if self.out is not None and is_main():
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


def _cut_log(path: Path, done: int) -> None:
    """Drop lines of steps that a resumed run will do again."""
    if path.is_file():
        lines = [s for s in path.read_text().splitlines() if s.endswith("}") and json.loads(s)["step"] <= done]
        path.write_text("".join(s + "\n" for s in lines))


def _default_device() -> str:
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "cpu"
