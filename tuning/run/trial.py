"""What a trial's process does: the trainer, once for each seed, and a report for each validation.

A one-worker trial is the trainer itself in a process that is used again for the next trial: torch is imported, the
device is open, and decoded images stay (``data.cache_mb``). One with more workers is a driver that holds no CPU and
starts Ray Train, whose reports come back to Tune. Either way Tune sees one report per validation, under the step that
the trainer counts, and one at the end of each seed.

A run that was begun before, by this process or another one, goes on from its last checkpoint.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tuning.ledger.job import ERROR_FILE, LEAVE
from tuning.space.space import trial_config
from tuning.study.record import STEP
from ugrl import config as configs
from ugrl.config import Config
from ugrl.errors import CheckpointError, NoRoomError, UgrlError, free_text, is_full
from ugrl.ownership import LostError, fence, own
from ugrl.storage import Place, place
from ugrl.text import line
from ugrl.train import checkpoint
from ugrl.train.interrupt import Interrupted

# What the trainer's log calls the costs, and how many of them make one of ours.
LOGGED = {"step_s": ("step_s", 1.0), "device_memory_mb": ("memory_gb", 2**20 / 1e9)}
# How often a trial's process looks whether its driver wants it to leave, in seconds.
LOOK_S = 0.5
# How long whoever wrote to a run's folder before is waited for, in seconds.
OWNER_PATIENCE_S = 600.0
Report = Callable[[dict[str, Any]], None]


def run_trial(task: Mapping[str, Any], shared: Mapping[str, Any], report: Report) -> None:
    """One trial: train at a point with each of its seeds, report each validation.

    A training that fails is reported as ``{"error": …}``, and its traceback left in the trial's ``error.txt``: Tune
    starts a trial again only if its process died.

    Args:
        task: From :meth:`tuning.ledger.trial_queue.TrialQueue.task`.
        shared: What all trials share: ``base`` (a plain configuration), ``split``, ``shards``, ``workers``, ``cpus``,
            ``gpus``, ``groups`` (trials side by side), ``flops`` (whether to count them).
        report: Where reports go.
    """
    folder = Path(task["folder"])
    base = configs.build(shared["base"])
    costs: dict[str, float] = {}

    def work() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ERROR_FILE).unlink(missing_ok=True)
        for seed in task["seeds"]:
            cfg = trial_config(base, task["point"], shared["split"], seed)
            if shared["flops"] and not costs:
                costs["gflop"] = count_flops(cfg, place(shared["shards"]))
            run_seed(cfg, folder / f"seed_{seed}", task, shared, costs, report)

    try:
        with_room(work, patience_s=base.data.storage_patience_s, leave=asked_to_leave(folder, task["owner"]))
    except Interrupted:
        report({"left": True})
    except NoRoomError as error:
        report({"unplaced": str(error)})
    except Exception as error:
        if is_full(error):
            report({"full": f"trial {task['number']}: {line(error)}; {free_text(folder)}"})
            return
        known = isinstance(error, UgrlError)
        text = str(error) if known else "".join(traceback.format_exception(error))
        (folder / ERROR_FILE).write_text(text.strip() + "\n", encoding="utf-8")
        report({"error": text.strip().splitlines()[-1]})


def with_room(work: Callable[[], None], *, patience_s: float, leave: Callable[[], bool]) -> None:
    """Do what goes on where it was left; while its disk is full, it is begun again and again.

    Args:
        work: May fail anywhere.
        patience_s: How long a disk may be full before its error is raised.
        leave: Whether to give up.

    Raises:
        Interrupted: It was asked to leave.
    """
    until: float | None = None
    while True:
        began = time.monotonic()
        try:
            return work()
        except Exception as error:
            # A checkpoint has been tried for that long already.
            if not is_full(error) or isinstance(error, CheckpointError):
                raise
            now = time.monotonic()
            if until is None or now - began > 2 * patience_s + LOOK_S:  # it has got on since it was last refused
                until = now + patience_s
            if now >= until:
                raise
        if leave():
            raise Interrupted(0)
        time.sleep(LOOK_S)


class Reports:
    """Makes the reports of one run of a trial.

    Args:
        seed: Of the run.
        before: Seconds that it has trained in earlier starts.
        costs: Cost → value, filled while it runs.
    """

    def __init__(self, seed: int, before: float, costs: dict[str, float]) -> None:
        self.seed, self.before, self.costs = seed, before, costs
        self.since, self._windows = time.time(), 0

    def log(self, values: Mapping[str, float]) -> None:
        """Take the costs of a training line: the most memory of the run, and its mean step without the first line's."""
        found = logged_costs(values)
        if "memory_gb" in found:
            found["memory_gb"] = max(found["memory_gb"], self.costs.get("memory_gb", 0.0))
        if "step_s" in found:
            if self._windows > 1:
                found["step_s"] = self.costs["step_s"] + (found["step_s"] - self.costs["step_s"]) / self._windows
            self._windows += 1
        self.costs.update(found)

    def made(self, step: int, metrics: Mapping[str, float], **more: Any) -> dict[str, Any]:
        """A report at a step."""
        seconds = self.before + time.time() - self.since
        return {**self.costs, **metrics, STEP: int(step), "seed": self.seed, "seconds": seconds, **more}


def run_seed(
    cfg: Config, out: Path, task: Mapping[str, Any], shared: Mapping[str, Any], costs: dict[str, float], report: Report
) -> None:
    """One run of a trial: trained, unless it has been before, and measured."""
    shards = place(shared["shards"])
    # Where a driver was killed, its trials' processes live on until Ray notices, and the driver that takes them over
    # may be faster. Where it was only silent for too long, they find another owner before they write again.
    driver = fence(place(out.parent), task["owner"])
    with own(place(out), patience_s=OWNER_PATIENCE_S) as held:

        def check() -> None:
            held.check()
            driver()

        check()
        reports = Reports(cfg.seed, float(task["before"].get(str(cfg.seed), 0.0)), costs)
        state = _state(out)
        if state is None or not state.ends(cfg.train.steps):
            train = train_on_workers if shared["workers"] > 1 else train_here
            more = {"check": check, "leave": asked_to_leave(out.parent, task["owner"]), "owner": held.id}
            train(cfg, shards, out, {**shared, **more}, reports, report)
            state = _state(out)
        if state is None:
            raise UgrlError(f"{out}: holds no checkpoint after its training")
        seconds = reports.made(state.step, {})["seconds"]
        final = measure(cfg, shards, out, task["final"], shared) if task["final"] else {}
    report({**reports.made(state.step, state.metrics, ended=True, final=final), "seconds": seconds})


def asked_to_leave(folder: Path, owner: str) -> Callable[[], bool]:
    """Whether a trial's driver wants its process to write a checkpoint and go; looks every :data:`LOOK_S`."""
    looked, found = -LOOK_S, False

    def asked() -> bool:
        nonlocal looked, found
        if not found and time.monotonic() - looked >= LOOK_S:
            looked = time.monotonic()
            try:
                found = (folder / LEAVE).read_text(encoding="utf-8") == owner
            except FileNotFoundError:
                pass
        return found

    return asked


def _state(out: Path) -> checkpoint.State | None:
    found = checkpoint.latest(place(out))
    return checkpoint.read_state(found) if found is not None else None


# Decoded training images that the next trial of this process will see again.
_KEPT: dict[tuple[str, str, int], Any] = {}


def train_here(
    cfg: Config, shards: Place, out: Path, shared: Mapping[str, Any], reports: Reports, report: Report
) -> None:
    """Train in this process; a checkpoint in ``out`` is continued."""
    import torch

    from ugrl.train.loop import Trainer
    from ugrl.train.observer import Hooks

    torch.set_num_threads(max(1, int(shared["cpus"])))
    if torch.cuda.is_available() and 0 < shared["gpus"] < 1:
        # So that a trial that asks for too much fails by itself, and not its neighbours on the same GPU.
        torch.cuda.set_per_process_memory_fraction(shared["gpus"])
        torch.cuda.empty_cache()

    hooks = Hooks(
        on_eval=lambda step, metrics: report(reports.made(step, metrics)),
        on_log=lambda step, values: reports.log(values),
        stop=shared["leave"],
        before_write=shared["check"],
    )
    found = checkpoint.latest(place(out))
    Trainer(cfg, shards=shards, out=out, hooks=hooks, loader=kept_loader, resume_from=found, quiet=True).fit()


def kept_loader(spec: Any) -> Any:
    """The local loader, with the decoded images that the trial before it left."""
    from ugrl.data.cache import PixelCache
    from ugrl.train.batches import local_loader

    if spec.data.cache_mb <= 0:
        return local_loader(spec)
    key = (place(spec.shards).where, spec.split, spec.data.cache_mb)
    if key not in _KEPT:
        _KEPT.clear()  # one data set at a time
        _KEPT[key] = PixelCache(spec.data.cache_mb)
    return local_loader(spec, _KEPT[key])


def train_on_workers(
    cfg: Config, shards: Place, out: Path, shared: Mapping[str, Any], reports: Reports, report: Report
) -> None:
    """Train on workers of Ray Train; an inner failure is Train's to repair, and the trial fails when Train gives up."""
    from cluster.channel import DriverChannel
    from cluster.launch import launch

    channel, ended = DriverChannel.open(), threading.Event()

    def lost() -> bool:
        try:
            shared["check"]()
        except LostError:
            return True
        return False

    def watch() -> None:
        while not ended.wait(LOOK_S):
            if shared["leave"]() or lost():
                channel.request_stop()
                return

    thread = threading.Thread(target=watch, name="leave", daemon=True)
    thread.start()
    try:
        launch(
            cfg,
            shards=shards,
            out=out,
            workers=shared["workers"],
            callbacks=[_relay(reports)],
            groups=shared["groups"],
            channel=channel,
            owner=shared["owner"],
        )
    finally:
        ended.set()
        thread.join()
        channel.close()


def _relay(reports: Reports) -> Any:
    """The callback of Ray Train that passes rank 0's validations on to the trial: one report for each of them.

    A checkpoint alone is no report.
    """
    from ray.tune.integration.ray_train import TuneReportCallback

    from cluster.worker import EVALUATED  # brings Ray Train, which a trial of one worker does not need

    class Relay(TuneReportCallback):
        step = -1.0

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            """Called by the controller once all ranks have reported."""
            found = metrics[0]
            # A run that was repaired repeats the validations since its checkpoint.
            if found.get(EVALUATED) and found["step"] > self.step:
                self.step = found["step"]
                scores = {k: v for k, v in found.items() if k not in (EVALUATED, *LOGGED)}
                reports.log(found)
                super().after_report(run_context, [reports.made(int(found["step"]), scores)], None)

    return Relay()


def logged_costs(values: Mapping[str, float]) -> dict[str, float]:
    """The costs among the values of a training line.

    >>> logged_costs({"step_s": 0.5, "device_memory_mb": 1024.0, "lr": 1.0})
    {'step_s': 0.5, 'memory_gb': 1.073741824}
    """
    return {ours: values[name] * factor for name, (ours, factor) in LOGGED.items() if name in values}


def count_flops(cfg: Config, shards: Place) -> float:
    """GFLOP of a training step, one image; see :func:`ugrl.train.flops.step_gflop`."""
    from ugrl.data.shards import Manifest
    from ugrl.train.flops import step_gflop

    return step_gflop(cfg, len(Manifest.load(shards).class_names))


def measure(cfg: Config, shards: Place, out: Path, split: str, shared: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a finished run on another split, from its last checkpoint.

    Where the run had workers, a worker's share of the cluster is asked for: the driver itself holds no GPU.
    """
    from ugrl.train.measure import measure_run

    if shared["workers"] <= 1:
        return measure_run(str(out), shards, split)
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from cluster.capacity import capacity, worker_resources

    each = worker_resources(cfg, capacity())
    # Apart from Tune's own group, in which this driver runs; a task alone that finds no room would wait without end.
    room = placement_group([each])
    try:
        if not room.wait(cfg.cluster.busy_s):
            text = " and ".join(f"{v:g} {k}s" for k, v in each.items())
            raise NoRoomError(f"{out}: no room to measure it: {text} for {cfg.cluster.busy_s:g} s (cluster.busy_s)")
        share = {"num_cpus": each["CPU"], "num_gpus": each.get("GPU", 0.0)}
        remote = ray.remote(**share, scheduling_strategy=PlacementGroupSchedulingStrategy(room))(measure_run)
        return dict(ray.get(remote.remote(str(out), shards.where, split)))
    finally:
        remove_placement_group(room)
