"""What classifier and decoder doubt, against float64 loops; its mean with u; whole steps in which they are asked."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import reference_prototypes as loops_of
from tests.test_method_margin import CLOSE, as_tensors, doubts_of, pair_of, t, tree
from tests.test_method_uncertainty import batches
from ugrl.config import build
from ugrl.errors import UgrlError
from ugrl.method.calibrate import Mixture
from ugrl.method.doubts import of_decoder, pixel_doubts, shares
from ugrl.seeding import generator
from ugrl.train.loop import Trainer
from ugrl.types import IGNORE


def test_a_tag_that_the_classifier_doubts_is_less_certain_and_background_is_not_asked():
    p, _ = pair_of(kind="margin", against="shown", weights={"classifier": 0.5})
    r, present = batches(n=6)
    for step in range(5):
        p.update(t(r[step]), t(present[step]), doubts=as_tensors(doubts_of(step)))
    sure, doubted = as_tensors(doubts_of(5)), as_tensors(doubts_of(5))
    sure["classifier"][:, 1] -= 2
    (doubted_BC, known_BC), (sure_BC, _) = (p.uncertainty(t(r[5]), t(present[5]), x) for x in (doubted, sure))
    assert known_BC[:, 1].any() and (sure_BC < doubted_BC)[known_BC[:, 1], 1].all()
    np.testing.assert_array_equal(sure_BC[:, [0, 2, 3, 4]], doubted_BC[:, [0, 2, 3, 4]])
    plain_BC, _ = p.plain_uncertainty(t(r[5]), t(present[5]))
    np.testing.assert_array_equal(plain_BC[:, 0], doubted_BC[:, 0])


def test_who_has_a_say_must_be_heard():
    p, _ = pair_of(weights={"decoder": 0.5})
    r, present = (t(x[0]) for x in batches())
    for ask in (p.uncertainty, p.update):
        with pytest.raises(UgrlError, match="the decoder has a say in u, but its doubt was not given"):
            ask(r, present)


def test_pixels_are_aligned_by_kind_of_label():
    mixture = Mixture({"classifier": 0.2, "decoder": 0.3}, 2, 0.8).double()
    rng, loops = generator("mixture"), {(g, name): (0, 0.0, 0.0, 0.0, 0.0) for g in (0, 1) for name in mixture.weights}
    for step in range(8):
        u, group, known = rng.uniform(0, 2, (2, 3, 4)), rng.integers(0, 2, (2, 3, 4)), rng.random((2, 3, 4)) < 0.8
        doubts = {name: rng.standard_normal((2, 3, 4)) * (1 + 4 * group) for name in mixture.weights}
        doubts["decoder"][rng.random((2, 3, 4)) < 0.3 + (step == 0)] = np.nan
        want = u.copy()
        for at in np.argwhere(known):
            i = tuple(at)
            for name, weight in mixture.weights.items():
                want[i] += weight * (loops_of.aligned(u[i], doubts[name][i], loops[group[i], name]) - u[i])
            want[i] = min(2.0, max(0.0, want[i]))
        got = mixture(t(u), t(known), as_tensors(doubts), t(group))
        np.testing.assert_allclose(got, want, **CLOSE)
        assert (step < 2) or (abs(got - t(u)) > 0.01)[t(known)].any()
        mixture.update(t(u), t(known), as_tensors(doubts), t(group))
        for g, name in loops:
            rows = [
                (u[i], u[i] ** 2, doubts[name][i], doubts[name][i] ** 2)
                for i in map(tuple, np.argwhere(known & (group == g)))
            ]
            loops[g, name] = loops_of.followed(loops[g, name], [row for row in rows if not np.isnan(row[2])], 0.8)


@pytest.mark.parametrize("factor", [1, 4])
def test_the_decoders_doubt_matches_the_loop(factor):
    rng, h, w = generator("overlap"), 5, 6
    pairs = torch.tensor([[0, 0], [0, 2], [2, 1]])  # the image between shows nothing
    boxes = torch.tensor([[0, h * factor, 0, w * factor], [0, 3 * factor, 1, w * factor], [2, 2, 0, 0]])
    cam = rng.uniform(0, 1, (3, h * factor, w * factor))
    probs = t(rng.standard_normal((3, 4, h, w))).softmax(1)
    tags = torch.zeros(3, 3)
    batch = SimpleNamespace(pairs_P2=pairs, boxes_B4=boxes, tags_BF=tags)
    found = of_decoder(probs, t(cam), batch)
    for b, classes in enumerate(([0, 2], [], [1])):
        mine = [cam[k] for k, (image, _) in enumerate(pairs.tolist()) if image == b]
        want = loops_of.overlap_doubt_loops(probs[b].numpy(), mine, classes, boxes[b].tolist(), factor)
        np.testing.assert_allclose(found[b], want, **CLOSE)
    assert np.isnan(found[2]).all() and np.isfinite(found[0, [0, 1, 3]]).all()


def test_doubts_of_pixels_are_low_where_the_label_is_believed():
    u = build(tree()).method.uncertainty
    assert shares(u) == {"classifier": 0.3, "decoder": 0.3}
    probs = torch.zeros(1, 3, 2, 2)
    probs[0, 0], probs[0, 2] = 0.25, 0.75
    labels = torch.full((1, 4, 4), 2)
    labels[0, 0], labels[0, 1] = 0, IGNORE
    conf = torch.full((1, 4, 4), 0.125)
    heads = SimpleNamespace(probabilities=lambda: probs)
    found = pixel_doubts(u, heads, labels, conf, torch.tensor([[0, 1]]))
    np.testing.assert_array_equal(found["decoder"][0, :, 0], [0.75, np.nan, 0.25, 0.25])
    np.testing.assert_array_equal(found["classifier"][0, :, 0], [-0.125, np.nan, -0.125, -0.125])


@pytest.mark.parametrize("how", [{"mode": "train"}, {"share": "always"}, {"share": "never"}], ids=str)
def test_the_decoder_answers_in_the_plain_pass_of_the_cam(how, shards):
    """Once for each image, after the warm-up; with the running statistics, whatever mode the pass is in."""
    changed = tree(stochastic=False, micro_batch=0 if "share" in how else 2)
    changed["method"]["cam"] |= how
    trainer = Trainer(build(changed), shards=shards, out=None, quiet=True, dtype=torch.float64, device="cpu")
    loader, net, asked = trainer.loader(trainer.loader_spec()), trainer.step_fn.net.train(), []
    plain = net.probabilities
    net.probabilities = lambda features: asked.append((plain(features), net.decoder.training)) or asked[-1][0]
    try:
        batch = next(loader).to("cpu", torch.float64)
        trainer.step_fn(batch, 0)
        assert asked == []
        with torch.no_grad():
            want = plain(net.encoder(batch.images_B3HW)[0])
        trainer.step_fn(batch, 2)
    finally:
        loader.close()
    # What the training's own passes do to the statistics comes after.
    torch.testing.assert_close(torch.cat([probs for probs, _ in asked]), want, rtol=1e-9, atol=1e-12)
    assert all(mode for _, mode in asked) and net.decoder.training


def test_training_aligns_the_doubts_of_its_pixels(shards):
    trainer = Trainer(build(tree()), shards=shards, out=None, quiet=True, dtype=torch.float64, device="cpu")
    loader, pixels = trainer.loader(trainer.loader_spec()), trainer.prototypes.calibration.pixels
    labelled = torch.zeros(2)
    try:
        for step in range(4):
            made = trainer.step_fn.targets(next(loader).to("cpu", torch.float64), step)
            if made.labels_BHW is not None:
                real = made.labels_BHW[made.labels_BHW != IGNORE]
                labelled += torch.tensor([(real == 0).sum(), (real > 0).sum()])
    finally:
        loader.close()
    # Pixels of a class that has no prototype yet have no u, and none that is aligned.
    assert (pixels.seen_GK > 0).all() and (pixels.seen_GK <= labelled[:, None]).all()
    assert (pixels.seen_GK[:, 0] == pixels.seen_GK[:, 1]).all() and len(pixels.weights) == 2
