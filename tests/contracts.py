"""What every backbone, data source, sampler and loss keeps. A new one is tested by inheriting (see CONTRIBUTING.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import Tensor

from tests.backbone_kit import batch, network
from tests.backbone_kit import config as backbone_config
from tests.reference import numeric_gradient
from tuning.space.options import SAMPLERS
from tuning.space.space_file import build_space
from tuning.study.sampling import make_sampler, suggest_point
from ugrl.config import Config
from ugrl.data.images import decode_labels, decode_rgb
from ugrl.data.prepare import prepare
from ugrl.data.reader import ShardReader
from ugrl.data.source import SOURCES, RowError, Source
from ugrl.errors import UgrlError
from ugrl.model.backbone import Backbone
from ugrl.model.network import UGRLNet
from ugrl.row import IGNORE
from ugrl.train.accumulate import run_step
from ugrl.train.build import build_net, build_par, build_prototypes
from ugrl.train.flops import step_gflop
from ugrl.train.optim import Optimizer
from ugrl.train.step import Step


class BackboneContract:
    """What every value of ``model.backbone`` keeps. ``name`` is the value, ``crop`` a training crop that it takes."""

    name: str
    crop = 64
    #: Whether patches or odd maps have a mirror image of their own: F4 of a mirrored image is F4 mirrored, once the
    #: filters are symmetric. ``mirror_size`` is a size at which no padding is one-sided.
    mirror_size = 0
    mirror_model: dict[str, Any] = {}
    #: Share of a weight by which differences are taken.
    difference = 1e-7

    def network(self, **model: Any) -> UGRLNet:
        return network(self.name, **model)

    @pytest.mark.parametrize("more", [0, 1, 13])
    def test_any_size_from_the_least_on(self, more):
        encoder = self.network().encoder
        side = encoder.info.min_size + more
        features, pairs = encoder(torch.randn(1, 3, side, side + 5))
        assert len(features) == 4 and all(torch.isfinite(f).all() for f in features)
        assert tuple(f.shape[1] for f in features) == encoder.info.dims
        cells = features[3].shape[-2] * features[3].shape[-1]
        assert all(t.shape[1] == cells for pair in pairs for t in pair)
        assert (len(pairs) > 0) == (encoder.info.affinity == "attention")
        with pytest.raises(UgrlError, match="too small"):
            encoder(torch.randn(1, 3, encoder.info.min_size - 1, side))

    @torch.no_grad()
    def test_an_image_is_the_same_in_any_batch(self):
        encoder = self.network().encoder.train()
        side = encoder.info.min_size * 2
        images = torch.randn(3, 3, side, side)
        together, alone = encoder(images)[0][3], encoder(images[1:2])[0][3]
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)

    def test_weights_are_a_function_of_the_seed(self):
        a, b = (dict(self.network().named_parameters()) for _ in range(2))
        assert all(torch.equal(a[name], b[name]) for name in a)

    def test_every_parameter_of_the_encoder_learns(self):
        net = self.network().train()
        side = net.encoder.info.min_size * 2
        features, pairs = net.encoder(torch.randn(2, 3, side, side))
        # F4 alone reaches all: a warm-up reads nothing else.
        (features[3] ** 2).mean().backward()
        assert [n for n, p in net.encoder.named_parameters() if p.grad is None] == []
        assert all(t.requires_grad for pair in pairs for t in pair)

    def test_gradients_equal_differences_in_float64(self):
        # A draw where a maximum changes its place within the step has no difference to compare with.
        torch.manual_seed(0)
        net = jittered(self.network().double().train())
        side = net.encoder.info.min_size
        images = torch.randn(1, 3, side, side + 11, dtype=torch.float64)
        weights: list[Tensor] = []

        def value() -> Tensor:
            features, pairs = net.encoder(images)
            parts = [*features, *(t for pair in pairs for t in pair)]
            if not weights:
                weights.extend(torch.randn_like(x) / x.numel() ** 0.5 for x in parts)
            return torch.stack([(w * x).sum() for w, x in zip(weights, parts, strict=True)]).sum()

        params = [p for p in net.encoder.parameters() if p.requires_grad]
        grads = torch.autograd.grad(value(), params)
        along = [torch.randn_like(p) * p.detach().abs().mean().clamp_min(1e-3) for p in params]
        expected = sum((g * v).sum() for g, v in zip(grads, along, strict=True))
        step, ends = self.difference, []
        with torch.no_grad():
            for sign in (1, -1):
                for p, v in zip(params, along, strict=True):
                    p.add_(v, alpha=sign * step)
                ends.append(value())
                for p, v in zip(params, along, strict=True):
                    p.sub_(v, alpha=sign * step)
        assert expected.item() == pytest.approx(((ends[0] - ends[1]) / (2 * step)).item(), rel=1e-3, abs=1e-6)

    def test_layers_and_groups_hold_every_parameter_once(self):
        net = self.network()
        ids, names = net.encoder.layer_ids(), dict(net.encoder.named_parameters())
        assert set(ids) == set(names) and set(ids.values()) == set(range(max(ids.values()) + 1))
        for decay in (1.0, 0.75):
            groups = net.parameter_groups(1e-3, 10.0, 0.1, 0.5, decay)
            found = [id(p) for g in groups for p in g["params"]]
            assert len(found) == len(set(found)) == len(list(net.parameters()))
        rate = {id(p): g["lr"] for g in groups for p in g["params"]}
        stem, last = (max(rate[id(p)] for n, p in names.items() if ids[n] == at) for at in (0, max(ids.values())))
        assert stem == pytest.approx(last * 0.75 ** max(ids.values()))

    def test_frozen_parts_have_no_gradient(self):
        for part in ("stem", "all"):
            net = self.network(frozen=part)
            still = {n for n, p in net.encoder.named_parameters() if not p.requires_grad}
            stem = {n for n, at in net.encoder.layer_ids().items() if at == 0}
            assert still == (stem if part == "stem" else set(net.encoder.layer_ids())) != set()
            learned = {id(p) for g in net.parameter_groups(1e-3, 1.0, 0.1, 1.0) for p in g["params"]}
            assert not learned & {id(p) for n, p in net.encoder.named_parameters() if n in still}

    def test_what_a_frozen_map_is_made_of_stays(self):
        counts = []
        for at, part in enumerate(("f1", "f2", "f3")):
            net = self.network(frozen=part)
            net.train()
            side = self.crop
            maps = net.encoder(torch.randn(1, 3, side, side))[0]
            assert not maps[at].requires_grad and maps[3].requires_grad
            counts.append(sum(not p.requires_grad for p in net.encoder.parameters()))
        assert 0 < counts[0] < counts[1] < counts[2] < len(list(net.encoder.parameters()))

    @torch.no_grad()
    def test_a_mirrored_image_has_mirrored_features(self):
        if not self.mirror_size:
            pytest.skip("the family has a direction: rotary positions, windows, or one-sided padding")
        encoder = network(**{"backbone": self.name, **self.mirror_model}).encoder.double()
        for p in encoder.parameters():
            if p.ndim == 4:  # filters, and position embeddings that are maps
                p.copy_((p + p.flip(-1)) / 2)
        self.symmetric(encoder)
        x = torch.randn(1, 3, self.mirror_size, self.mirror_size, dtype=torch.float64)
        for plain, mirrored in zip(encoder(x)[0], encoder(x.flip(-1))[0], strict=True):
            torch.testing.assert_close(plain.flip(-1), mirrored, rtol=1e-4, atol=1e-6)

    def symmetric(self, encoder: Backbone) -> None:
        """Make symmetric what is no filter."""

    def test_three_steps_of_setting_iv(self):
        cfg = backbone_config(self.name, self.crop)
        numbers = [trained(cfg, self.crop), trained(cfg, self.crop), trained(cfg, self.crop, micro_batch=1)]
        assert all(np.isfinite(v) for v in numbers[0].values()) and numbers[0] == numbers[1]
        # Drop-path follows the image, and no norm looks at the batch: parts of it are the whole.
        assert numbers[2] == pytest.approx(numbers[0], rel=1e-3, abs=1e-4)
        assert {"cls", "seg", "aux", "total"} <= numbers[0].keys()

    def test_a_frozen_encoder_trains_its_heads(self):
        cfg = backbone_config(self.name, self.crop, frozen="all")
        assert trained(cfg, self.crop, steps=3, micro_batch=1) == pytest.approx(
            trained(cfg, self.crop), rel=1e-3, abs=1e-4
        )

    def test_operations_are_counted_without_doing_them(self):
        assert step_gflop(backbone_config(self.name, self.crop), 3) > 1e-3


def jittered(net: UGRLNet) -> UGRLNet:
    """Without the exact zeros of fresh weights: residual branches that give nothing, and ReLUs at their kink."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=g, dtype=p.dtype) * (p.abs().mean() * 0.1 + 0.02))
    return net


def trained(cfg: Config, crop: int, *, steps: int = 3, micro_batch: int = 0) -> dict[str, float]:
    """Losses of the last of some training steps."""
    net = build_net(cfg, 3).train()
    t, step_fn = cfg.train, Step(cfg, net, build_prototypes(cfg, 3, net.dim), build_par(cfg))
    optimizer = Optimizer(net, net.parameter_groups(t.lr, t.head_lr_ratio, t.weight_decay, t.norm_lr_mult), t)
    for step in range(steps):
        out = run_step(step_fn, batch(crop, step=step), step, micro_batch=micro_batch)
        optimizer.step(step)
        optimizer.zero_grad()
    return {k: v.item() for k, v in out.terms.items()}


class SourceContract:
    """What every source of ``ugrl prepare`` keeps. ``source`` opens a small data set with ``train`` and ``val``."""

    name: str

    def source(self, folder: Path) -> Source:
        raise NotImplementedError

    def rows(self, folder: Path) -> Iterator[tuple[Source, str, str]]:
        source = self.source(folder)
        for split, ids in source.splits().items():
            for id in ids:
                yield source, split, id

    def test_it_is_a_source_that_the_command_line_knows(self, tmp_path):
        source = self.source(tmp_path)
        assert isinstance(source, Source) and source.name == self.name and self.name in SOURCES
        splits = source.splits()
        assert set(splits) <= {"train", "val"} and splits["train"]
        names = [id for ids in splits.values() for id in ids]
        assert len(set(names)) == len(names)
        assert len(set(source.class_names)) == len(source.class_names) >= 1

    def test_rows_hold_together(self, tmp_path):
        for source, split, id in self.rows(tmp_path):
            row = source.row(split, id)
            assert row.id == id and row == source.row(split, id)
            assert decode_rgb(row.image, id).shape == (row.height, row.width, 3)
            assert list(row.tags) == sorted(set(row.tags))
            assert set(row.tags) <= set(range(1, len(source.class_names) + 1))
            known = source.tags(split, id)
            assert known is None or known == row.tags
            if row.mask is not None:
                labels = decode_labels(row.mask, id)
                assert labels.size == (row.width, row.height)
                assert set(np.unique(np.asarray(labels))) <= {*range(len(source.class_names) + 1), IGNORE}

    def test_a_broken_image_is_a_row_error_that_names_it(self, tmp_path):
        source = self.source(tmp_path)
        if source.root is None:
            pytest.skip("this source generates its images: there is no file to break")
        for path in tmp_path.rglob("*.jpg"):
            path.write_bytes(b"no image")
        with pytest.raises(RowError, match=r"\.jpg"):
            source.row("train", source.splits()["train"][0])

    def test_shards_give_back_the_same_rows(self, tmp_path):
        source = self.source(tmp_path / "data")
        prepare(source, tmp_path / "shards", tune_val=0, seed=0, progress=False)
        for split, ids in source.splits().items():
            reader = ShardReader(tmp_path / "shards", split)
            assert set(reader.ids) == set(ids)
            for k, id in enumerate(reader.ids):
                assert reader[k] == source.row(split, id)


class SamplerContract:
    """What every value of ``sampler`` in a space file keeps. ``name`` is the value; ``choices`` is ``False`` for a
    sampler that cannot vary a choice.
    """

    name: str
    choices = True
    trials = 12

    def points(self, seed: int = 0) -> list[dict[str, Any]]:
        search: dict[str, Any] = {
            "train.lr": {"loguniform": [1e-5, 1e-1]},
            "method.contrast.keep": {"uniform": [0.1, 0.8], "step": 0.1},
            "method.uncertainty.radius": {"int": [2, 16]},
        }
        if self.choices:
            search["method.uncertainty.d_cls"] = {"choice": [256, 512]}
        tree = {"config": "shapes", "trials": self.trials, "sampler": self.name, "seed": seed, "search": search}
        self.space = build_space({**tree, "scheduler": {"name": "none"}})
        study = optuna.create_study(direction="maximize")
        made = []
        for number in range(self.trials):
            study.sampler = make_sampler(self.space, number)
            trial = study.ask()
            made.append(suggest_point(trial, self.space.search))
            study.tell(trial, made[-1]["method.contrast.keep"])
        return made

    def test_space_files_know_it(self):
        assert self.name in SAMPLERS

    def test_points_lie_in_the_space(self):
        for point in self.points():
            assert all(axis.contains(point[axis.path]) for axis in self.space.search), point

    def test_points_are_a_function_of_the_seed(self):
        first = self.points()
        assert first == self.points() and first != self.points(seed=1)
        assert len({tuple(point.values()) for point in first}) > self.trials // 2


Case = tuple[Callable[[Tensor], Tensor], Callable[[np.ndarray], float], Tensor]


class LossContract:
    """What every term of the loss keeps.

    ``cases`` gives, for each name in ``names``, the loss as a function of its input alone, the same with loops in
    float64, and a float64 input. Cases in ``empty`` have nothing to learn from.
    """

    names: tuple[str, ...]
    empty: tuple[str, ...] = ()

    def case(self, name: str) -> Case:
        raise NotImplementedError

    def test_value_and_gradient_equal_loops(self):
        for name in self.names:
            check_loss(*self.case(name))

    def test_nothing_to_learn_from_is_a_zero_of_the_graph(self):
        for name in self.empty:
            loss, _, x = self.case(name)
            x = x.clone().requires_grad_()
            value = loss(x)
            value.backward()
            assert value.item() == 0 and x.grad is not None and not x.grad.any(), name

    def test_it_is_float32_under_autocast(self):
        loss, _, x = self.case(self.names[0])
        half = x.bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(half)
        value.backward()
        assert value.dtype == torch.float32 and half.grad is not None and half.grad.dtype == torch.bfloat16
        assert value.item() == pytest.approx(loss(half.detach().double()).item(), rel=1e-5)


def check_loss(f: Callable[[Tensor], Tensor], loops: Callable[[np.ndarray], float], x: Tensor) -> Tensor:
    """Value, gradient (differences of the loops, gradcheck) and a scaled incoming gradient agree."""
    x = x.clone().requires_grad_()
    loss = f(x)
    (grad,) = torch.autograd.grad(loss * 3.0, x)
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == pytest.approx(loops(x.detach().numpy()), rel=1e-12, abs=1e-14)
    expected = torch.from_numpy(numeric_gradient(loops, x.detach().numpy()))
    torch.testing.assert_close(grad, 3.0 * expected, rtol=1e-6, atol=1e-9)
    assert torch.autograd.gradcheck(f, (x,))
    return grad
