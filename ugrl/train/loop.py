"""The loop: batches in, steps, and whoever observes the run is told. It knows no method and no Ray.

It runs as one process, or as one rank of a process group that somebody else set up; files are
written by rank 0 alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel

from ugrl import config as config_mod
from ugrl.config import Config
from ugrl.data.order import batch_rows
from ugrl.data.spec import LoaderSpec
from ugrl.data.transfer import Transfer
from ugrl.distributed import barrier, is_main, rank, world_size
from ugrl.errors import CheckpointError
from ugrl.eval.evaluate import EvalResult, GivenUp, evaluate
from ugrl.eval.looks import Look, Seer
from ugrl.eval.looks import looks as show
from ugrl.eval.selection import why_no_masks
from ugrl.storage import Place, place
from ugrl.terminal import Terminal
from ugrl.train import checkpoint
from ugrl.train.accumulate import run_step
from ugrl.train.batches import LoaderFactory, local_loader, spec_of
from ugrl.train.build import build_run
from ugrl.train.check import judged_rows
from ugrl.train.checkpoint_writer import CheckpointTimes, Snapshot, snapshot
from ugrl.train.guard import Guard
from ugrl.train.interrupt import STOPPING, Agreement, Interrupted, StopRequest
from ugrl.train.meter import LogWindow, Meter, Pace
from ugrl.train.observer import HookObserver, Hooks, Observer, Observers
from ugrl.train.progress import Progress, TimeLeft, header, tell
from ugrl.train.run_folder import LogFiles, RunFolder
from ugrl.train.tensorboard import TensorBoard
from ugrl.train.tracking import MlflowObserver
from ugrl.train.wandb_tracking import WandbObserver
from ugrl.types import Batch, StepOutput

# Images of the validation split that pictures show, at each validation.
LOOKS = 4


class Trainer:
    """One run of one configuration on one data set.

    Args:
        cfg: Configuration of the run.
        shards: Folder that ``ugrl prepare`` has written.
        out: Where to write, a path or a URI; ``None`` writes nothing. A remote run is written to a local folder first.
        loader: Where batches come from; by default from the shards, in this process.
        hooks: Functions that are called with what happens.
        resume_from: A checkpoint folder to continue from.
        console: For progress and tables.
        quiet: Whether to show no progress.
        device: ``"cuda"`` where there is one, by default.
        dtype: Type of weights and images; ``train.dtype`` by default.

    Attributes:
        done: Steps that are done.
        metrics: Metrics of the last validation, and its ``step``.

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
        parts = build_run(cfg, self.shards, device=device, dtype=dtype, pretrained=resume_from is None)
        self.device, self.dtype = parts.device, parts.dtype
        self.manifest, self.val_reader = parts.manifest, parts.val_reader
        self.class_names = parts.manifest.class_names
        self.objective, self.data = parts.objective, parts.fingerprint
        self.net, self.prototypes, self.par = parts.net, parts.prototypes, parts.par
        self.optimizer, self.step_fn = parts.optimizer, parts.step
        self.compiled = cfg.train.compile != "none"
        self.folder = RunFolder(
            None if out is None else place(out),
            cfg,
            class_names=self.class_names,
            objective=self.objective,
            data=self.data,
            say=self.say,
            check=self.hooks.before_write,
        )
        self.observers: Observer = Observers()
        self.done = 0
        self.metrics: dict[str, float] = {}
        self._saved_at = -1
        if resume_from is not None:
            self._load(checkpoint.find(resume_from))

    def say(self, text: str) -> None:
        """Tell the user, and whoever listens, what happened; from any thread."""
        if is_main():
            if not self.quiet:
                tell(self.console, text)
            self.hooks.on_event(text)

    def _say_waiting(self, text: str) -> None:
        """As :meth:`say`, also on a rank that only the others wait for."""
        if is_main():
            self.say(text)
        else:
            self.hooks.on_event(f"worker {rank()}: {text}")

    # -- checkpoints --------------------------------------------------------------------------

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

    def save(self) -> None:
        """Have the state saved in the background (rank 0), once a step; tell what is whole by now (every rank)."""
        if self._saved_at == self.done:
            return
        self._saved_at = self.done
        self.hooks.check_write()
        self.folder.submit(self._snapshot)
        self._tell_saved(wait=False)

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
            self.observers.on_checkpoint(self.done, None, self.metrics)
        else:
            self.observers.on_checkpoint(self.done, saved.place, saved.metrics)

    # -- the run ------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Train to ``train.steps``; returns the metrics of the last validation.

        The first Ctrl-C or SIGTERM, on any rank, or ``hooks.stop`` ends the step or the validation, writes a checkpoint
        and raises on every rank; the second signal acts at once.

        Raises:
            Interrupted: The run was asked to stop.
            CheckpointError: Checkpoints cannot be written.
            UgrlError: ``train.nan_patience`` steps in a row had no finite loss or gradients; a broken row or shard.
        """
        train = self.cfg.train
        self.hooks.check_write()
        self.folder.open(self.done, judged=self.metrics.get("step") == self.done)
        barrier()  # nobody adds to a log that rank 0 still cuts
        pace = Pace(train.steps, self.step_fn.schedule.warmup, train.at(train.eval_every))
        display = Progress(self.console, train.steps, self.done, enabled=not self.quiet, pace=pace)
        self.observers = self._observers(display, pace)
        status = "FAILED"
        batches = Transfer(self.loader(self.loader_spec()), self.device, self.dtype)
        try:
            self._introduce()
            with display, StopRequest("" if self.quiet or not is_main() else STOPPING) as stop:
                self._loop(batches, pace, stop)
            self._tell_saved(wait=True)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            batches.close()
            self.observers.leave(status)
            self.observers.close()
            self.folder.close()
        barrier()
        return dict(self.metrics)

    def _observers(self, display: Progress, pace: Pace) -> Observers:
        cfg, train, main = self.cfg, self.cfg.train, self.folder.main
        found: list[Observer] = [LogFiles(self.folder, self.hooks)]
        if main is not None and self.folder.home is not None:
            if train.mlflow is not None:
                name, params = self.folder.home.name, config_mod.public_dict(cfg)
                note = main / "mlflow.json"
                found.append(MlflowObserver(train.mlflow, note, name=name, params=params, say=self.say))
            if train.wandb is not None:
                name, params = self.folder.home.name, config_mod.public_dict(cfg)
                found.append(WandbObserver(train.wandb, main, name=name, params=params, say=self.say))
            kind = cfg.method.uncertainty.kind
            found.append(TensorBoard(main / "tb", step=self.done, names=self.class_names, u_kind=kind, say=self.say))
        found += [display, TimeLeft(pace, train.steps, self.say)]
        found += [CheckpointTimes(self.save, train.at(train.checkpoint_every)), HookObserver(self.hooks)]
        return Observers(found)

    def _introduce(self) -> None:
        """Say what is trained on what, and by which metric it is judged."""
        cfg, val = self.cfg, self.cfg.data.val_split
        for text in header(
            cfg,
            device=self.device,
            workers=world_size(),
            parameters=sum(p.numel() for p in self.net.parameters()),
            classes=len(self.class_names),
            train=len(self.manifest.ids(cfg.data.train_split)),
            val=judged_rows(cfg, self.manifest, val),
            objective=self.objective,
            done=self.done,
            loaded=self.net.loaded,
        ):
            self.say(text)
        if self.net.loaded:
            self.folder.note_weights(str(cfg.model.weights), self.net.loaded, self.net.doubt)
        if self.net.doubt:
            self.say(f"warning: model.weights {cfg.model.weights} {self.net.doubt}")
        if cfg.eval.objective == "auto" and (why := why_no_masks(self.manifest, val, self.objective)):
            self.say(why)

    def _loop(self, batches: Iterator[Batch], pace: Pace, stop: StopRequest) -> None:
        train, tell_all, on_cpu = self.cfg.train, self.observers, self.device.type == "cpu"
        eval_every, picture_every = train.at(train.eval_every), train.at(train.picture_every)
        model, guard = self._wrapped(), self._guard()
        agreement, meter, window = Agreement(self.device), Meter(self.device), LogWindow(self.device)

        def wanted() -> bool:
            return stop.requested or self.hooks.stop()

        # Who was stopped in the middle of a validation owes it.
        owes = self.done > 0 and (self.done % eval_every == 0 or self.done == train.steps)
        if owes and self.metrics.get("step") != self.done and not self._evaluate(pace, meter, wanted):
            self._leave(stop, saved=True)
        while self.done < train.steps:
            with meter.data():
                batch = next(batches)
            tell_all.on_batch(self.done + 1, batch.ids)
            pictures = tell_all.draws and (self.done + 1) % picture_every == 0
            out, lr = self._step(model, guard, batch, views=pictures)
            window.add(out)
            if on_cpu:  # where reading a value waits for nothing
                window.judge(guard.collect())
            meter.step(train.global_batch)
            pace.step(self.done)
            last = self.done == train.steps
            if self.done % train.log_every == 0 or last:
                window.judge(guard.collect())
                values = {**window.means(meter.values()), "lr": lr}
                tell_all.on_log(self.done, values | ({"skipped": float(guard.skipped)} if guard.skipped else {}))
            tell_all.on_step(self.done)
            if pictures:
                tell_all.on_pictures(self.done, batch, out.views)
            if (self.done % eval_every == 0 or last) and not self._evaluate(pace, meter, wanted):
                self._leave(stop)
            with meter.pause():
                tell_all.on_step_end(self.done)
            if agreement.stop(wanted()) and self.done < train.steps:
                self._leave(stop)

    def _step(self, model: torch.nn.Module, guard: Guard, batch: Batch, *, views: bool) -> tuple[StepOutput, float]:
        """One step of the optimizer, unless something is not finite; what it yields, and the learning rate."""
        train, step = self.cfg.train, self.done
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        guard.keep()
        amp = self.device.type == "cuda" and train.amp == "auto" and self.dtype == torch.float32
        out = run_step(self.step_fn, batch, step, model=model, views=views, micro_batch=train.micro_batch, amp=amp)
        lr = self.optimizer.step(step, guard.judge(step, out.loss))
        self.optimizer.zero_grad()
        self.done += 1
        return out, lr

    def _evaluate(self, pace: Pace, meter: Meter, stop: Callable[[], bool]) -> bool:
        """Validate and tell all; ``False``, on every rank, where a stop came in between."""
        with meter.pause():
            with pace.validation():
                try:
                    result = self.validate(stop)
                except GivenUp:
                    return False
                looks = self._look() if self.observers.draws else []
            self.metrics = {**result.metrics, "step": float(self.done)}
            self.observers.on_eval(self.done, result)
            if looks:
                self.observers.on_looks(self.done, looks)
            if result.verdict:
                self.say(f"step {self.done}  {result.verdict}")
        return True

    def _leave(self, stop: StopRequest, *, saved: bool = False) -> NoReturn:
        if not saved:
            self.save()
        self._tell_saved(wait=True)
        raise Interrupted(self.done, stop.number)

    def _guard(self) -> Guard:
        return Guard(
            [self.net, self.prototypes],
            list(self.net.parameters()),
            patience=self.cfg.train.nan_patience,
            out=self.folder.main,
            ids_of=self.ids_of,
            say=self.say,
        )

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

    def _eager(self) -> AbstractContextManager[Any]:
        """Whole images come in many sizes: compiling for each would cost more than it saves."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def validate(self, stop: Callable[[], bool] | None = None) -> EvalResult:
        """Evaluate the present network on ``data.val_split``; ``stop`` as of :func:`ugrl.eval.evaluate.evaluate`."""
        cfg, seen = self.cfg, 0
        total = judged_rows(cfg, self.manifest, cfg.data.val_split)

        def on_batch(ids: Sequence[str]) -> None:
            nonlocal seen
            seen += len(ids) * world_size()
            self.observers.on_eval_batch(self.done, ids, seen, total)

        with self._eager():
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
                stop=stop,
            )

    def _look(self) -> list[Look]:
        """What the network makes of :data:`LOOKS` images spread evenly over the validation split, in their order."""
        cfg = self.cfg
        most = judged_rows(cfg, self.manifest, cfg.data.val_split)
        chosen = sorted({(2 * k + 1) * most // (2 * LOOKS) for k in range(LOOKS)}) if most else []
        targets = self.step_fn.target_maker
        seer = Seer(self.net, cfg, self.prototypes, targets, self.done, self.device, self.dtype)
        self.net.eval()
        try:
            with self._eager():
                found = [look for part in show(seer, self.val_reader, chosen) for look in part]
        finally:
            self.net.train()
        return sorted(found, key=lambda look: look.index)

    # -- data ---------------------------------------------------------------------------------

    def loader_spec(self) -> LoaderSpec:
        """What the loader must deliver from here on."""
        return spec_of(
            self.cfg,
            shards=self.shards,
            num_classes=len(self.class_names),
            start_step=self.done,
            device=self.device,
            masks=self.folder.home is not None and is_main(),
            say=self._say_waiting,
        )

    def ids_of(self, step: int) -> list[str]:
        """Images of a step's global batch."""
        cfg, split = self.cfg, self.cfg.data.train_split
        _, rows = batch_rows(
            step, seed=cfg.seed, manifest=self.manifest, split=split, global_batch=cfg.train.global_batch
        )
        ids = self.manifest.ids(split)
        return [ids[int(i)] for i in rows]
