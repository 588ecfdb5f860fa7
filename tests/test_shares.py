"""Lengths of a schedule as shares of the run: one key shortens any shipped configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import tiny_tree
from ugrl import config
from ugrl.config import TrainConfig
from ugrl.errors import ConfigError
from ugrl.train.loop import Trainer
from ugrl.train.optim import lr_factor

SHIPPED = sorted(p.stem for p in (Path(config.__file__).parent / "configs").glob("*.yaml"))


def schedule(cfg: config.Config) -> tuple[int, int, int]:
    t = cfg.train
    return t.at(t.lr_warmup_iters), t.at(t.cls_warmup_iters), t.at(cfg.method.cam.propagate_after)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("steps", [1, 2, 200])
def test_one_key_shortens_any_shipped_configuration(name: str, steps: int) -> None:
    cfg = config.load(name, {"train.steps": steps})
    lr, cls, propagate = schedule(cfg)
    assert 0 < lr <= cls < max(2, steps) and 0 < propagate <= steps
    assert cfg.train.at(cfg.train.eval_every) >= 1 and cfg.train.at(cfg.train.checkpoint_every) >= 1
    assert config.build(config.to_dict(cfg)) == cfg


def test_own_lengths_are_those_of_the_paper() -> None:
    assert schedule(config.load("voc")) == (1500, 2000, 6000)
    assert schedule(config.load("coco"))[:2] == (1500, 5000)
    # The public codes compare with "at most": their first step with another loss is one later, counted from 0.
    assert schedule(config.load("voc-afa")) == (1500, 2001, 6001)
    assert schedule(config.load("coco-afa")) == (1500, 5001, 15001)
    assert schedule(config.load("voc-ugrl"))[:2] == (1500, 2001)
    assert schedule(config.load("coco-ugrl"))[:2] == (1500, 5001)
    assert schedule(config.load("shapes"))[:2] == (40, 300)
    assert schedule(config.load("coco100"))[:2] == (10, 40)
    assert schedule(config.build({})) == (1500, 2000, 6000)


def test_a_share_is_the_number_of_steps_it_stands_for(shards: Path) -> None:
    share, number = TrainConfig(steps=200, lr_warmup_iters=0.1), TrainConfig(steps=200, lr_warmup_iters=20)
    assert [lr_factor(k, share) for k in range(200)] == [lr_factor(k, number) for k in range(200)]
    assert lr_factor(19, share) < 1 and lr_factor(20, share) == 0.9
    cfg = config.build(tiny_tree(steps=4, cls_warmup_iters=0.5, lr_warmup_iters=0.25, eval_every=0.5))
    steps: list[int] = []
    trainer = Trainer(cfg, shards=shards, out=None, quiet=True, device="cpu")
    trainer.hooks.on_eval = lambda step, _: steps.append(step)
    seen: dict[int, bool] = {}
    trainer.hooks.on_log = lambda step, values: seen.update({step: "seg" in values})
    trainer.fit()
    assert seen == {1: False, 2: False, 3: True, 4: True}  # the segmentation is trained after the warm-up
    assert steps == [2, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.cls_warmup_iters=1.5"], "is 1.5; expected a number of steps, or a share of train.steps below 1"),
        (["train.cls_warmup_iters=true"], "is true; expected a number of steps, or a share"),
        (["train.cls_warmup_iters=many"], "is 'many'; expected a number of steps, or a share"),
        (["train.lr_warmup_iters=-0.1"], "is -0.1; expected ≥ 0"),
        (["train.lr_warmup_iters=.nan"], "expected a number of steps, or a share"),
        (["train.cls_warmup_iters=1e300"], "is 1e+300; expected a number of steps, or a share"),
        (["train.eval_every=0"], "is 0; expected > 0"),
        (["train.eval_every=1.0"], "is 1.0: one step, or the whole run? For one step write 1"),
        (["train.checkpoint_every=1e0"], "one step, or the whole run?"),
        (["train.cls_warmup_iters=0.99999"], "is 0.99999; expected < train.steps 20000"),
        (["method.cam.propagate_after=2.5"], "expected a number of steps, or a share"),
    ],
)
def test_what_is_neither_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as info:
        config.load("voc", config.parse_overrides(words))
    assert message in str(info.value) and "\n" not in str(info.value)
