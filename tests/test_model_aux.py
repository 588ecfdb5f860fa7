"""The auxiliary classifier of plain ViTs (ToCo): a second classifier on an earlier block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.backbone_kit import batch, config, network
from tests.contracts import jittered, trained
from tests.reference import classification_loss_loops, numeric_gradient, ref_multi_scale_cam, ref_pseudo_labels
from ugrl.config import Config, build
from ugrl.errors import ConfigError
from ugrl.model.families import check_backbone
from ugrl.model.network import Encoded
from ugrl.train.accumulate import run_step
from ugrl.train.build import build_net, build_par, build_prototypes
from ugrl.train.flops import step_gflop
from ugrl.train.step import Step
from ugrl.types import IGNORE

VIT = "timm/test_vit"


def cfg_of(labels: str = "main", **model: object) -> Config:
    made = config(VIT, 64, aux_classifier=2, drop_path=0.0, dropout=0.0, **model)
    return replace(made, method=replace(made.method, cam=replace(made.method.cam, affinity_from=labels)))


def step_of(cfg: Config) -> Step:
    """A step in float64 that has seen every class."""
    net = jittered(build_net(cfg, 3).double().train())
    step = Step(cfg, net, build_prototypes(cfg, 3, net.dim).double(), build_par(cfg))
    for k in range(3):
        step.targets(batch(64, step=k, dtype=torch.float64), 2)
    return step


@torch.no_grad()
@pytest.mark.parametrize("name", [VIT, "timm/test_vit3", "timm/vit_small_patch16_dinov3"])
def test_the_map_is_that_of_the_earlier_block_normalised(name: str) -> None:
    encoder = network(name, aux_classifier=2).encoder.double()
    seen: list[Tensor] = []
    encoder.body.blocks[-3].register_forward_hook(lambda module, args, out: seen.append(out))
    features, pairs = encoder(torch.randn(2, 3, 64, 96, dtype=torch.float64))
    tokens = encoder.body.norm(seen[0])[:, encoder.prefix :]
    assert len(features) == 5 and features[4].shape == features[3].shape
    torch.testing.assert_close(features[4], tokens.transpose(1, 2).unflatten(2, (4, 6)), rtol=1e-9, atol=1e-9)
    encoded = Encoded(features, pairs)
    again = Encoded.of(encoded.tensors())
    assert len(again.features) == 5 and len(again.pairs) == len(pairs) == 2


def test_everything_else_is_that_of_a_network_without() -> None:
    plain, aux = network(VIT), network(VIT, aux_classifier=1)
    others = dict(aux.named_parameters())
    weight = others.pop("aux_classifier.weight")
    assert weight.shape == (3, aux.dim, 1, 1) and all(torch.equal(p, others[n]) for n, p in plain.named_parameters())
    x = torch.randn(2, 3, 64, 64)
    a, b = plain(x), aux(x)
    assert a.aux_BF is None and b.aux_BF is not None and len(a.features) == len(b.features) == 4
    for name in ("logits_BF", "seg_BChw", "emb_BDhw", "affinity_BNN"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))
    groups = aux.parameter_groups(1e-3, 10.0, 0.1, 0.5)
    assert [g["name"] for g in groups if any(p is aux.aux_classifier.weight for p in g["params"])] == ["head"]


@pytest.mark.parametrize("pooling", ["gmp", "gap"])
def test_its_loss_and_gradient_are_those_of_the_reference(pooling: str) -> None:
    step = step_of(cfg_of(pooling=pooling))
    net, data = step.net, batch(64, dtype=torch.float64)
    weight = net.aux_classifier.weight
    with torch.no_grad():
        f_BDhw = net.encoder(data.images_B3HW)[0][4].numpy()
    pooled = f_BDhw.max((2, 3)) if pooling == "gmp" else f_BDhw.mean((2, 3))
    ones = np.ones((2, 3))

    def loss(w_FD: np.ndarray) -> float:
        logits = [[sum(float(a) * float(b) for a, b in zip(x, w, strict=True)) for w in w_FD] for x in pooled]
        return classification_loss_loops(logits, data.tags_BF.numpy(), ones)

    w_FD = weight.detach().flatten(1).numpy()
    out = step(data, 0)  # a warm-up step: every weight is 1
    out.loss.backward()
    assert out.terms["cls_aux"].item() == pytest.approx(loss(w_FD), rel=1e-9)
    assert out.loss.item() == pytest.approx(out.terms["cls"].item() + out.terms["cls_aux"].item(), rel=1e-12)
    some = np.s_[:, ::16]  # a part of the columns: the loops are slow

    def part(x: np.ndarray) -> float:
        full = w_FD.copy()
        full[some] = x
        return loss(full)

    expected = numeric_gradient(part, w_FD[some].copy())
    np.testing.assert_allclose(weight.grad.flatten(1).numpy()[some], expected, rtol=1e-6, atol=1e-9)


def test_blocks_behind_it_learn_nothing_from_it() -> None:
    net = step_of(cfg_of()).net
    out = net(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    out.aux_BF.sum().backward()
    blocks = net.encoder.body.blocks
    assert all(p.grad is None for block in blocks[-2:] for p in block.parameters())
    assert all(p.grad is not None and p.grad.any() for p in blocks[-3].parameters())


def test_its_cam_labels_the_pairs_where_that_is_asked_for() -> None:
    """By the loops of the reference: several scales, mirror, thresholds; no refinement."""
    cfg = cfg_of("aux")
    step, data = step_of(cfg), batch(64, dtype=torch.float64)
    net, cam = step.net, cfg.method.cam
    targets = step.targets(data, 2)
    w_FD = net.aux_classifier.weight.detach().flatten(1)

    @torch.no_grad()
    def forward(planes: list) -> list:
        image = torch.as_tensor(np.array(planes))[None]
        return list(torch.einsum("fd,dhw->fhw", w_FD, net.encoder(image)[0][4][0]).numpy())

    for b in range(2):
        classes = [int(f) for i, f in data.pairs_P2.tolist() if i == b]
        box = data.boxes_B4[b].tolist()
        planes = ref_multi_scale_cam(forward, data.images_B3HW[b].numpy(), classes, box, cam.scales, cam.mirror)
        labels, _ = ref_pseudo_labels(planes, classes, box, (64, 64), cam.high, cam.low)
        coarse = np.array(labels)[8::16, 8::16]
        assert (targets.coarse_Bhw[b].numpy() == coarse).all()
    main = step_of(cfg_of("main")).targets(data, 2)
    assert (targets.coarse_Bhw != IGNORE).any() and not torch.equal(main.coarse_Bhw, targets.coarse_Bhw)
    torch.testing.assert_close(main.labels_BHW, targets.labels_BHW)
    torch.testing.assert_close(main.cam_PHW, targets.cam_PHW)


@pytest.mark.parametrize("labels", ["main", "aux"])
def test_parts_of_a_batch_are_the_batch(labels: str) -> None:
    cfg, grads = cfg_of(labels), []
    for most in (0, 1):
        step = step_of(cfg)
        out = run_step(step, batch(64, dtype=torch.float64), 2, micro_batch=most)
        assert {"cls", "cls_aux", "seg", "aux"} <= out.terms.keys()
        grads.append({n: p.grad for n, p in step.net.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-6, atol=1e-9, msg=name)


def test_it_learns_also_with_drop_path_and_a_frozen_encoder() -> None:
    tree = {"aux_classifier": 1, "drop_path": 0.3}
    for frozen in ("none", "all"):
        cfg = config(VIT, 64, frozen=frozen, **tree)
        assert all(np.isfinite(v) for v in trained(cfg, 64, micro_batch=1).values())


def test_the_operations_are_counted() -> None:
    with_aux, without = step_gflop(cfg_of("aux"), 3), step_gflop(config(VIT, 64, drop_path=0.0), 3)
    assert with_aux > without


def test_only_plain_vits_have_one() -> None:
    for tree, message in (
        ({"model": {"aux_classifier": 2}}, "mit_b1 is no plain ViT; expected null, or a backbone such as timm/vit_"),
        (
            {"model": {"backbone": VIT}, "method": {"cam": {"affinity_from": "aux"}}},
            "affinity_from is aux; expected main, or model.aux_classifier=2",
        ),
        ({"model": {"backbone": VIT, "aux_classifier": 0}}, "aux_classifier' is 0; expected ≥ 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(tree)
    for name in ("timm/resnet50", "timm/swin_tiny_patch4_window7_224"):
        with pytest.raises(ConfigError, match=f"{name} is no plain ViT"):
            check_backbone(name, 2)
        with pytest.raises(ConfigError, match=f"{name} is no plain ViT"):
            network(name, aux_classifier=2)
    check_backbone(VIT, 2)
    with pytest.raises(ConfigError, match="aux_classifier is 40: timm/test_vit has 6 blocks; expected 1 to 5"):
        network(VIT, aux_classifier=40)
