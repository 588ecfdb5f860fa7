"""The loop: batches in, checkpoints and metrics out. It knows no method and no Ray.

It runs as one process, or as one rank of a process group that somebody else set up; files are
written by rank 0 alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ugrl import config as config_mod
from ugrl.config import Config
from ugrl.data.augment import Augment
from ugrl.data.cache import PixelCache
from ugrl.data.loader import LocalLoader
from ugrl.data.make import Loaded, OnDevice
from ugrl.data.order import batch_rows
from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest
from ugrl.data.transfer import Transfer
from ugrl.device import resolve
from ugrl.distributed import barrier, is_main, mean_over_ranks, rank, world_size
from ugrl.errors import CheckpointError, ConfigError
from ugrl.eval.evaluate import EvalResult, evaluate
from ugrl.method.build import build_par, build_prototypes
from ugrl.model.build import build_net
from ugrl.storage import Place, place
from ugrl.terminal import Terminal
from ugrl.train import checkpoint
from ugrl.train.accumulate import run_step
from ugrl.train.board import Board
from ugrl.train.check import check_run, judged_rows
from ugrl.train.deterministic import make_deterministic
from ugrl.train.folder import RunFolder
from ugrl.train.guard import Guard
from ugrl.train.interrupt import Agreement, Interrupted, StopRequest
from ugrl.train.meter import Meter, Pace
from ugrl.train.objective import why_no_masks
from ugrl.train.optim import Optimizer
from ugrl.train.progress import Progress, duration, header, slow_text, step_time, tell
from ugrl.train.saver import Snapshot, snapshot
from ugrl.train.step import Step
from ugrl.types import Batch


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """What a loader must deliver: this rank's batches of steps ``start_step … total_steps - 1``.

    Fields with defaults are those of :class:`ugrl.data.reader.LocalLoader`.
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
    )


def nothing(*_: Any) -> None:
    """What a hook does that nobody set."""


def _never() -> bool:
    return False


@dataclass(slots=True)
class Hooks:
    """Called on every rank, but for ``on_event``.

    Attributes:
        on_eval: ``(steps done, metrics)`` after each validation.
        on_checkpoint: ``(steps done, place, metrics)`` at each step that has a checkpoint, and once at the end: the
            newest one that is whole by now and was not told before (rank 0, else ``None``), with its metrics. They are
            written in the background, so that it is usually the one before.
        on_log: ``(steps done, values)`` every ``train.log_every`` steps: losses, statistics, speed.
        on_event: One line on what happened besides; rank 0.
        stop: Asked after each step; ranks stop together if one of them is told to.
        before_write: Called on rank 0 before something is written to the run's folder; raises where it is another's.
    """

    on_eval: Callable[[int, dict[str, float]], None] = nothing
    on_checkpoint: Callable[[int, Place | None, dict[str, float]], None] = nothing
    on_log: Callable[[int, dict[str, float]], None] = nothing
    on_event: Callable[[str], None] = nothing
    stop: Callable[[], bool] = _never
    before_write: Callable[[], None] = nothing


class Trainer:
    """One run of one configuration on one data set.

    Args:
        cfg: The run.
        shards: A prepared folder.
        out: Where to write, a path or a URI; ``None`` writes nothing. A remote run is written to a local folder first.
        loader: Where batches come from; by default from the shards, in this process.
        hooks: What to tell others.
        resume_from: A checkpoint folder to continue from.
        console: For progress and tables.
        quiet: No progress.
        device: ``"cuda"`` where there is one, by default.
        dtype: Of weights and images, instead of ``train.dtype``.

    Raises:
        UgrlError: The shards, the configuration or the checkpoint cannot be used together.
    """

    def __init__(
        self,
        cfg: Config,
        *,
        shards: str | Path | Place,
        out: str | Path | Place | None,
        loader: LoaderFactory | None = None,
        hooks: Hooks | None = None,
        resume_from: str | Path | Place | None = None,
        console: Console | None = None,
        quiet: bool = False,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.cfg, self.shards = cfg, place(shards)
        self.hooks = hooks or Hooks()
        self.loader = loader or local_loader
        self.console = console or Terminal(stderr=True)
        self.quiet = quiet or not is_main()
        self.dtype = dtype or getattr(torch, cfg.train.dtype)
        if cfg.train.cpu_threads > 0:
            torch.set_num_threads(cfg.train.cpu_threads)
        self.device = resolve(device)
        if cfg.train.deterministic:
            make_deterministic(self.device)
        if cfg.train.global_batch % world_size() != 0:
            raise ConfigError(
                f"train.global_batch is {cfg.train.global_batch}; expected a multiple of the {world_size()} workers"
            )
        self.manifest = Manifest.load(shards)
        self.class_names = self.manifest.class_names
        num = len(self.class_names)
        self.train_ids = len(self.manifest.ids(cfg.data.train_split))
        self.val_reader = ShardReader(
            self.manifest,
            cfg.data.val_split,
            cache_dir=cfg.data.cache_dir,
            cache_disk_mb=cfg.data.cache_disk_mb,
            patience_s=cfg.data.storage_patience_s,
        )
        self.objective = check_run(cfg, self.manifest)
        self.data = self.manifest.fingerprint(cfg.data.train_split, cfg.data.val_split)
        self.folder = RunFolder(
            None if out is None else place(out),
            cfg,
            class_names=self.class_names,
            objective=self.objective,
            data=self.data,
            say=self.say,
        )
        self.net = build_net(cfg, num, pretrained=resume_from is None).to(self.device, self.dtype)
        self.prototypes = build_prototypes(cfg, num, self.net.dim).to(self.device, self.dtype)
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
            self._load(checkpoint.find(resume_from))

    # -- state --------------------------------------------------------------------------------

    def _load(self, path: Path) -> None:
        state = checkpoint.read_state(path)
        if state.class_names != self.class_names:
            raise CheckpointError(
                f"{path}: trained on classes {list(state.class_names)}, not on those of {self.shards}"
            )
        checkpoint.check_data(state, self.data, self.shards)
        if state.step > self.cfg.train.steps:
            raise CheckpointError(f"{path}: holds step {state.step}; the run has train.steps {self.cfg.train.steps}")
        checkpoint.load_module(self.net, checkpoint.read_part(path, "model"), path)
        checkpoint.load_module(self.prototypes, checkpoint.read_part(path, "prototypes"), path)
        self.optimizer.load(checkpoint.read_part(path, "optimizer"), path)
        checkpoint.set_random_state(checkpoint.read_part(path, "random"), path)
        self.done = state.step
        self.metrics = dict(state.metrics)

    def say(self, text: str) -> None:
        """Tell the user, and whoever listens, what happened; from any thread."""
        if is_main():
            if not self.quiet:
                tell(self.console, text)
            self.hooks.on_event(text)

    def save(self) -> None:
        """Have the state saved in the background (rank 0); tell the hooks what is whole by now (every rank)."""
        self._before_write()
        self.folder.submit(self._snapshot)
        self._tell_saved(wait=False)

    def _before_write(self) -> None:
        if is_main():
            self.hooks.before_write()

    def _snapshot(self) -> Snapshot:
        parts = {
            "model": self.net.state_dict(),
            "prototypes": self.prototypes.state_dict(),
            "optimizer": self.optimizer.state(),
            "random": checkpoint.random_state(),
        }
        return snapshot(self.done, self.metrics, parts)

    def _tell_saved(self, *, wait: bool) -> None:
        saved = self.folder.saved(wait=wait)
        if saved is None:
            self.hooks.on_checkpoint(self.done, None, dict(self.metrics))
        else:
            self.hooks.on_checkpoint(self.done, saved.place, saved.metrics)

    # -- the run ------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Train to ``train.steps``; returns the metrics of the last validation.

        The first Ctrl-C or SIGTERM, on any rank, or ``hooks.stop`` ends the step, writes a checkpoint and raises on
        every rank; the second signal acts at once.

        Raises:
            Interrupted: It was asked to stop.
            CheckpointError: Checkpoints cannot be written.
            UgrlError: ``train.nan_patience`` steps in a row had no finite loss or gradients; a broken row or shard.
        """
        self._before_write()
        self.folder.open(self.done)
        barrier()  # nobody adds to a log that rank 0 still cuts
        main = self.folder.main
        board = Board(
            main / "tb" if main is not None else None,
            mlflow=self.cfg.train.mlflow,
            name=self.cfg.name if self.folder.home is None else self.folder.home.name,
            params=config_mod.public_dict(self.cfg),
            step=self.done,
            say=self.say,
        )
        status = "FAILED"
        batches = Transfer(self.loader(self._spec()), self.device, self.dtype)
        try:
            self._introduce()
            every = self.cfg.train.at(self.cfg.train.eval_every)
            pace = Pace(self.cfg.train.steps, self.step_fn.schedule.warmup, every)
            bar = Progress(self.console, self.cfg.train.steps, self.done, enabled=not self.quiet, pace=pace)
            with bar as progress, StopRequest() as stop:
                self._loop(batches, board, progress, pace, stop)
            self._tell_saved(wait=True)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            batches.close()
            board.close(status)
            self.folder.close()
        barrier()
        return dict(self.metrics)

    def _introduce(self) -> None:
        """Say what is trained on what, and by which metric it is judged."""
        cfg, val = self.cfg, self.cfg.data.val_split
        for text in header(
            cfg,
            device=self.device,
            workers=world_size(),
            parameters=sum(p.numel() for p in self.net.parameters()),
            classes=len(self.class_names),
            train=self.train_ids,
            val=judged_rows(cfg, self.manifest, val),
            objective=self.objective,
            done=self.done,
        ):
            self.say(text)
        if cfg.eval.objective == "auto" and (why := why_no_masks(self.manifest, val, self.objective)):
            self.say(why)

    def _tell_pace(self, pace: Pace) -> None:
        """Say how long the run will take."""
        warm = self.done <= self.step_fn.schedule.warmup < self.cfg.train.steps
        left, step_s = pace.left(self.done), pace.step_s(warm)
        if left is None or step_s is None:
            return
        more = ", and steps after the warm-up take longer" if warm else ""
        self.say(f"step {self.done}  {step_time(step_s)} a step: about {duration(left)} left{more}")
        if warning := slow_text(left, self.done, self.cfg.train.steps):
            self.say(warning)

    def _loop(self, batches: Iterator[Batch], board: Board, progress: Progress, pace: Pace, stop: StopRequest) -> None:
        cfg = self.cfg
        eval_every, checkpoint_every = cfg.train.at(cfg.train.eval_every), cfg.train.at(cfg.train.checkpoint_every)
        picture_every = cfg.train.at(cfg.train.picture_every)
        model = self._wrapped()
        amp = self.device.type == "cuda" and cfg.train.amp == "auto" and self.dtype == torch.float32
        guard = Guard(
            [self.net, self.prototypes],
            list(self.net.parameters()),
            patience=cfg.train.nan_patience,
            out=self.folder.main,
            ids_of=self._ids_of,
            say=self.say,
        )
        agreement, meter = Agreement(self.device), Meter(self.device)
        window: list[dict[str, Tensor]] = []
        good: list[bool] = []
        while self.done < cfg.train.steps:
            step = self.done
            with meter.data():
                batch = next(batches)
            self.folder.note_ids({"step": step + 1}, batch.ids)
            if self.compiled:
                torch.compiler.cudagraph_mark_step_begin()
            pictures = board.writer is not None and (step + 1) % picture_every == 0
            guard.keep()
            out = run_step(
                self.step_fn,
                batch,
                step,
                model=model,
                views=pictures,
                micro_batch=cfg.train.micro_batch,
                amp=amp,
            )
            taken = guard.judge(step, out.loss)
            lr = self.optimizer.step(step, taken)
            self.optimizer.zero_grad()
            self.done += 1
            window.append({**out.terms, **{f"stat/{k}": v for k, v in out.stats.items()}})
            if self.device.type == "cpu":  # where reading a value waits for nothing
                good += guard.collect()
            meter.step(cfg.train.global_batch)
            pace.step(self.done)
            last = self.done == cfg.train.steps
            values = None
            if self.done % cfg.train.log_every == 0 or last:
                good += guard.collect()
                values = self._means([w for w, ok in zip(window, good, strict=True) if ok], meter.values())
                values["lr"] = lr
                if guard.skipped:
                    values["skipped"] = float(guard.skipped)
                window, good = [], []
                self._before_write()
                self.folder.record({"step": self.done, **values})
                board.scalars("train", values, self.done)
                self.hooks.on_log(self.done, values)
            progress.advance(self.done, values)
            if pace.news(self.done):
                self._tell_pace(pace)
            if pictures:
                board.pictures(batch, out.views, self.done)
            evaluated = self.done % eval_every == 0 or last
            if evaluated:
                with meter.pause(), pace.validation():
                    result = self.validate(progress)
                self.metrics = {**result.metrics, "step": float(self.done)}
                self.folder.record({"step": self.done, **{f"val/{k}": v for k, v in result.metrics.items()}})
                board.scalars("val", result.metrics, self.done)
                for group, table in result.classes.items():
                    # A class that no image shows has no score.
                    board.scalars(f"val_{group}", {k: v for k, v in table.items() if math.isfinite(v)}, self.done)
                progress.evaluated(self.done, result)
            with meter.pause():
                saves = evaluated or self.done % checkpoint_every == 0
                if saves:
                    self.save()
                if evaluated:
                    self.hooks.on_eval(self.done, dict(self.metrics))
                    if result.verdict:
                        self.say(f"step {self.done}  {result.verdict}")
            if agreement.stop(stop.requested or self.hooks.stop()) and self.done < cfg.train.steps:
                if not saves:
                    self.save()
                self._tell_saved(wait=True)
                raise Interrupted(self.done, stop.number)

    def _wrapped(self) -> torch.nn.Module:
        self.net.train()
        if world_size() == 1:
            return self.net
        ids = [self.device.index or 0] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # Newer torch renames broadcast_buffers; older ones know only that name.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                self.net, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def _ids_of(self, step: int) -> list[str]:
        """Images of a step's global batch."""
        cfg = self.cfg
        split = cfg.data.train_split
        _, rows = batch_rows(
            step, seed=cfg.seed, manifest=self.manifest, split=split, global_batch=cfg.train.global_batch
        )
        ids = self.manifest.ids(split)
        return [ids[int(i)] for i in rows]

    def validate(self, progress: Progress | None = None) -> EvalResult:
        """Evaluate the present network on ``data.val_split``."""
        cfg, seen = self.cfg, 0

        def on_batch(ids: Sequence[str]) -> None:
            nonlocal seen
            seen += len(ids) * world_size()
            self.folder.note_ids({"eval": self.done}, ids)
            if progress is not None:
                progress.validating(seen, judged_rows(cfg, self.manifest, cfg.data.val_split))

        # Whole images come in many sizes: compiling for each would cost more than it saves.
        with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
            return evaluate(
                self.net,
                self.val_reader,
                cfg,
                device=self.device,
                prototypes=self.prototypes,
                affinity_trained=self.step_fn.schedule.affinity_trained(self.done),
                par=self.par,
                dtype=self.dtype,
                on_batch=on_batch,
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
            masks_every=cfg.train.at(cfg.train.picture_every) if self.folder.home is not None and is_main() else 0,
            cache_dir=cfg.data.cache_dir,
            cache_disk_mb=cfg.data.cache_disk_mb,
            patience_s=cfg.data.storage_patience_s,
        )

    def _on_device(self) -> OnDevice:
        """What the loader leaves to the device; a quarter of the bytes is enough for a GPU, a CPU gains nothing."""
        wanted = self.cfg.data.on_device
        if wanted == "auto":
            return "normalize" if self.device.type == "cuda" else "none"
        return wanted

    def _means(self, window: list[dict[str, Tensor]], local: dict[str, float]) -> dict[str, float]:
        """Mean of each named value over the steps that have it, over ranks; one transfer.

        Args:
            window: Of the steps that were taken: the same ones on every rank.
            local: Further values of this rank.
        """
        names = sorted({k for w in window for k in w})
        means = [torch.stack([w[k].double() for w in window if k in w]).mean() for k in names]
        speed = torch.tensor(list(local.values()), dtype=torch.float64).to(self.device, non_blocking=True)
        values = mean_over_ranks(torch.cat([torch.stack(means), speed]) if means else speed).tolist()
        return dict(zip([*names, *local], values, strict=True))
