"""``voc-afa`` against a second transcription of AFA's step, in float64: losses, labels, gradients, weights, rates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference_afa import BLACK, IGNORED, Afa, Heads, Settings, rate
from ugrl.config import Config, load
from ugrl.method.cam import CamPass
from ugrl.method.targets import TargetMaker, Targets
from ugrl.model.encoder import attention_logits
from ugrl.model.network import UGRLNet
from ugrl.model.noise import Noise
from ugrl.seeding import generator
from ugrl.train.accumulate import run_step
from ugrl.train.build import build_net, build_par, build_prototypes
from ugrl.train.optim import Optimizer, lr_factor
from ugrl.train.step import Step
from ugrl.types import Batch

CLASSES, IMAGES, SIZE = 3, 4, 64
SMALL = {
    "data.crop": SIZE,
    "model.backbone": "tiny",
    "model.weights": None,
    "model.decoder_dim": 16,
    "model.drop_path": 0.3,
    "model.dropout": 0.2,
    "method.cam.par_iterations": 3,
    "method.uncertainty.d_cls": 16,
    "method.uncertainty.radius": 1,
    "method.cam.high": 0.4,
    "method.cam.low": 0.3,
    "method.contrast.d_seg": 8,
}
BOXES = {
    "whole": [[0, SIZE, 0, SIZE]] * IMAGES,
    "padded": [[0, 64, 9, 57], [17, 64, 0, 64], [5, 44, 20, 63], [0, 64, 0, 64]],
}


class Recording(TargetMaker):
    """Keeps what it made last."""

    last: Targets

    def __call__(self, *args: Any) -> Targets:
        self.last = super().__call__(*args)
        return self.last


def batch_of(step: int, boxes: str) -> Batch:
    """Coloured squares on noise, of the class's colour; black around the boxes."""
    g = generator("afa", step)
    images = torch.from_numpy(g.normal(0, 0.4, (IMAGES, 3, SIZE, SIZE)))
    tags = torch.zeros(IMAGES, CLASSES, dtype=torch.float64)
    for b, (y0, y1, x0, x1) in enumerate(BOXES[boxes]):
        for f in g.permutation(CLASSES)[: 1 + b % 2]:
            y, x = g.integers(y0, y1 - 20), g.integers(x0, x1 - 20)
            images[b, f, y : y + 20, x : x + 20] += 2.0
            tags[b, f] = 1
        inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        images[b] = torch.where(inside, images[b], torch.tensor(BLACK, dtype=torch.float64)[:, None, None])
    ids = tuple(f"{step}-{b}" for b in range(IMAGES))
    return Batch(ids, images, tags, torch.tensor(BOXES[boxes]), None, tags.nonzero())


def afa_of(cfg: Config, net: UGRLNet) -> Afa:
    """The transcription, with a copy of the project's encoder and of its weights."""
    encoder, info = copy.deepcopy(net.encoder), net.encoder.info

    def encode(images: Tensor, path: Tensor | None) -> tuple[list[Tensor], Tensor]:
        features, pairs = encoder(images, None if path is None else Noise(path, None))
        return list(features), attention_logits(pairs, info.heads)

    s = Settings(
        CLASSES,
        cfg.model.decoder_dim,
        cfg.model.dropout,
        high=cfg.method.cam.high,
        low=cfg.method.cam.low,
        par_rounds=cfg.method.cam.par_iterations,
        radius=cfg.method.uncertainty.radius,
    )
    heads = Heads(list(info.dims), info.heads * info.blocks, s).double()
    twins = dict(zip(heads_of(net), heads.parameters(), strict=True))
    own = dict(net.named_parameters())
    with torch.no_grad():
        for name, mine in twins.items():
            mine.copy_(own[name].view_as(mine))
    return Afa(encoder, encode, heads, s)


def heads_of(net: UGRLNet) -> list[str]:
    """Parameters of the project's heads, in the order of the transcription's; g_seg is none of AFA's."""
    names = ["classifier.weight", "g_cls.out.weight", "g_cls.out.bias"]
    names += [f"decoder.project.{k}.{part}" for k in range(4) for part in ("weight", "bias")]
    names += ["decoder.fuse.weight", "decoder.norm.weight", "decoder.norm.bias"]
    names += ["decoder.classify.weight", "decoder.classify.bias"]
    every = [n for n, _ in net.named_parameters() if not n.startswith(("encoder.", "g_seg."))]
    assert sorted(names) == sorted(every)
    return names


def near(mine: Tensor, theirs: Tensor, scale: float = 0.0) -> None:
    """Equal but for rounding, against the largest number of the tensor or of all tensors."""
    mine, theirs = mine.detach().reshape(-1), theirs.detach().reshape(-1)
    assert float((mine - theirs).abs().max()) <= 1e-9 * max(float(theirs.abs().max()), scale)


def drops(step_fn: Step, batch: Batch, step: int) -> tuple[Tensor, Tensor, dict[tuple[float, bool], Tensor | None]]:
    """The random numbers of a step: of the training pass, of its decoder, and of the CAM's passes."""
    noise, paths = step_fn.noise(batch, step), {}
    for scale in step_fn.cfg.method.cam.scales:
        for mirrored in (False, True):
            one = step_fn.noise(batch, step, CamPass(scale, mirrored))
            assert one is not None
            paths[scale, mirrored] = one.drop_path_BL
    assert noise is not None and noise.drop_path_BL is not None and noise.dropout_BD is not None
    return noise.drop_path_BL, noise.dropout_BD, paths


def twins_of(net: UGRLNet, afa: Afa) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters of both by the project's name, g_seg left out."""
    own = dict(net.named_parameters())
    mine = dict(zip(heads_of(net), afa.heads.parameters(), strict=True))
    mine |= {f"encoder.{name}": p for name, p in afa.encoder.named_parameters()}
    assert mine.keys() | {n for n in own if n.startswith("g_seg.")} == own.keys()
    return {name: (own[name], p) for name, p in mine.items()}


def settings_of(adamw: torch.optim.Optimizer) -> dict[int, tuple[float, float]]:
    """Rate and decay by parameter."""
    return {id(p): (g["lr"], g["weight_decay"]) for g in adamw.param_groups for p in g["params"]}


@pytest.mark.parametrize("boxes", ["whole", "padded"])
@pytest.mark.parametrize("first", [1999, 6000])
def test_three_steps_are_those_of_the_transcription(first: int, boxes: str) -> None:
    """From the last two steps of the warm-up, and from the last one before the CAM walks."""
    cfg = load("voc-afa", SMALL)
    net = build_net(cfg, CLASSES).double().train()
    afa, par = afa_of(cfg, net), build_par(cfg)
    prototypes = build_prototypes(cfg, CLASSES, net.dim).double()
    step_fn = Step(cfg, net, prototypes, par)
    step_fn.target_maker = maker = Recording(cfg, prototypes, par, stride=net.stride)
    optimizer, twins = optimizer_of(cfg, net), twins_of(net, afa)
    for step in range(first, first + 3):
        batch = batch_of(step, boxes)
        ours = run_step(step_fn, batch, step)
        theirs = afa.losses(step, batch.images_B3HW, batch.tags_BF, BOXES[boxes], *drops(step_fn, batch, step))
        theirs["total"].backward()
        late = step > 2000
        assert set(ours.terms) == ({"cls", "seg", "aux", "total"} if late else {"cls", "total"})
        for name, value in ours.terms.items():
            near(value, theirs[name])
        if late:
            assert maker.last.labels_BHW is not None and maker.last.coarse_Bhw is not None
            assert torch.equal(maker.last.labels_BHW, afa.seg_labels)
            assert torch.equal(maker.last.coarse_Bhw, afa.labels[:, ::8, ::8])
            assert {0, IGNORED} < set(afa.seg_labels.unique().tolist())  # and some class
            assert torch.equal(afa.labels, afa.seg_labels) == (step <= 6000)
        largest = max(float(p.grad.abs().max()) for _, p in twins.values() if p.grad is not None)
        for one, two in twins.values():
            assert one.grad is not None and two.grad is not None
            near(one.grad, two.grad, largest)
        optimizer.step(step)
        optimizer.zero_grad()
        afa.move(step)
        mine, other = settings_of(optimizer.adamw), settings_of(afa.adamw)
        for name, (one, two) in twins.items():
            (lr, decay), (want_lr, want_decay) = mine[id(one)], other[id(two)]
            assert lr == pytest.approx(want_lr, rel=1e-12) and (decay == want_decay or lr == 0), name
            near(one.detach(), two.detach())
    if first == 6000:  # every step of them was one whose passes move the statistics
        near(running(net.decoder.norm)[0], running(afa.heads.norm)[0])
        near(running(net.decoder.norm)[1], running(afa.heads.norm)[1])


def running(norm: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


def optimizer_of(cfg: Config, net: UGRLNet) -> Optimizer:
    t = cfg.train
    return Optimizer(
        net,
        net.parameter_groups(
            t.lr, t.head_lr_ratio, t.weight_decay, t.norm_lr_mult, cfg.model.layer_decay, t.head_decay
        ),
        t,
    )


def test_rates_of_all_steps_are_those_of_the_transcription() -> None:
    train = load("voc-afa").train
    mine = [lr_factor(step, train) for step in range(train.steps)]
    assert mine == pytest.approx([rate(step, Settings(20, 256, 0.1)) for step in range(20000)], rel=1e-12)
    assert mine[0] == pytest.approx(1e-6) and mine[1500] == 1 - 1500 / 20000 == max(mine[1500:])


@pytest.mark.parametrize("name", ["voc-afa", "voc-ugrl"])
def test_every_parameter_of_the_heads_decays(name: str) -> None:
    cfg = load(name, SMALL)
    net = build_net(cfg, CLASSES)
    groups = {g["name"]: g for g in optimizer_of(cfg, net).adamw.param_groups}
    heads = [p for n, p in net.named_parameters() if not n.startswith("encoder.")]
    assert {id(p) for p in groups["head"]["params"]} == {id(p) for p in heads}
    assert groups["head"]["weight_decay"] == 0.01 and groups["head"]["lr"] == pytest.approx(6e-4)
    assert groups["backbone_norm"]["lr"] == 0 and groups["backbone_norm"]["params"]


def test_first_weights_are_those_that_were_measured() -> None:
    """On MiT-B1's widths: class logits 0.037 and classifier 0.026, read off AFA's network."""
    cfg = load("voc-afa", {"model.weights": None})
    net = build_net(cfg, 20)
    assert float(net.classifier.weight.std()) == pytest.approx(0.026, abs=0.001)
    assert float(net.decoder.classify.weight.std()) == pytest.approx(0.037, abs=0.002)
    assert float(net.decoder.fuse.weight.std()) == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert float(net.g_cls.out.weight.abs().max()) < 3 and float(net.g_cls.out.weight.std()) > 0.2
    plain = build_net(load("voc", {"model.weights": None}), 20)
    assert float(plain.decoder.classify.weight.std()) == pytest.approx(0.01, rel=0.1)
    for name, value in net.encoder.state_dict().items():  # only the heads differ
        assert torch.equal(value, plain.encoder.state_dict()[name])
