"""Losses of a few steps against numbers that were written down: a change of the code must not change them unseen.

Images come from a generator and not from files, so that neither a decoder nor a resampler has a say. If a change is
meant to change these numbers, its commit says why and replaces them.
"""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_tree
from ugrl.config import Config, build
from ugrl.grid import inside_pixels
from ugrl.seeding import generator
from ugrl.train.accumulate import run_step
from ugrl.train.build import build_net, build_par, build_prototypes
from ugrl.train.optim import Optimizer
from ugrl.train.step import Step
from ugrl.types import IGNORE, Batch

CLASSES, IMAGES, SIZE, STEPS = 3, 4, 48, 4

# By setting: the losses of the last step.
GOLDEN: dict[str, dict[str, float]] = {
    "Base": {
        "cls": 1.1091147857135688,
        "seg": 1.382053198328856,
        "aux": 0.25023906849671684,
        "total": 1.272344012396126,
        "stat/u_fg": 0.9152538905827718,
        "stat/u_bg": 0.6363458340142462,
        "stat/labelled": 0.5505642361111112,
    },
    "I": {
        "cls": 1.1116165335945443,
        "seg": 1.3820600157573244,
        "aux": 0.2502418508457518,
        "total": 1.274846720254852,
        "stat/u_fg": 0.9153297404218135,
        "stat/u_bg": 0.6365898048485946,
        "stat/share_cls": 0.9991466105967882,
        "stat/labelled": 0.5511067708333334,
    },
    "II": {
        "cls": 1.111628949464732,
        "seg": 1.3812771216373219,
        "aux": 0.250241625328957,
        "total": 1.2747808241613598,
        "stat/u_fg": 0.9153868518308507,
        "stat/u_bg": 0.636552545727687,
        "stat/share_cls": 0.9991467891194824,
        "stat/labelled": 0.5511067708333334,
        "stat/share_seg": 0.9999533647367963,
    },
    "III": {
        "cls": 1.1151163731037,
        "seg": 1.3805922443561083,
        "ucl": 0.0,
        "aux": 0.24880622966511642,
        "total": 1.2780562205058226,
        "stat/u_fg": 0.9063595171563404,
        "stat/u_bg": 0.6472819533694709,
        "stat/share_cls": 0.9991863620996116,
        "stat/labelled": 0.5454644097222222,
        "stat/pool": 0.1909722222222222,
    },
    "IV": {
        "cls": 1.1102817060018846,
        "seg": 1.3855997086661875,
        "ucl": 0.01312414238571908,
        "aux": 0.24994008603659335,
        "total": 1.2751480997107345,
        "stat/u_fg": 0.9089760664306293,
        "stat/u_bg": 0.6383952899681229,
        "stat/share_cls": 0.9991606089669838,
        "stat/labelled": 0.5338541666666666,
        "stat/share_seg": 0.9999761581473389,
        "stat/pool": 0.1857638888888889,
    },
    "Full": {
        "cls": 1.1154638361823426,
        "seg": 1.312189124872388,
        "total": 2.4276529610547306,
        "stat/labelled": 0.9058159722222222,
    },
}


def made(setting: str) -> Config:
    tree = tiny_tree(steps=STEPS, lr=6e-3)
    tree["method"]["setting"] = setting
    tree["method"]["cam"] |= {"refine": "par", "par_iterations": 2, "propagate": "affinity", "propagate_after": 2}
    return build(tree)


def batch_of(step: int) -> Batch:
    """Coloured squares on noise; the colour is the class."""
    g = generator("golden", step)
    images = torch.from_numpy(g.normal(0, 0.3, (IMAGES, 3, SIZE, SIZE)))
    tags = torch.zeros(IMAGES, CLASSES, dtype=torch.float64)
    masks = torch.zeros(IMAGES, SIZE, SIZE, dtype=torch.uint8)
    for b in range(IMAGES):
        for f in g.permutation(CLASSES)[: 1 + b % 2]:
            y, x = g.integers(0, SIZE - 16, 2)
            images[b, f, y : y + 16, x : x + 16] += 2.0
            masks[b, y : y + 16, x : x + 16] = f + 1
            tags[b, f] = 1
    boxes = torch.tensor([[0, SIZE, 0, SIZE], [4, SIZE, 0, 40], [0, 44, 3, SIZE], [0, SIZE, 0, SIZE]])
    masks = masks.where(inside_pixels(boxes, (SIZE, SIZE), masks.device), IGNORE)
    ids = tuple(f"{step}-{b}" for b in range(IMAGES))
    return Batch(ids, images, tags, boxes, masks, tags.nonzero())


def losses(setting: str) -> dict[str, float]:
    cfg = made(setting)
    net = build_net(cfg, CLASSES).double().train()
    step_fn = Step(cfg, net, build_prototypes(cfg, CLASSES, net.dim).double(), build_par(cfg))
    t = cfg.train
    groups = net.parameter_groups(t.lr, t.head_lr_ratio, t.weight_decay, t.norm_lr_mult)
    optimizer = Optimizer(net, groups, t)
    for step in range(STEPS):
        out = run_step(step_fn, batch_of(step), step)
        optimizer.step(step)
        optimizer.zero_grad()
    return {k: v.item() for k, v in out.terms.items()} | {f"stat/{k}": v.item() for k, v in out.stats.items()}


@pytest.mark.parametrize("setting", list(GOLDEN))
def test_a_fixed_seed_gives_the_numbers_that_were_written_down(setting: str) -> None:
    assert losses(setting) == pytest.approx(GOLDEN[setting], rel=1e-6)
