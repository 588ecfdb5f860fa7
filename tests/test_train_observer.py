"""The observers of a run: what they are told, and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import tiny_tree
from ugrl.config import build
from ugrl.train.loop import Trainer
from ugrl.train.meter import Pace
from ugrl.train.observer import Observer, Observers
from ugrl.train.progress import Progress

METHODS = [name for name, value in vars(Observer).items() if callable(value) and not name.startswith("_")]


class Recorder(Observer):
    """Notes what it is told, under its name."""

    def __init__(self, told: list[tuple[str, str, tuple]], name: str = "") -> None:
        for method in METHODS:
            setattr(self, method, lambda *args, method=method: told.append((name, method, args)))


def test_several_observers_are_told_everything_in_turn() -> None:
    told: list[tuple[str, str, tuple]] = []
    both = Observers([Recorder(told, "first"), Recorder(told, "second")])
    for k, method in enumerate(METHODS):
        getattr(both, method)(k, method)
    wanted = [(who, method, (k, method)) for k, method in enumerate(METHODS) for who in ("first", "second")]
    assert told == wanted and len(METHODS) == 11


def test_pictures_are_made_where_somebody_draws() -> None:
    drawing = Recorder([])
    drawing.draws = True
    assert not Observers().draws and not Observers([Recorder([])]).draws
    assert Observers([Recorder([]), drawing]).draws


class Watched(Trainer):
    """A run with one observer more."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.told: list[tuple[str, str, tuple]] = []

    def _observers(self, display: Progress, pace: Pace) -> Observers:
        return Observers([*super()._observers(display, pace).all, Recorder(self.told)])


def test_a_run_tells_its_story_in_order(shards: Path, tmp_path: Path) -> None:
    tree = tiny_tree(steps=3, log_every=2, eval_every=2, checkpoint_every=1)
    run = Watched(build(tree), shards=shards, out=tmp_path / "run", quiet=True, device="cpu")
    run.fit()
    story = [(method, *args[:1]) for _, method, args in run.told if method != "on_eval_batch"]
    step = [("on_batch", 1), ("on_step", 1), ("on_checkpoint", 1), ("on_step_end", 1)]
    # A checkpoint belongs to a validation, and is not saved again when the step ends.
    with_eval = ["on_batch", "on_log", "on_step", "on_checkpoint", "on_eval", "on_looks", "on_step_end"]
    assert story == [
        *step,
        *((name, 2) for name in with_eval),
        *((name, 3) for name in with_eval),
        ("on_checkpoint", 3),  # what the last one to be written was
        ("leave", "FINISHED"),
        ("close",),
    ]
    batches = [args for _, method, args in run.told if method == "on_eval_batch"]
    assert {args[0] for args in batches} == {2, 3} and batches[-1][2] == batches[-1][3]
