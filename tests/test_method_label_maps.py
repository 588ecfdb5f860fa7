"""Maps of pseudo-labels with the decoder's say: values against a loop, when it is asked, and how its share grows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.test_method_margin import CLOSE, t, targets_of, tree
from ugrl.config import build
from ugrl.data.reader import ShardReader
from ugrl.errors import ConfigError
from ugrl.method.per_position import with_decoder
from ugrl.method.schedule import Schedule
from ugrl.seeding import generator
from ugrl.train.loop import Trainer
from ugrl.view.collect import looks, open_run


def share_of(cell, classes, c):
    """The decoder's probability of a class among those of an image and background."""
    among = cell[0]
    for other in classes:
        among += cell[other + 1]
    return cell[c + 1] / among


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_maps_with_the_decoder_match_the_loop(share):
    rng, h, w = generator("with decoder"), 5, 6
    pairs = torch.tensor([[0, 0], [0, 2], [2, 1]])  # the image between shows nothing
    boxes = torch.tensor([[0, h, 0, w], [0, 3, 1, w], [1, 4, 0, 5]])
    maps = rng.uniform(0, 1, (3, h, w))
    probs = t(rng.standard_normal((3, 4, h, w))).softmax(1)
    got = with_decoder(t(maps), pairs, boxes, probs, share)
    want = np.zeros_like(maps)
    for k, (b, c) in enumerate(pairs.tolist()):
        y0, y1, x0, x1 = boxes[b].tolist()
        for y in range(y0, y1):
            for x in range(x0, x1):
                told = share_of(probs[b, :, y, x].tolist(), [f for i, f in pairs.tolist() if i == b], c)
                want[k, y, x] = (1 - share) * maps[k, y, x] + share * told
    np.testing.assert_allclose(got, want, **CLOSE)


def test_a_decoder_of_a_coarser_grid_is_resized_and_maps_stay_below_one():
    maps, pairs, boxes = torch.full((1, 8, 8), 1 - 1e-6), torch.tensor([[0, 0]]), torch.tensor([[0, 8, 0, 8]])
    probs = torch.zeros(1, 3, 2, 2)
    probs[:, 1] = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    probs[:, 0] = 1 - probs[:, 1]
    got = with_decoder(maps, pairs, boxes, probs, 0.5)
    assert float(got.max()) < 1
    np.testing.assert_allclose(got[0, 3], 0.5 + 0.5 * torch.tensor([1, 1, 0.875, 0.625, 0.375, 0.125, 0, 0]), atol=1e-5)
    # Where the decoder sees none of the image's classes and no background, it says nothing for the class.
    probs[:, :2], probs[:, 2] = 0, 1
    np.testing.assert_allclose(with_decoder(maps, pairs, boxes, probs, 0.5), 0.5 * maps, atol=1e-6)


def with_share(setting="IV", share=0.6, **changes):
    out = tree(setting)
    out["method"]["pseudo"] |= {"decoder_weight": share, **changes}
    return out


def test_the_share_grows_from_the_end_of_the_warm_up_to_the_last_step():
    schedule = Schedule.of(build(with_share()))  # 5 steps, 1 of warm-up
    assert [schedule.decoder_share(done) for done in range(7)] == pytest.approx([0, 0, 0.15, 0.3, 0.45, 0.6, 0.6])


@pytest.mark.parametrize(
    ("setting", "acts"), [("Base", False), ("I", False), ("II", True), ("III", False), ("IV", True), ("Full", False)]
)
def test_the_decoder_has_a_say_where_prototypes_have_one(setting, acts):
    assert (Schedule.of(build(with_share(setting))).decoder_share(5) > 0) is acts


def test_labels_of_a_step_are_of_maps_with_the_decoder(shards):
    """And only they: the CAM, which u and the classifier are held against, stays what it was."""
    plain, _ = targets_of(tree(), shards)
    found, _ = targets_of(with_share(share=0.9), shards)
    assert not torch.equal(found.labels_BHW, plain.labels_BHW)
    assert torch.equal(found.cam_PHW, plain.cam_PHW)


def test_the_decoder_is_asked_for_labels_where_it_has_no_say_in_u(shards):
    changed = with_share(share=0.9)
    changed["method"]["uncertainty"]["decoder_weight"] = 0.0
    found, _ = targets_of(changed, shards)
    changed["method"]["pseudo"]["decoder_weight"] = 0.0
    plain, _ = targets_of(changed, shards)
    assert not torch.equal(found.labels_BHW, plain.labels_BHW)


def test_its_answer_is_computed_once_a_step_and_not_before_it_has_a_share(shards):
    changed = with_share()
    changed["method"]["uncertainty"]["decoder_weight"] = 0.0
    trainer = Trainer(build(changed), shards=shards, out=None, quiet=True, dtype=torch.float64, device="cpu")
    loader, net, asked = trainer.loader(trainer.loader_spec()), trainer.step_fn.net, []
    plain = net.probabilities
    net.probabilities = lambda features: asked.append(len(features[0])) or plain(features)
    try:
        for step, images in ((0, 0), (1, 0), (2, 1)):
            batch = next(loader).to("cpu", torch.float64)
            asked.clear()
            trainer.step_fn.targets(batch, step)
            assert sum(asked) == images * len(batch.ids)
    finally:
        loader.close()


def test_a_trained_run_shows_labels_with_the_share_of_its_step(shards, tmp_path):
    """As ``ugrl view`` and the export of labels have them."""
    Trainer(build(with_share(share=0.9)), shards=shards, out=tmp_path / "run", quiet=True, device="cpu").fit()
    run = open_run(tmp_path / "run", best=False, device=torch.device("cpu"))
    reader, found = ShardReader(shards, "val", run.got.cfg.data), []
    for done in (run.got.step, 1):  # after the warm-up of one step nothing is the decoder's yet
        at = replace(run, got=replace(run.got, step=done))
        found.append([look.pseudo_HW for batch in looks(at, reader, [0, 1, 2]) for look in batch])
    assert any(not np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_a_share_without_prototypes_is_refused():
    with pytest.raises(ConfigError, match="decoder_weight is 0.6, and method.pseudo.source cam, where the decoder has"):
        build(with_share(source="cam"))
