"""What a search finds for what it spends, and what it wastes.

``search/…``: a sampler and a scheduler against random search without early stopping, through the project's own study,
ledger and pruners. Trials are not trained: their learning curves come from :mod:`bench.surrogate`, with noise as
large as measured. Compute is counted in training steps of all slots. Random search spends a fixed number of whole
trials; the target is the highest true value (the surrogate's, without noise) among them; ours is the compute after
which the other search has finished a trial that is, in truth, as good. A search that is not there after
:data:`PATIENCE` times random's compute counts as if it were there at that moment: its ratio is 0.5 at most.
``search/random`` is random search with other seeds against itself: how far luck alone carries a ratio from 1. What a
search names as its best, by noisy values, is another matter, and in the notes: telling good trials apart is what
repeats and final runs are for.

``tuning/…``: a search with Ray on this machine, of trainings that take a second: what a trial costs beside its
training, with processes that are used again and with a new one for each trial.
"""

from __future__ import annotations

import heapq
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.measure import Context, Different, Entry, Skipped, entry

if TYPE_CHECKING:
    from bench.surrogate import Surrogate
    from tuning.ledger.ledger import Ledger
    from tuning.space.search import Search
    from tuning.study.record import TrialRow

# --- sample efficiency --------------------------------------------------------------------------------------------

BUDGET = 40
SLOTS = 2
PATIENCE = 2
# As in tuning/shapes.yaml: half of the run, and one half of those that come there goes on.
ASHA = {"name": "asha", "grace_steps": 120, "reduction_factor": 2}
METHODS: dict[str, dict[str, Any]] = {
    "search/tpe-asha": {"sampler": "tpe", "scheduler": ASHA},
    "search/tpe": {"sampler": "tpe", "scheduler": {"name": "none"}},
    "search/random-asha": {"sampler": "random", "scheduler": ASHA},
    "search/tpe-hyperband": {"sampler": "tpe", "scheduler": ASHA | {"name": "hyperband"}},
    "search/random": {"sampler": "random", "scheduler": {"name": "none"}},
}
RANDOM = METHODS["search/random"]
NAMES = tuple(METHODS)
Point = Mapping[str, Any]
Curves = Callable[[Point, int], Sequence[float]]


@dataclass(frozen=True)
class Found:
    """A trial that came to its last step.

    Attributes:
        compute: Training steps of all slots, at that moment.
        point: Of the trial.
        score: That was measured.
    """

    compute: int
    point: Point
    score: float


def play(
    ledger: Ledger,
    curves: Curves,
    steps: Sequence[int],
    *,
    slots: int,
    until: Callable[[int, list[Found]], bool],
) -> list[Found]:
    """Run a search as Tune would, in simulated time: reports of several slots arrive by turns, and each is judged.

    Args:
        ledger: Over the study.
        curves: (point, number of the trial) → the objective at each validation.
        steps: Of the validations.
        slots: Trials side by side.
        until: Asked after the reports of each moment, with the compute so far and all that was found.

    Returns:
        The trials that were not stopped, by time.
    """
    found: list[Found] = []
    name = ledger.search.objective
    running: dict[int, tuple[str, Point, int, Sequence[float], int]] = {}
    clock: list[tuple[int, int]] = []
    begun = 0

    def begin(slot: int, now: int) -> None:
        nonlocal begun
        begun += 1
        task = ledger.take(f"t{begun}")
        if isinstance(task, dict):
            curve = curves(task["point"], task["number"])
            running[slot] = f"t{begun}", task["point"], task["seeds"][0], curve, 0
            heapq.heappush(clock, (now + steps[0], slot))

    for slot in range(slots):
        begin(slot, 0)
    while clock:
        now, slot = heapq.heappop(clock)
        trial, point, seed, curve, k = running[slot]
        report = {name: float(curve[k]), "step": steps[k], "seed": seed, "seconds": float(steps[k])}
        stopped, last = ledger.judge(trial, report), k + 1 == len(steps)
        if last and not stopped:
            ledger.judge(trial, report | {"ended": True})
            found.append(Found(slots * now, point, float(curve[k])))
        if last or stopped:
            ledger.end(trial)
            begin(slot, now)
        else:
            running[slot] = trial, point, seed, curve, k + 1
            heapq.heappush(clock, (now + steps[k + 1] - steps[k], slot))
        # Another slot may report at the same moment.
        if not (clock and clock[0][0] == now) and until(slots * now, found):
            break
    ledger.leave()
    return found


Truth = Callable[[Point], float]


def reached(found: Sequence[Found], truth: Truth, target: float, most: int) -> int:
    """Compute after which a search had a trial whose true value is the target; ``most`` where it never did."""
    return min((f.compute for f in found if truth(f.point) >= target), default=most)


def named(found: Sequence[Found], truth: Truth, compute: int) -> float:
    """The true value of the trial that a search would name after so much compute: the best by what was measured."""
    before = [f for f in found if f.compute <= compute]
    return truth(max(before, key=lambda f: f.score).point)


class World:
    """A space whose trials a surrogate stands in for.

    Args:
        surrogate: Fitted.
        objective: Its name.
        folder: Nothing is written to it but what a search writes by itself.
    """

    def __init__(self, surrogate: Surrogate, objective: str, folder: Path) -> None:
        self.surrogate, self.objective, self.folder = surrogate, objective, folder
        self._known: dict[tuple, Sequence[float]] = {}

    def truth(self, point: Point) -> Sequence[float]:
        """The curve without noise."""
        key = tuple(point[a.path] for a in self.surrogate.axes)
        if key not in self._known:
            self._known[key] = self.surrogate.truth([point])[0]
        return self._known[key]

    def final(self, point: Point) -> float:
        """The value of the last step without noise."""
        return float(self.truth(point)[-1])

    def search(self, method: Mapping[str, Any], seed: int, until: Callable[[int, list[Found]], bool]) -> list[Found]:
        """One simulated search; its points, its noise and its decisions follow from the seed."""
        import numpy as np
        import optuna

        from bench.surrogate import SPACE
        from tuning.ledger.ledger import Ledger
        from tuning.ledger.trial_queue import TrialQueue
        from tuning.space.options import Objective
        from tuning.space.search import Search
        from tuning.space.space_file import build_space
        from tuning.study.lease import Lease
        from tuning.study.store import quiet_optuna
        from tuning.study.study import open_study
        from ugrl.storage import place

        quiet_optuna()
        # More trials than can be begun: what ends the search is its compute.
        trials = 4 * PATIENCE * BUDGET
        space = build_space(SPACE | {"budget": {"trials": trials}, "seed": seed, **method})
        objectives = (Objective(self.objective),)
        search = Search(space, space.base(), place(self.folder / "shards"), objectives, self.folder)
        study = open_study(
            space,
            self.folder,
            create=True,
            objectives=objectives,
            steps=search.steps,
            storage=optuna.storages.InMemoryStorage(),
        )

        def curves(point: Point, number: int) -> Sequence[float]:
            rng = np.random.default_rng((seed, number))
            return self.truth(point) + self.surrogate.noise(self.final(point), rng)

        with Lease(study, slots=SLOTS) as lease:
            return play(
                Ledger(TrialQueue(study, search, lease)), curves, self.surrogate.steps, slots=SLOTS, until=until
            )


def efficiency(ctx: Context) -> Iterator[Entry]:
    """Every method against random search, repeat by repeat."""
    from bench.surrogate import DATA, Measured, Surrogate

    data = Measured.load(DATA)
    ctx.log("search: the surrogate")
    surrogate = Surrogate(data)
    world = World(surrogate, data.objective, ctx.tmp / "search")
    repeats, whole = 5 if ctx.quick else 20, BUDGET * surrogate.steps[-1]
    most = PATIENCE * whole

    baseline = []
    for seed in range(repeats):
        ctx.log(f"search: random search {seed + 1} of {repeats}")
        baseline.append(world.search(RANDOM, seed, lambda compute, _: compute >= whole))
    for name, method in METHODS.items():
        if not ctx.wants(name):
            continue
        ours, ahead = [], []
        for seed, random in enumerate(baseline):
            ctx.log(f"{name}: {seed + 1} of {repeats}")
            target = max(world.final(f.point) for f in random)

            def through(compute: int, found: list[Found], target: float = target) -> bool:
                there = reached(found, world.final, target, most) < most
                return compute >= most or (compute >= whole and there)

            found = world.search(method, 1000 + seed if method is RANDOM else seed, through)
            ours.append(reached(found, world.final, target, most))
            ahead.append(named(found, world.final, whole) - named(random, world.final, whole))
        note = _words(ours, ahead, whole, surrogate)
        yield entry(name, ours, [whole] * repeats, unit=f"steps, n={repeats}", note=note)


def _words(ours: Sequence[int], ahead: Sequence[float], whole: int, surrogate: Surrogate) -> str:
    low, middle, high = statistics.quantiles([whole / o for o in ours], n=4)
    points = [100 * a for a in ahead]
    error = statistics.stdev(points) / len(points) ** 0.5
    missed = sum(o >= PATIENCE * whole for o in ours)
    return (
        f"training steps until a search has a trial that is, without noise, as good as the best of random search's "
        f"{BUDGET} whole trials, {SLOTS} at a time; {len(ours)} repeats, quartiles of the ratio {low:.2f}, "
        f"{middle:.2f}, {high:.2f}; {missed} were not there after {PATIENCE} times its compute and count as that; the "
        f"trial that the search itself would name, at equal compute: {statistics.fmean(points):+.2f} ± {error:.2f} "
        f"points of random search's; objective: a Gaussian process on measured learning curves "
        f"({surrogate.describe()})"
    )


def entries(ctx: Context) -> Iterator[Entry | Skipped]:
    """The entries of sample efficiency."""
    missing = [name for name in ("optuna", "scipy") if find_spec(name) is None]
    if missing:
        yield from (Skipped(n, f"{missing[0]} is not installed") for n in NAMES if ctx.wants(n))
        return
    yield from efficiency(ctx)


# --- overhead -----------------------------------------------------------------------------------------------------

OVERHEAD_S = 2.0
TRIALS = 8
TINY: dict[str, Any] = {
    "config": "shapes",
    "overrides": {
        "data.crop": 32,
        "data.shapes.train": 40,
        "data.shapes.val": 6,
        "data.shapes.size": 32,
        "data.threads": 1,
        "train.steps": 9,
        "train.lr_warmup_iters": 1,
        "train.cls_warmup_iters": 2,
        "train.eval_every": 3,
        "train.checkpoint_every": 9,
        "train.picture_every": 1000,
        "train.keep_checkpoints": 1,
        "method.uncertainty.d_cls": 64,
        "method.contrast.d_seg": 32,
    },
    "budget": {"trials": TRIALS},
    "scheduler": {"name": "none"},
    "search": {"train.lr": {"loguniform": [1e-4, 1e-2]}},
}


@dataclass(frozen=True)
class Cost:
    """What a search's trials held a slot for.

    Attributes:
        first: Seconds outside training of the first trial of each slot.
        later: And of the others, with the pause before them.
        busy: Share of the slots' time, from the first trial's begin to the last one's end, that was training.
    """

    first: tuple[float, ...]
    later: tuple[float, ...]
    busy: float


def costs(rows: Sequence[TrialRow], slots: int) -> Cost:
    """The costs of complete trials, by when they began and ended and what their runs say that they trained."""
    start, end = min(r.started for r in rows), max(r.ended for r in rows)
    free = [start] * slots  # since when a slot waits
    first, later = [], []
    used: set[int] = set()
    for row in sorted(rows, key=lambda r: r.started):
        # The slot that became free last before the trial began is its own.
        slot = max(range(slots), key=lambda k: (free[k] <= row.started, free[k] if k in used else start))
        (later if slot in used else first).append(row.ended - free[slot] - sum(r.seconds for r in row.runs))
        used.add(slot)
        free[slot] = row.ended
    trained = sum(run.seconds for row in rows for run in row.runs)
    return Cost(tuple(first), tuple(later), trained / (slots * (end - start)))


def tiny_search(out: Path, shards: Any) -> Search:
    """A search of trainings of a second."""
    from tuning.space.options import Objective
    from tuning.space.search import Search
    from tuning.space.space_file import build_space

    space = build_space(TINY)
    return Search(space, space.base(), shards, (Objective("seg_miou"),), out)


def session(out: Path, shards: Any, *, reuse: bool) -> list[TrialRow]:
    """One search on the cluster that is running; its trials."""
    from cluster.capacity import capacity
    from tuning.run.driver import run_search
    from tuning.study.lease import Lease
    from tuning.study.record import read_trials
    from tuning.study.study import open_study

    search = tiny_search(out, shards)
    out.mkdir(parents=True)
    study = open_study(search.space, out, create=True, objectives=search.objectives, steps=search.steps)
    with Lease(study, slots=SLOTS) as lease:
        run_search(search, study, capacity(), lease, reuse=reuse)
    rows = read_trials(study, search.objectives)
    if [r.state for r in rows] != ["COMPLETE"] * TRIALS:
        raise Different(f"tuning: trials ended as {[r.state for r in rows]}: {rows[0].error}")
    return rows


class overhead:  # noqa: N801
    """The entries of the harness's own cost; stands for a module of :mod:`bench.__main__`."""

    NAMES = ("tuning/trial", "tuning/first", "tuning/idle")

    @staticmethod
    def entries(ctx: Context) -> Iterator[Entry | Skipped]:
        """Rounds of a search with processes that are used again, and of one with a new process for each trial."""
        if find_spec("ray") is None or find_spec("optuna") is None:
            yield from (Skipped(n, "Ray or Optuna is not installed") for n in overhead.NAMES if ctx.wants(n))
            return
        from bench import ray_use
        from tuning.study.store import quiet_optuna
        from ugrl.train.run import ensure_shards

        quiet_optuna()
        os.environ.setdefault("UGRL_DATA", str(ctx.tmp / "data"))
        shards = ensure_shards(tiny_search(ctx.tmp, None).base, None)
        found: dict[bool, list[Cost]] = {True: [], False: []}
        rounds = 1 if ctx.quick else 3
        with ray_use.private_cluster(cpus=SLOTS):
            for k in range(rounds):
                for reuse in (True, False) if k % 2 == 0 else (False, True):
                    ctx.log(
                        f"tuning: round {k + 1} of {rounds}, processes {'used again' if reuse else 'for each trial'}"
                    )
                    rows = session(ctx.tmp / f"tuning-{k}-{reuse}", shards, reuse=reuse)
                    found[reuse].append(costs(rows, SLOTS))
        sides = found[True], found[False]
        what = f"{TRIALS} trials of 9 steps of 32 px, {SLOTS} at a time; processes used again; a new one for each trial"
        ours, baseline = ([statistics.median(c.later) for c in side] for side in sides)
        note = f"seconds of a slot outside training, a trial after the slot's first one: {what}"
        yield entry("tuning/trial", ours, baseline, limit=OVERHEAD_S, note=note)
        ours, baseline = ([statistics.fmean(c.first + c.later) for c in side] for side in sides)
        note = f"the same, mean over all trials, the first ones included, which import torch: {what}"
        yield entry("tuning/first", ours, baseline, note=note)
        ours, baseline = ([100 * (1 - c.busy) for c in side] for side in sides)
        note = f"share of the slots' time, first begin to last end, that is not training: {what}"
        yield entry("tuning/idle", ours, baseline, unit="%", note=note)
