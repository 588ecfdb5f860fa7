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

from tests.reference import numeric_gradient
from tuning.options import SAMPLERS
from tuning.space import build_space
from tuning.study import make_sampler, suggest_point
from ugrl.config import build
from ugrl.data.images import decode_labels, decode_rgb
from ugrl.data.prepare import prepare
from ugrl.data.reader import ShardReader
from ugrl.data.source import SOURCES, RowError, Source
from ugrl.errors import UgrlError
from ugrl.model.network import UGRLNet
from ugrl.row import IGNORE
from ugrl.train.build import build_net


class BackboneContract:
    """What every value of ``model.backbone`` keeps. ``name`` is the value."""

    name: str

    def network(self, **model: Any) -> UGRLNet:
        tree = {"data": {"crop": 224}, "model": {"backbone": self.name, "decoder_dim": 16, **model}}
        return build_net(build(tree), 3, pretrained=False).eval()

    @pytest.mark.parametrize("more", [0, 1, 13])
    def test_any_size_from_the_least_on(self, more):
        encoder = self.network().encoder
        side = encoder.info.min_size + more
        features, pairs = encoder(torch.randn(1, 3, side, side + 5))
        assert len(features) == 4 and all(torch.isfinite(f).all() for f in features)
        cells = features[3].shape[-2] * features[3].shape[-1]
        assert all(t.shape[1] == cells for pair in pairs for t in pair)
        with pytest.raises(UgrlError, match="too small"):
            encoder(torch.randn(1, 3, encoder.info.min_size - 1, side))

    @torch.no_grad()
    def test_an_image_is_the_same_in_any_batch(self):
        encoder = self.network().encoder
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
        total = sum((f**2).mean() for f in features) + sum((t**2).mean() for pair in pairs for t in pair)
        total.backward()
        assert [n for n, p in net.encoder.named_parameters() if p.grad is None] == []


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
            pytest.skip("it is generated")
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
