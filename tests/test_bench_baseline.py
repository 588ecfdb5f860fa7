"""The public recipe of ``bench/baseline`` and the project's own step: the same numbers by other ways.

As the recipe computes everything in its plain form, this is at once the test that the rewrites are exact: fused
attention, composed decoder, CAM of present classes alone, affinity as one product, PAR by views, tiled contrast, heads
that answer only where a loss reads them.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.baseline.network import PublicNet
from bench.baseline.step import PublicStep
from bench.validation import Photos, sides
from bench.validation import configuration as validation_configuration
from ugrl.config import Config, build
from ugrl.data.prepare import prepare
from ugrl.data.reader import ShardReader
from ugrl.model import encoder
from ugrl.model.encoder import MiTSpec, attention_logits
from ugrl.model.network import UGRLNet
from ugrl.model.noise import sample_noise
from ugrl.train.build import build_net, build_par, build_prototypes
from ugrl.train.step import Step
from ugrl.types import Batch

CLASSES = 5
#: mit_b0's shape with narrower stages: key grids reduced by 8, 4 and 2, the last stage at stride 16.
NARROW = MiTSpec((16, 16, 40, 64), (1, 2, 1, 2))


@pytest.fixture(autouse=True)
def narrow_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoder.SPECS, "mit_b0", NARROW)


def configuration(backbone: str, setting: str, refine: str, crop: int, **other: object) -> Config:
    tree: dict = {
        "data": {"crop": crop},
        "model": {"backbone": backbone, "decoder_dim": 16, "drop_path": 0.3, "dropout": 0.2},
        "method": {
            "setting": setting,
            "cam": {"scales": [1.0, 0.5, 1.5], "refine": refine, "par_iterations": 3},
            "uncertainty": {"d_cls": 32, "radius": 3},
            "contrast": {"d_seg": 12, "tile": 64},
            "loss": {"lambda1": 0.7, "lambda2": 0.6, "lambda3": 0.5},
        },
        "train": {"steps": 20, "cls_warmup_iters": 2, "lr_warmup_iters": 2},
    }
    for path, value in other.items():
        section, key = path.rsplit("__", 1)
        node = tree
        for name in section.split("__"):
            node = node.setdefault(name, {})
        node[key] = value
    return build(tree)


def smooth(seed: int, crop: int, images: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(images, 3, 6, 6, generator=g, dtype=torch.float64)
    fine = torch.nn.functional.interpolate(coarse, (crop, crop), mode="bicubic")
    return fine + 0.1 * torch.randn(images, 3, crop, crop, generator=g, dtype=torch.float64)


def batch_of(seed: int, crop: int, images: int, *, whole: bool, untagged: bool = False) -> Batch:
    """Images of one to three tags, whole or with padding around a box."""
    g = torch.Generator().manual_seed(100 + seed)
    tags = torch.zeros(images, CLASSES, dtype=torch.float64)
    for b in range(images):
        if untagged and b == images - 1:
            continue
        tags[b, torch.randperm(CLASSES, generator=g)[: 1 + b % 3]] = 1
    boxes = torch.tensor([[0, crop, 0, crop]] * images)
    pictures = smooth(seed, crop, images)
    if not whole:
        for b in range(images):
            y0, x0 = (int(v) for v in torch.randint(0, crop // 3, (2,), generator=g))
            y1, x1 = (crop - int(v) for v in torch.randint(0, crop // 4, (2,), generator=g))
            boxes[b] = torch.tensor([y0, y1, x0, x1])
            kept = pictures[b, :, y0:y1, x0:x1].clone()
            pictures[b] = 0
            pictures[b, :, y0:y1, x0:x1] = kept
    return Batch(tuple(f"{seed}-{b}" for b in range(images)), pictures, tags, boxes, None, tags.nonzero())


def network(cfg: Config) -> UGRLNet:
    """Weights far from their initialisation, so that every part has a say."""
    net = build_net(cfg, CLASSES).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype), alpha=0.1)
    return net.train()


def compare(name: str, ours: Tensor, theirs: Tensor, floor: float = 0.0) -> None:
    scale = float(theirs.detach().abs().max())
    difference = float((ours - theirs).detach().abs().max())
    assert difference <= 1e-8 * scale + floor, f"{name}: {difference:.2e} of {scale:.2e}"


CASES = {
    # name: (backbone, setting, refine, crop, images, whole images, other settings)
    "tiny-IV-par": ("tiny", "IV", "par", 64, 3, True, {}),
    "tiny-IV-none-boxes": ("tiny", "IV", "none", 64, 3, False, {}),
    "tiny-Base-none-boxes": ("tiny", "Base", "none", 72, 2, False, {"method__loss__balance": "fg_bg"}),
    "b0-IV-par": ("mit_b0", "IV", "par", 96, 2, True, {}),
    "b0-IV-none-boxes": ("mit_b0", "IV", "none", 96, 3, False, {"model__affinity": "mlp"}),
    "b0-Base-par": ("mit_b0", "Base", "par", 96, 2, True, {"model__norm": "group"}),
    "b0-III-none-boxes": ("mit_b0", "III", "none", 96, 2, False, {"model__pooling": "gap"}),
    "tiny-IV-no-noise": ("tiny", "IV", "par", 64, 2, True, {"train__stochastic": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_step_has_the_public_recipe_s_losses_and_gradients(case: str) -> None:
    """Two steps after the warm-up: the first gives the prototypes their votes, the second reads them.

    With PAR the boxes hold the whole crop: the public recipe refines the padding along with the image and cuts
    afterwards, the project cuts first, so that padding never reaches the image.
    """
    backbone, setting, refine, crop, images, whole, other = CASES[case]
    cfg = configuration(backbone, setting, refine, crop, **other)
    ours_net = network(cfg)
    their_net = copy.deepcopy(ours_net)
    par = build_par(cfg)
    ours_prototypes = build_prototypes(cfg, CLASSES, ours_net.dim).double()
    their_prototypes = copy.deepcopy(ours_prototypes)
    ours, theirs = Step(cfg, ours_net, ours_prototypes, par), PublicStep(cfg, their_net, their_prototypes, par)

    for step in (2, 3):
        batch = batch_of(step, crop, images, whole=whole, untagged=step == 2)
        for net in (ours_net, their_net):
            net.zero_grad(set_to_none=True)
        a, b = ours(batch, step), theirs(batch, step)
        wanted = {"cls", "seg", "aux", "total"} | ({"ucl"} if setting in ("III", "IV") else set())
        assert a.terms.keys() == b.terms.keys() == wanted
        for name, term in b.terms.items():
            assert float(term) > 0, name
            assert float(a.terms[name]) == pytest.approx(float(term), rel=1e-8), name
        a.loss.backward()
        b.loss.backward()
        grads = {n: p.grad for n, p in their_net.named_parameters()}
        largest = max(float(g.abs().max()) for g in grads.values() if g is not None)
        for name, p in ours_net.named_parameters():
            zero = torch.zeros_like(p)
            # A bias in front of a batch norm has no gradient but rounding.
            compare(
                name, zero if p.grad is None else p.grad, zero if grads[name] is None else grads[name], 1e-12 * largest
            )
        for name, value in their_prototypes.state_dict().items():
            compare(name, ours_prototypes.state_dict()[name].double(), value.double(), 1e-12)
        for name, value in their_net.named_buffers():
            compare(name, ours_net.get_buffer(name).double(), value.double(), 1e-12)


def test_network_has_the_public_outputs() -> None:
    """Each output of a pass by itself, drop-path and dropout included, on an image of odd size."""
    cfg = configuration("mit_b0", "IV", "none", 96)
    net = network(cfg)
    images = smooth(5, 110, 2)[:, :, :97]
    boxes = torch.tensor([[0, 97, 0, 110], [20, 80, 10, 70]])
    noise = sample_noise(0, 3, ["a", "b"], layers=net.layers, channels=16, device="cpu")
    ours = net(images, noise=noise, boxes=boxes, attention=True)
    theirs = PublicNet(copy.deepcopy(net))(images, noise=noise, boxes_B4=boxes, embed=True)
    for i, feature in enumerate(theirs.features):
        compare(f"F{i + 1}", ours.features[i], feature)
    assert theirs.emb_BDhw is not None
    compare("logits", ours.logits_BF, theirs.logits_BF)
    compare("seg", ours.seg_BChw, theirs.seg_BChw)
    compare("affinity", ours.affinity_BNN, theirs.affinity_BNN)
    compare("embeddings", ours.emb_BDhw, theirs.emb_BDhw)
    compare("attention", ours.attn_BMNN, torch.cat(theirs.attentions[-2:], 1))
    features, pairs = net.encoder(images)
    raw, f4, affinity = net.cam(images, affinity=True)
    public_raw, public_f4, public_affinity = PublicNet(net).cam_only(images)
    compare("raw", raw, public_raw)
    compare("F4", f4, public_f4)
    compare("CAM affinity", affinity, public_affinity)
    assert len(theirs.attentions) == sum(net.encoder.spec.depths)
    compare(
        "logits of attention",
        attention_logits(pairs, net.heads),
        torch.cat(PublicNet(net).encode(images, None)[1][-2:], 1),
    )
    assert features[0].shape[1] == 16


@pytest.mark.parametrize("several", [False, True])
def test_validation_has_the_public_miou(several: bool, tmp_path: Path) -> None:
    """Images of three sizes, two of each: batched by size here, one at a time there."""
    prepare(Photos(6, sizes=((70, 50), (50, 70), (64, 64)), classes=4), tmp_path / "photos", tune_val=0, progress=False)
    cfg = validation_configuration("tiny", several)
    cfg = replace(cfg, model=replace(cfg.model, decoder_dim=16))
    ours, theirs = sides(cfg, ShardReader(tmp_path / "photos", "val"), torch.device("cpu"), torch.float64)
    a, b = ours(), theirs()
    assert a.keys() == {"seg_miou", "cam_miou"}
    for name, value in a.items():
        assert 0 < value < 1
        assert value == pytest.approx(b[name], rel=1e-9), name
