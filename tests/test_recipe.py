"""The published recipe as configuration: files that say what they do, padding on every path, passes in parts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.test_recipe_afa import CLASSES, SMALL, batch_of
from tests.test_train import close, losses, run
from tuning.space.space_file import build_space
from ugrl import config
from ugrl.data.augment import IMAGENET_MEAN, IMAGENET_STD, Augment
from ugrl.data.make import BatchMaker
from ugrl.errors import ConfigError
from ugrl.method.losses import affinity_loss, eligible_tokens
from ugrl.train import checkpoint
from ugrl.train.accumulate import run_step
from ugrl.train.build import build_net, build_par, build_prototypes
from ugrl.train.flops import step_gflop
from ugrl.train.step import Step
from ugrl.types import Batch, Row

RECIPES = ("voc-afa", "coco-afa", "voc-ugrl", "coco-ugrl")
SHIPPED = sorted((Path(config.__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_no_shipped_file_tells_when_to_do_what_it_does_not_do(path: Path) -> None:
    cam = config.read_yaml(path).get("method", {}).get("cam", {})
    assert "propagate_after" not in cam or cam.get("propagate", "none") != "none"
    assert config.load(path).name == path.stem


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_given_to_a_search(name: str) -> None:
    space = build_space(
        {"config": name, "search": {"method.cam.high": {"uniform": [0.5, 0.6]}}, "trials": 2, "seed": 0}
    )
    base = space.base()
    assert base.data.pad == "black" and base.method.cam.extent == "crop" and base.method.loss.balance == "fg_bg"
    assert base.method.setting == ("Base" if name.endswith("afa") else "IV")


def test_voc_and_coco_are_the_projects_own() -> None:
    plain = config.build({})
    for name in ("voc", "coco"):
        cfg = config.load(name)
        for key in ("data.pad", "data.rounding", "model.pool_extent", "model.init", "method.cam.extent"):
            assert config.get(cfg, key) == config.get(plain, key)
        assert cfg.method.cam.propagate == "none" and cfg.method.loss.balance == "none"
        assert cfg.train.head_decay == "weights" and cfg.train.amp == "auto"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.cam.mode=train", "method.cam.share=always"], "method.cam.share is always; expected exact or never"),
        (["method.cam.mode=train", "method.cam.share=warmup"], "method.cam.share is warmup; expected exact or never"),
        (["method.cam.propagate=afa", "method.cam.refine=none"], "method.cam.refine is none; expected par"),
        (
            ["method.cam.propagate=afa", "method.loss.lambda3=0"],
            "method.loss.lambda3 is 0: nothing trains the affinity",
        ),
        (["data.pad=grey"], "'data.pad' is 'grey'; expected one of mean, black"),
        (["train.head_decay=none"], "'train.head_decay' is 'none'; expected one of weights, all"),
    ],
)
def test_what_clashes_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as info:
        config.load("voc", config.parse_overrides(words))
    assert message in str(info.value) and "\n" not in str(info.value)


# -- crops -----------------------------------------------------------------------------------------------------------


def rows() -> list[Row]:
    out, rng = [], np.random.default_rng(0)
    for k, (width, height) in enumerate([(61, 43), (90, 70), (33, 120), (40, 40)]):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
        out.append(Row(f"r{k}", file.getvalue(), width, height, (1,)))
    return out


def made(on_device: Any, pad: str) -> Batch:
    maker = BatchMaker(Augment(96, 1, 0.3, 1.0, pad=pad), seed=1, on_device=on_device)
    draft = maker.start(4)
    for k, row in enumerate(rows()):
        maker.fill(draft, k, row, 0)
    return maker.finish(draft).to("cpu")


@pytest.mark.parametrize("on_device", ["none", "normalize", "augment"])
def test_padding_is_black_before_it_is_normalised(on_device: str) -> None:
    black, mean = made(on_device, "black"), made(on_device, "mean")
    want = -torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)
    assert want.tolist() == pytest.approx([-2.12, -2.04, -1.80], abs=0.005)
    for k, (y0, y1, x0, x1) in enumerate(black.boxes_B4.tolist()):
        outside = torch.ones(96, 96, dtype=torch.bool)
        outside[y0:y1, x0:x1] = False
        assert outside.any()
        torch.testing.assert_close(
            black.images_B3HW[k][:, outside], want[:, None].expand(-1, int(outside.sum())), rtol=1e-6, atol=0
        )
        assert torch.equal(black.images_B3HW[k][:, ~outside], mean.images_B3HW[k][:, ~outside])
    if on_device == "normalize":
        assert torch.equal(black.images_B3HW, made("none", "black").images_B3HW)


def test_every_loader_makes_its_batches_by_the_configuration() -> None:
    """The local loader and Ray's both take :meth:`BatchMaker.of`."""
    cfg = config.load("voc-afa")
    augment = Augment.of(cfg.data, 20)
    assert (augment.pad, augment.rounding) == ("black", "floor")
    for file in ("ugrl/data/loader.py", "cluster/ray_data.py"):
        assert "BatchMaker.of(spec" in (Path(__file__).parents[1] / file).read_text()


def test_scaled_sides_are_cut_downwards() -> None:
    class Draws:
        def random(self, count: int) -> list[float]:
            return [0.0, 0.9, 0.0, 0.0]

    sides = []
    for rounding in ("nearest", "floor"):
        cut = Augment(512, 1, 0.599, 0.599, rounding=rounding).cut(375, 500, Draws())  # type: ignore[arg-type]
        sides.append((cut.y.scaled, cut.x.scaled))
    assert sides == [(225, 300), (224, 299)]  # of 224.6 and 299.5


# -- losses and passes -----------------------------------------------------------------------------------------------


def test_pairs_of_a_cell_with_itself_and_one_pair_more() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 9, generator=g, dtype=torch.float64)
    labels = torch.tensor([[[0, 0, 1], [1, 255, 1], [2, 2, 0]], [[255] * 3, [0, 255, 255], [255] * 3]])
    eligible = torch.ones_like(labels, dtype=torch.bool)
    same, other = [], []
    for b in range(2):
        flat = labels[b].flatten().tolist()
        for i in range(9):
            for j in range(9):
                close = abs(i // 3 - j // 3) <= 1 and abs(i % 3 - j % 3) <= 1
                if close and 255 not in (flat[i], flat[j]):
                    p = float(logits[b, i, j].sigmoid())
                    same.append(1 - p) if flat[i] == flat[j] else other.append(p)
    want = 0.5 * sum(same) / (len(same) + 1) + 0.5 * sum(other) / (len(other) + 1)
    assert float(affinity_loss(logits, labels, eligible, radius=1, as_afa=True)) == pytest.approx(want, rel=1e-12)
    tokens = eligible_tokens(labels, eligible)
    part = torch.stack([logits[b][tokens[b]][:, tokens[b]] for b in range(2)])
    few = affinity_loss(part, labels, eligible, radius=1, tokens_Bn=tokens, as_afa=True)
    assert float(few) == pytest.approx(want, rel=1e-12)
    assert float(affinity_loss(logits, labels, eligible, radius=1)) != pytest.approx(want, rel=1e-3)


def gradients(name: str, step: int, *, parts: int = 0, **keys: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    cfg = config.load(name, {**SMALL, **keys, "train.micro_batch": parts})
    net = build_net(cfg, CLASSES).double().train()
    step_fn = Step(cfg, net, build_prototypes(cfg, CLASSES, net.dim).double(), build_par(cfg))
    out = run_step(step_fn, batch_of(step, "padded"), step, micro_batch=parts)
    state = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    state |= {n: x for n, x in net.named_buffers() if "running" in n}
    return {k: float(v) for k, v in out.terms.items()}, state


@pytest.mark.parametrize("name", ["voc-afa", "voc-ugrl"])
def test_pairs_keep_the_labels_of_the_cam_that_did_not_walk(name: str) -> None:
    """With and without a contrastive loss."""
    found = []
    for propagate in ("none", "afa"):
        cfg = config.load(name, {**SMALL, "method.cam.propagate": propagate, "method.cam.propagate_after": 1})
        net = build_net(cfg, CLASSES).double().train()
        step_fn = Step(cfg, net, build_prototypes(cfg, CLASSES, net.dim).double(), build_par(cfg))
        found.append(step_fn.targets(batch_of(6001, "padded"), 6001))
    plain, walked = found
    assert not torch.equal(plain.labels_BHW, walked.labels_BHW)
    assert torch.equal(plain.coarse_Bhw, walked.coarse_Bhw)


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_step_of_a_recipe_takes_can_be_counted(name: str) -> None:
    """A dry run and a search count it, after the propagation has begun."""
    cfg = config.load(name, SMALL)
    once = config.load(name, {**SMALL, "method.cam.scales": [1.0]})
    assert step_gflop(cfg, CLASSES) > step_gflop(once, CLASSES) > 0


@pytest.mark.parametrize("name", ["voc-afa", "voc-ugrl"])
def test_a_batch_in_parts_is_the_same_step(name: str) -> None:
    whole, parts = gradients(name, 6001), gradients(name, 6001, parts=1)
    assert parts[0] == pytest.approx(whole[0], rel=1e-9)
    largest = max(float(x.abs().max()) for x in whole[1].values())
    for key, value in whole[1].items():
        torch.testing.assert_close(parts[1][key], value, rtol=1e-7, atol=1e-10 * largest)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.pool_extent", "box"),
        ("model.init", "own"),
        ("method.cam.extent", "box"),
        ("method.cam.mode", "eval"),
        ("method.cam.propagate", "none"),
        ("method.cam.propagate", "affinity"),
        ("method.loss.balance", "none"),
        ("method.loss.affinity_labels", "centre"),
    ],
)
def test_each_key_of_the_recipe_moves_the_step(key: str, value: str) -> None:
    """What the comparison with the transcription would not see if a key did nothing."""
    recipe, other = gradients("voc-afa", 6001)[0], gradients("voc-afa", 6001, **{key: value})[0]
    assert abs(recipe["total"] - other["total"]) > 1e-6


def test_two_ranks_train_the_recipe_as_one_does(shards: Path, tmp_path: Path) -> None:
    """A whole run of ``voc-afa``: warm-up, plain labels, labels of the CAM that walked, validation, checkpoint."""
    keys = {
        "data.crop": 48,
        "data.threads": 0,
        "method.cam.propagate_after": 3,
        "train.steps": 5,
        "train.global_batch": 4,
        "train.lr_warmup_iters": 1,
        "train.cls_warmup_iters": 1,
        "train.log_every": 1,
        "train.eval_every": 5,
        "train.checkpoint_every": 5,
    }
    tree = config.to_dict(config.load("voc-afa", {**SMALL, **keys}))
    run(tree, shards, tmp_path / "one")
    run(tree, shards, tmp_path / "two", world=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 6 and any(key.endswith("tag_f1_image") for key in one[-1])
    for a, b in zip(one, two, strict=True):
        close(a, b, rel=1e-8, floor=1e-12)
    a, b = (load_file(checkpoint.find(tmp_path / n) / "model.safetensors") for n in ("one", "two"))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-8, atol=1e-11)
