"""The contrastive u, u of single pixels and labels with prototypes against float64 loops; whole steps with them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import reference as ref
from tests.reference_prototypes import PrototypesByLoop
from tests.test_method_uncertainty import batches
from tests.test_train import close, losses, run
from tests.tiny import tiny_tree
from ugrl.config import build
from ugrl.errors import ConfigError, UgrlError
from ugrl.method.cam import CamOutput
from ugrl.method.losses import segmentation_loss
from ugrl.method.per_position import label_uncertainty, with_prototypes
from ugrl.method.pool import reliable_pool
from ugrl.method.prototypes import Prototypes
from ugrl.method.weighting import modulation_weights, pixel_weights
from ugrl.seeding import generator, hash_uniform
from ugrl.train import checkpoint
from ugrl.train.loop import Trainer

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
OPTIONS = [
    {"kind": kind, "against": against, "debias": debias, "within_class": within, "encoding": encoding}
    for kind, against in (("distance", "all"), ("margin", "all"), ("margin", "shown"))
    for debias, within in itertools.product((False, True), repeat=2)
    for encoding in ("linear", "fourier")
]
SAYS = [
    {"kind": kind, "against": "shown", "within_class": within, "encoding": "linear", "weights": weights}
    for kind, within in (("distance", False), ("margin", False), ("margin", True))
    for weights in ({"classifier": 0.5}, {"classifier": 0.6, "decoder": 0.3})
]


def doubts_of(step):
    """What classifier and decoder doubt in a batch of pairs; of some they say nothing."""
    rng = generator("doubts", step)
    doubts = {"classifier": 3 * rng.standard_normal((4, 5)), "decoder": 0.5 + 0.2 * rng.standard_normal((4, 5))}
    doubts["classifier"][:, 0] = np.nan
    doubts["decoder"][2] = np.nan
    return doubts


def as_tensors(doubts):
    return {name: t(x) for name, x in doubts.items()}


def t(x):
    return torch.from_numpy(np.asarray(x))


def pair_of(**options):
    """Prototypes, and the loop with the same projection."""
    p = Prototypes(num_classes=5, dim=6, d_cls=16, seed=1, eta=0.8, centre_momentum=0.6, **options).double()
    rest = {k: v for k, v in options.items() if k != "encoding"}
    bias = p.bias_d.numpy() if p.encoding == "fourier" else None
    loop = PrototypesByLoop(p.phi_dD.numpy(), bias, 5, eta=0.8, center=True, centre_momentum=0.6, **rest)
    return p, loop


def taught(**options):
    """The same, after three batches."""
    p, loop = pair_of(**options)
    r, present = batches(n=6)
    for step in range(3):
        p.update(t(r[step]), t(present[step]))
        loop.update(r[step], present[step])
    return p, loop


def same_u(p, loop, r, present, doubts=None):
    """u as the loop has it, at one batch; returns which are known."""
    u, known = p.uncertainty(t(r), t(present), None if doubts is None else as_tensors(doubts))
    u_ref, known_ref = loop.uncertainty(r, present, doubts)
    np.testing.assert_array_equal(known, known_ref)
    np.testing.assert_allclose(u, u_ref, **CLOSE)
    assert (u >= 0).all() and (u <= 2).all()
    return known


@pytest.mark.parametrize("options", OPTIONS + SAYS, ids=str)
def test_u_matches_the_loop(options):
    p, loop = pair_of(**options)
    known_pairs = 0
    for step, (r, present) in enumerate(zip(*batches(n=9), strict=True)):  # moments are no plain means any more
        if step == 3:
            p.freeze()
            loop.freeze()
        doubts = doubts_of(step)
        known_pairs += int(same_u(p, loop, r, present, doubts).sum())
        p.update(t(r), t(present), doubts=as_tensors(doubts))
        loop.update(r, present, doubts=doubts)
        for c, prototype in enumerate(loop.prototypes):
            np.testing.assert_allclose(p.prototypes_Cd[c], 0 if prototype is None else prototype, **CLOSE)
        if p.calibration.within_class:
            np.testing.assert_allclose(p.calibration.u_moments_C2, [m[1:] for m in loop.moments], **CLOSE)
            assert p.calibration.u_seen_C.tolist() == [m[0] for m in loop.moments]
        for k, (n, *moments) in enumerate(loop.doubts.values()):
            np.testing.assert_allclose(p.calibration.pairs.moments_GK4[0, k], moments, **CLOSE)
            assert int(p.calibration.pairs.seen_GK[0, k]) == n
    assert known_pairs > 10


VOTES = [
    {"encoding": encoding, "several": several, "kind": kind, "against": "shown", "debias": kind == "margin"}
    for encoding, several in (("linear", (1, 1)), ("linear", (3, 1)), ("linear", (2, 2)), ("fourier", (1, 1)))
    for kind in ("distance", "margin")
]


def position_batches(n=6, B=4, D=6, N=7):
    """Features of positions and what they vote for; in the last batch nothing does."""
    rng = generator("position batches")
    f4 = 5 * rng.standard_normal(D)[:, None] + 2 * rng.standard_normal((n, B, D, N))
    labels = rng.choice([0, 0, 1, 2, 3, 255], (n, B, N))
    labels[-1] = 255
    return f4, labels


@pytest.mark.parametrize("options", VOTES, ids=str)
def test_votes_of_positions_match_the_loop(options):
    p, loop = pair_of(votes="position", **options)
    f4, labels = position_batches()
    for step, (r, present) in enumerate(zip(*batches(n=6), strict=True)):
        if step == 3:
            p.freeze()
            loop.freeze()
        known = same_u(p, loop, r, present)
        p.update(t(r), t(present), t(f4[step]), t(labels[step]))
        loop.update(r, present, f4[step], labels[step])
        rows = [*loop.prototypes, *(row for more in loop.more for row in more)]
        got = torch.cat([p.prototypes_Cd, p.extra_Ed]) if max(options["several"]) > 1 else p.prototypes_Cd
        for row, want in zip(got, rows, strict=True):
            np.testing.assert_allclose(row, 0 if want is None else want, **CLOSE)
        if max(options["several"]) > 1:
            assert p.extra_counts_E.tolist() == [n for counts in loop.more_counts for n in counts]
    assert known.sum() > 3


def test_several_prototypes_part_what_one_would_average():
    """A background of two kinds: one prototype lies between them, two lie on them."""
    far = torch.eye(4).double()[:2]
    f4 = torch.stack([far[0]] * 3 + [far[1]] * 3, 1)[None]
    labels = torch.zeros(1, 6, dtype=torch.int64)
    cosines = {}
    for several in ((1, 1), (2, 1)):
        p = Prototypes(num_classes=2, dim=4, d_cls=4, center=False, votes="position", several=several).double()
        p.phi_dD.copy_(torch.eye(4))
        p.update(torch.zeros(1, 2, 4).double(), torch.zeros(1, 2, dtype=torch.bool), f4, labels)
        cosines[several] = p.cosines(far)[0][:, 0]
    torch.testing.assert_close(cosines[1, 1], torch.full((2,), 0.5**0.5).double())
    torch.testing.assert_close(cosines[2, 1], torch.ones(2).double())


def test_positions_that_vote_must_be_given():
    p = Prototypes(num_classes=2, dim=4, d_cls=4, votes="position")
    with pytest.raises(UgrlError, match="positions vote"):
        p.update(torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))


def test_a_margin_halfway_between_two_prototypes_is_1():
    p = Prototypes(num_classes=2, dim=4, d_cls=4, center=False, kind="margin").double()
    p.phi_dD.copy_(torch.eye(4))
    p.prototypes_Cd.copy_(torch.eye(4)[:2])
    r = torch.tensor([[[1.0, 0, 0, 0], [1, 1, 0, 0]], [[0, 3, 0, 0], [0, 1, 0, 0]]]).double()
    u, known = p.uncertainty(r, torch.ones(2, 2, dtype=torch.bool))
    assert known.all()
    torch.testing.assert_close(u, torch.tensor([[0.5, 1.0], [1.5, 0.5]]).double())


def test_debias_is_the_plain_mean_of_equal_weights_as_eta_nears_1():
    votes = torch.from_numpy(generator("votes").standard_normal((5, 1, 2, 6)))
    p = Prototypes(num_classes=2, dim=6, d_cls=8, eta=1 - 1e-9, center=False, debias=True).double()
    here = torch.ones(1, 2, dtype=torch.bool)
    codes = []
    for r in votes:
        codes.append(torch.nn.functional.normalize(p.encode(r[0]), dim=-1))
        p.update(r, here)
    torch.testing.assert_close(p.prototypes_Cd, torch.stack(codes).mean(0), rtol=1e-6, atol=1e-8)


BAD = [
    ({"kind": "ratio"}, "ratio"),
    ({"against": "some"}, "some"),
    ({"votes": "none"}, "votes: 'none'"),
    (
        {"weights": {"classifier": 0.5, "decoder": 0.5}},
        r"classifier_weight 0.5 \+ decoder_weight 0.5: expected a sum below 1",
    ),
    ({"several": (2, 1)}, "several"),
    ({"several": (0, 1), "votes": "position"}, "several"),
    ({"several": (2, 1), "votes": "position", "encoding": "fourier"}, "several"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_other_words_are_refused(bad, message):
    with pytest.raises(ConfigError, match=message):
        Prototypes(num_classes=2, dim=4, d_cls=4, **bad)


def scene():
    """Features, labels, pairs and boxes of three images: two classes, none, one class; some pixels ignored."""
    rng = generator("positions")
    pairs = torch.tensor([[0, 0], [0, 2], [2, 1]])
    present = np.array([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [1, 0, 1, 0, 0]], dtype=bool)
    labels = np.stack([rng.choice([c for c in range(5) if row[c]] + [255], (7, 9)) for row in present])
    f4 = 3 * rng.standard_normal((3, 6, 2, 3))
    boxes = torch.tensor([[0, 7, 0, 9], [1, 6, 0, 9], [0, 7, 2, 8]])
    return f4, labels, pairs, present, boxes


KINDS = [{"kind": "distance"}, {"kind": "margin", "against": "all"}, {"kind": "margin", "against": "shown"}]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_u_of_a_label_matches_the_loop(options):
    p, loop = taught(encoding="linear", **options)
    f4, labels, pairs, present, _ = scene()
    small = ref.position_loops(loop, f4, present)
    u, known = p.position_uncertainty(t(f4), t(present))
    np.testing.assert_allclose(np.where(known, u, np.nan), small, **CLOSE)
    got, told = label_uncertainty(p, t(f4), t(labels), pairs, t(present))
    for b in range(3):
        wide = {c: ref.bilinear_loops(small[b, c], labels.shape[1:]) for c in range(5) if present[b, c]}
        for y, x in np.ndindex(*labels.shape[1:]):
            label = labels[b, y, x]
            want = np.nan if label == 255 else wide[label][y, x]
            assert bool(told[b, y, x]) == np.isfinite(want)
            assert float(got[b, y, x]) == pytest.approx(0 if np.isnan(want) else want, rel=1e-9, abs=1e-10)
    assert told.sum() > 60


@pytest.mark.parametrize(("weight", "bias"), [(0.5, 0.0), (2.0, 0.3), (1.0, -0.4), (0.0, 1.0)])
def test_labels_with_prototypes_match_the_loop(weight, bias):
    p, loop = taught(encoding="linear")
    f4, _, pairs, present, boxes = scene()
    inside = np.zeros((3, 7, 9))
    for (y0, y1, x0, x1), one in zip(boxes[pairs[:, 0]].tolist(), inside, strict=True):
        one[y0:y1, x0:x1] = 1
    cam = generator("maps").random((3, 7, 9)) * inside
    got = with_prototypes(CamOutput(t(cam), t(f4), None), pairs, boxes, p, t(present), weight=weight, bias=bias)
    want = ref.with_prototypes_loops(loop, cam, pairs.tolist(), boxes.tolist(), f4, weight, bias)
    np.testing.assert_allclose(got, want, **CLOSE)
    assert (got < 1).all() and (got >= 0).all()
    if weight == 0:
        np.testing.assert_array_equal(got, cam)


def pixels(case):
    rng = generator("pixels", case)
    u, labels = 2 * rng.random((3, 4, 5)), rng.choice([0, 1, 3, 255], (3, 4, 5))
    known = rng.random((3, 4, 5)) < 0.8
    if case == "certain":
        u[:] = 0
    elif case == "ignored":
        labels[:] = 255
    elif case == "unknown":
        known[:] = False
    elif case == "one":
        labels[:] = 255
        labels[1, 2, 3] = 3
        known[:] = True
    return u, known, labels


@pytest.mark.parametrize("kind", ["inverse_exp", "exp_decay", "none"])
@pytest.mark.parametrize("case", ["random", "certain", "ignored", "unknown", "one"])
def test_weights_of_pixels_match_the_loop(kind, case):
    u, known, labels = pixels(case)
    options = {"strength": 2.0, "kind": kind, "u_min": 0.05, "bound": 2.0}
    w, share = pixel_weights(t(u), t(known), t(labels), 5, **options)
    want, want_share = ref.pixel_weights_by_loop(u, known, labels, **options)
    np.testing.assert_allclose(w, want, **CLOSE)
    assert float(share) == pytest.approx(want_share if kind != "none" else 1.0)


def test_pixels_of_one_u_weigh_as_their_class_does():
    rng = generator("constant")
    labels = rng.choice([0, 1, 2, 255], (3, 6, 5))
    u_BC = torch.from_numpy(2 * rng.random((3, 3)))
    n_BC = torch.stack([(t(labels) == c).flatten(1).sum(1) for c in range(3)], 1).double()
    known = torch.ones(3, 3, dtype=torch.bool)
    by_class = modulation_weights(u_BC, known, n_BC, strength=3.0, per_class=True)
    safe = t(np.where(labels == 255, 0, labels)).flatten(1)
    u_BHW = u_BC.gather(1, safe).view(3, 6, 5)
    w, _ = pixel_weights(u_BHW, torch.ones(3, 6, 5, dtype=torch.bool), t(labels), 3, strength=3.0)
    valid = t(labels) != 255
    torch.testing.assert_close(w[valid], by_class.gather(1, safe).view(3, 6, 5)[valid], rtol=1e-12, atol=0)


@pytest.mark.parametrize("balance", ["none", "fg_bg"])
def test_a_loss_with_a_weight_for_each_pixel(balance):
    rng = generator("seg")
    seg, labels = rng.standard_normal((2, 3, 2, 2)), rng.choice([0, 1, 2, 255], (2, 4, 5))
    w = rng.random((2, 4, 5)) * 2

    def by_loop(x):
        """The weighted mean is linear in the weights: one image and class for each pixel."""
        total = 0.0
        for b, y, x_ in np.ndindex(*labels.shape):
            if labels[b, y, x_] != 255:
                alone = np.zeros((2, 3))
                alone[b, labels[b, y, x_]] = w[b, y, x_]
                here = np.full_like(labels, 255)
                here[b, y, x_] = labels[b, y, x_]
                ce = ref.segmentation_loss_loops(x, here, alone)  # one valid pixel: its own cross-entropy
                total += ce * float(shares[b, y, x_])
        return total

    valid, fg = labels != 255, (labels != 255) & (labels > 0)
    shares = valid / valid.sum()
    if balance == "fg_bg":
        shares = np.where(fg, 0.5 / fg.sum(), 0.5 / (valid & ~fg).sum()) * valid
    x = t(seg).requires_grad_()
    loss = segmentation_loss(x, t(labels), t(w), balance=balance)
    assert float(loss.detach()) == pytest.approx(by_loop(seg), rel=1e-10)
    loss.backward()
    np.testing.assert_allclose(x.grad, ref.numeric_gradient(by_loop, seg), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["stratified", "ranked"])
@pytest.mark.parametrize("keep", [0.2, 0.6])
def test_a_pool_by_the_u_of_pixels(kind, keep):
    rng = generator("pool", kind)
    labels = rng.choice([0, 1, 2, 255], (3, 5, 6))
    u, u_px, conf = rng.random((3, 3)), rng.random((3, 5, 6)), rng.random((3, 5, 6))
    keys = torch.arange(3)
    got = reliable_pool(t(labels), t(u), t(conf), keep=keep, kind=kind, keys_B=keys, u_Bhw=t(u_px))
    ties = hash_uniform(keys, 30).view(3, 5, 6).numpy()
    np.testing.assert_array_equal(got, ref.reliable_pool_loops(labels, u, conf, keep, kind, ties, u_px))
    plain = reliable_pool(t(labels), t(u), t(conf), keep=keep, kind=kind, keys_B=keys)
    assert not torch.equal(got, plain)


# -- whole steps and runs ---------------------------------------------------------------------

UNCERTAINTY = {
    "classifier_weight": 0.3,
    "decoder_weight": 0.3,
    "kind": "margin",
    "against": "shown",
    "level": "pixel",
    "votes": "position",
    "background_prototypes": 3,
    "debias": True,
    "within_class": True,
}


def tree(setting="IV", **train):
    """A run with everything that this file is about."""
    out = tiny_tree(steps=5, cls_warmup_iters=1, lr_warmup_iters=1, checkpoint_every=3, keep_checkpoints=9, **train)
    out["method"]["setting"] = setting
    out["method"]["uncertainty"] |= UNCERTAINTY
    out["method"]["contrast"]["pool"] = "ranked"
    out["method"]["pseudo"] = {"source": "cam+prototypes", "prototype_weight": 1.0, "background_bias": 0.05}
    return out


def test_ranks_parts_and_a_resumed_run_are_one(shards, tmp_path):
    def whole(**train):
        out = tree(**train)
        out["method"]["pseudo"]["decoder_weight"] = 0.6
        return out

    run(whole(), shards, tmp_path / "one")
    run(whole(), shards, tmp_path / "ranks", world=2)
    run(whole(micro_batch=3), shards, tmp_path / "parts")
    run(whole(), shards, tmp_path / "rest", resume=tmp_path / "one" / "checkpoints" / "step_00000003")
    one = losses(tmp_path / "one")
    assert {"stat/u_px_fg", "stat/u_px_bg", "stat/share_seg", "ucl"} <= set().union(*one)
    for other, first in (("ranks", 0), ("parts", 0), ("rest", 3)):
        found = losses(tmp_path / other)
        assert len(found) == len(one) - first
        for a, b in zip(one[first:], found, strict=True):
            close(a, b, rel=1e-7, floor=1e-9)
        for name in ("model", "prototypes"):
            a, b = (load_file(checkpoint.find(tmp_path / x) / f"{name}.safetensors") for x in ("one", other))
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-7, msg=f"{other} {key}")


def targets_of(changed, shards, still=False):
    """Targets of a batch at a step after the warm-up, with prototypes of the four batches before; and those after it.

    With ``still``, the prototypes of the four batches stay as they are at the last one.
    """
    made = Trainer(build(changed), shards=shards, out=None, quiet=True, dtype=torch.float64, device="cpu")
    batches = made.loader(made.loader_spec())
    try:
        for _ in range(4):
            made.step_fn.targets(next(batches).to("cpu", torch.float64), 0)
        prototypes = made.prototypes
        if still:
            prototypes.update = lambda *_, **__: None
        return made.step_fn.targets(next(batches).to("cpu", torch.float64), 2), prototypes.prototypes_Cd
    finally:
        batches.close()


@pytest.mark.parametrize(
    ("setting", "acts"), [("Base", False), ("I", False), ("II", True), ("III", False), ("IV", True)]
)
def test_prototypes_have_a_say_in_labels_where_u_has_one_in_the_segmentation(setting, acts, shards):
    changed = tree(setting)
    found, moved = targets_of(changed, shards)
    changed["method"]["pseudo"]["source"] = "cam"
    plain, moved_by_cam = targets_of(changed, shards)
    assert torch.equal(found.labels_BHW, plain.labels_BHW) is not acts
    assert torch.equal(moved, moved_by_cam) is not acts  # positions vote by the maps that make the labels
    assert (found.w_BHW is not None) == acts


def test_a_batch_is_judged_by_the_prototypes_of_before(shards):
    (moving, _), (still, _) = targets_of(tree(), shards), targets_of(tree(), shards, still=True)
    for name in ("labels_BHW", "u_BC", "u_BHW", "w_BHW", "pool_Bhw"):
        assert torch.equal(getattr(moving, name), getattr(still, name)), name


def test_the_level_of_u_is_the_level_of_the_weights(shards):
    changed = tree()
    by_pixel, _ = targets_of(changed, shards)
    changed["method"]["uncertainty"]["level"] = "class"
    by_class, _ = targets_of(changed, shards)
    assert by_class.w_BHW is None and by_class.u_BHW is None
    assert torch.equal(by_pixel.labels_BHW, by_class.labels_BHW)
    assert not torch.equal(by_pixel.pool_Bhw, by_class.pool_Bhw)
    labelled = by_pixel.labels_BHW != 255
    for c in by_pixel.labels_BHW[labelled].unique():
        here = by_pixel.labels_BHW == c
        assert float(by_pixel.w_BHW[here].mean()) == pytest.approx(1.0)


def test_a_configuration_that_cannot_be(shards):
    changed = tree()
    changed["method"]["uncertainty"]["votes"] = "class"
    bad = tree()
    bad["method"]["uncertainty"]["decoder_weight"] = 0.7
    with pytest.raises(ConfigError, match="classifier_weight is 0.3 and decoder_weight 0.7; expected a sum below 1"):
        build(bad)
    with pytest.raises(ConfigError, match="background_prototypes is 3 .*votes position"):
        build(changed)
