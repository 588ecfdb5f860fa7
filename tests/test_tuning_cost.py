"""What a dry run says: operations counted without doing them, and trials as a scheduler lets them through."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

from tests.searches import SOUND
from tuning import cli
from tuning.dryrun import cost_of, expected
from tuning.space.space_file import build_space
from tuning.study.sampling import make_pruner
from ugrl import config as configs
from ugrl.config import Config
from ugrl.train import flops

SMALL: dict[str, Any] = {"data.crop": 32, "method.contrast.d_seg": 32, "method.uncertainty.d_cls": 64}


def small(**more: Any) -> Config:
    return configs.load("shapes", {**SMALL, **more})


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"method.cam.share": "never", "method.uncertainty.encoding": "fourier", "method.cam.refine": "par"},
        {"method.setting": "Base", "method.loss.lambda3": 0},
        {"method.contrast.keep": 1.0, "method.contrast.tile": 16},
        {"method.contrast.scope": "batch", "model.affinity": "mlp", "model.norm": "group"},
    ],
)
def test_operations_counted_on_the_meta_device_are_those_of_a_real_step(more: dict[str, Any]) -> None:
    cfg = small(**{"data.crop": 64, **more})
    cpu = torch.device("cpu")
    step = flops._made(cfg, 3, cpu)
    step.target_maker.counts_on_host = False
    real = flops._counted(step, flops._batch(cfg, 3, 1, cpu), cfg.train.steps - 1)
    assert flops.step_gflop(cfg, 3) == pytest.approx(real, rel=0.01)


def test_a_grouped_convolution_is_counted_by_its_groups() -> None:
    x, w = torch.ones(1, 6, 8, 8, requires_grad=True), torch.ones(6, 1, 3, 3, requires_grad=True)
    with flops._Counter() as counter:
        torch.nn.functional.conv2d(x, w, padding=1, groups=6).sum().backward()
    assert counter.flop == 3 * 2 * 9 * 6 * 64  # forward, and the gradients of image and weights


def test_seconds_of_a_step_follow_from_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = small(**{"data.crop": 128})
    gflop = flops.step_gflop(cfg, 3)
    monkeypatch.setattr(flops, "TIMED_GFLOP", 0.2)
    assert flops._timed_crop(cfg, 0.2 / gflop) == 32
    seen: list[Any] = []
    make = flops._batch

    def batch(*args: Any) -> Any:
        seen.append(args)
        return make(*args)

    ticks = iter(range(100))
    monkeypatch.setattr(flops, "_batch", batch)
    monkeypatch.setattr("time.thread_time", lambda: next(ticks))
    found = flops.step_seconds(cfg, 3, torch.device("cpu"), gflop)
    ((timed, _, images, _),) = seen
    # The clock ticks once between start and end, so that the small step takes a second.
    share = gflop * cfg.train.global_batch / (flops.step_gflop(timed, 3) * images)
    assert found == pytest.approx(share, rel=0.05) and share > 10


@pytest.mark.parametrize(
    ("scheduler", "trials"),
    [
        ({"name": "asha", "grace_steps": 3, "reduction_factor": 2}, 8),
        ({"name": "asha", "grace_steps": 3, "reduction_factor": 3}, 30),
        ({"name": "hyperband", "grace_steps": 3, "reduction_factor": 3}, 40),
        ({"name": "median", "grace_steps": 9}, 30),
        ({"name": "none"}, 5),
    ],
)
def test_what_a_scheduler_is_expected_to_let_through_is_what_it_does(scheduler: dict[str, Any], trials: int) -> None:
    steps, rounds = 27, 20
    overrides = {**SOUND["overrides"], "train.steps": steps}
    space = build_space({**SOUND, "overrides": overrides, "trials": trials, "scheduler": scheduler})
    rng, spent, whole = random.Random(0), 0, 0
    for _ in range(rounds):
        study = optuna.create_study(direction="maximize", pruner=make_pruner(space, steps))
        for _ in range(trials):
            trial, merit = study.ask(), rng.random()
            for step in range(1, steps + 1):
                trial.report(merit, step)
                if stopped := step < steps and trial.should_prune():
                    break
            spent, whole = spent + step, whole + (not stopped)
            study.tell(trial, None if stopped else merit, TrialState.PRUNED if stopped else TrialState.COMPLETE)
    guess = expected(space, steps)
    assert guess.whole == pytest.approx(whole / rounds, rel=0.15)
    assert guess.share == pytest.approx(spent / rounds / trials / steps, rel=0.1)


def test_a_trial_that_was_stopped_has_no_further_seed() -> None:
    tree = {**SOUND, "trials": 8, "repeats": {"seeds": 3}, "final": {"best": 2, "seeds": 2}}
    space = build_space(tree)
    found, cost = expected(space, 9), cost_of(space, 9, 2.0)
    assert 0 < found.whole < 8
    assert cost.runs == pytest.approx(8 * found.share + 2 * found.whole)
    assert cost.finals == 4 and cost.seconds == pytest.approx((cost.runs + 4) * 9 * 2.0)
    free = build_space({**tree, "scheduler": {"name": "none"}})
    assert cost_of(free, 9, 2.0).runs == 24


WORDS = ["--dry-run", "--space", "voc", "model.backbone=tiny", "model.weights=null", "data.crop=64"]


def dry(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(words) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_space_that_wants_gpus_is_told_in_gpu_hours(capsys: pytest.CaptureFixture[str]) -> None:
    shown = dry(WORDS, capsys)
    assert "on this machine's CPU:" in shown
    assert "on 2 GPUs a trial, as the space wants:" in shown and "GPU-hours the search" in shown
    there = dry([*WORDS, "--step-s", "20"], capsys)
    assert "with --step-s: 20 s a step, 4.6 days a run" in there and "GPU-hours, " in there
    assert "months the search" in there and "years" not in there
    assert "too much: make it smaller: train.steps=2000" in there


def test_a_minimal_space_is_planned_and_its_cost_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("config: shapes\ntrials: 4\nsearch:\n  train.lr: {loguniform: [1e-4, 1e-2]}\n")
    shown = dry(["--dry-run", "--space", str(file), "data.crop=32", "method.contrast.d_seg=32"], capsys)
    assert "asha, rungs at 800 of 1200 steps, 1 in 3 goes on" in shown
    assert "on this machine's CPU:" in shown and "GPU-hours" not in shown and "warning" not in shown
    assert "too much" not in shown


def test_a_weak_rung_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    shown = dry(
        ["--dry-run", "--space", "shapes", "--step-s", "0.1", "data.crop=32", "train.cls_warmup_iters=0.7"], capsys
    )
    assert "warning: the first rung, at step 240, is 16 steps after the warm-ups" in shown
