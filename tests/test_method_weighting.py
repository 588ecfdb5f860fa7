"""Loss weights against the float64 loops, and why the printed ones cannot be used."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests import reference as ref
from ugrl.errors import ConfigError
from ugrl.method.weighting import effective_share, modulation_weights
from ugrl.seeding import generator


def t(x):
    return torch.from_numpy(np.asarray(x))


def entries(case):
    """u, known and multiplicities (B, C) of one named situation."""
    rng = generator("entries", case)
    B, C = 4, 5
    u = 2 * rng.random((B, C)) ** 2
    known = rng.random((B, C)) < 0.7
    n = rng.integers(0, 300, (B, C))
    if case == "certain":
        u[:] = 0
    elif case == "some certain":
        u[::2] = 0
    elif case == "opposite":
        u[:] = 2
    elif case == "extremes":
        u[:, ::2], u[:, 1::2] = 0, 2
    elif case == "nothing known":
        known[:] = False
    elif case == "no multiplicity":
        n[:] = 0
    elif case == "one class":
        known[:, [0, 1, 3, 4]] = False
    elif case == "one entry":
        known[:] = False
        known[1, 2], n[1, 2] = True, 9
    elif case == "tags":
        n = known.astype(int)
    return np.where(known, u, 0), known, n


CASES = [
    "random",
    "certain",
    "some certain",
    "opposite",
    "extremes",
    "nothing known",
    "no multiplicity",
    "one class",
    "one entry",
    "tags",
]


class WeightingContract:
    """What every kind of weight keeps."""

    kind: str

    @pytest.fixture(params=CASES)
    def case(self, request):
        return entries(request.param)

    @pytest.fixture(params=[True, False])
    def per_class(self, request):
        return request.param

    @pytest.mark.parametrize(("strength", "u_min", "bound"), [(5.0, 0.05, 3.0), (0.5, 0.2, 1.5), (50.0, 0.01, 10.0)])
    def test_matches_the_loop(self, case, per_class, strength, u_min, bound):
        u, known, n = case
        options = {"strength": strength, "kind": self.kind, "per_class": per_class, "u_min": u_min, "bound": bound}
        w = modulation_weights(t(u), t(known), t(n), **options)
        w_ref = ref.modulation_weights_by_loop(u, known, n, **options)
        assert w.dtype == torch.float64
        np.testing.assert_allclose(w, w_ref, rtol=1e-10)
        share = effective_share(w, t(known), t(n), per_class=per_class)
        np.testing.assert_allclose(share, ref.effective_share_by_loop(w_ref, known, n, per_class), rtol=1e-10)
        assert 0 < share <= 1 + 1e-12

    def test_scale_is_kept_and_the_ratio_bounded(self, case, per_class):
        u, known, n = case
        w = modulation_weights(
            t(u), t(known), t(n), strength=0.05, kind=self.kind, per_class=per_class
        ).numpy()  # a strength that e^{1/(αu)} could not take
        for group in ref.weight_groups(known, n, per_class):
            values = [w[e] for e in group]
            assert math.fsum(n[e] * w[e] for e in group) == pytest.approx(sum(n[e] for e in group), rel=1e-12)
            assert max(values) <= 9 * min(values) * (1 + 1e-12)

    def test_entries_outside_weigh_exactly_1(self, case, per_class):
        u, known, n = case
        poisoned = np.where(known, u, math.nan)
        w = modulation_weights(t(poisoned), t(known), t(n), strength=5.0, kind=self.kind, per_class=per_class)
        assert (w.numpy()[~known | (n == 0)] == 1).all()
        assert torch.isfinite(w).all()

    def test_more_certain_never_weighs_less(self, per_class):
        u, known, n = entries("random")
        w = modulation_weights(t(u), t(known), t(n), strength=5.0, kind=self.kind, per_class=per_class).numpy()
        for group in ref.weight_groups(known, n, per_class):
            ordered = [w[e] for e in sorted(group, key=lambda e: u[e])]
            assert all(a >= b for a, b in zip(ordered, ordered[1:], strict=False))

    def test_float32_without_gradient(self, per_class):
        u, known, n = entries("random")
        leaf = t(u).half().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            w = modulation_weights(leaf, t(known), t(n), strength=5.0, kind=self.kind, per_class=per_class)
        exact = modulation_weights(leaf.double(), t(known), t(n), strength=5.0, kind=self.kind, per_class=per_class)
        assert w.dtype == torch.float32 and not w.requires_grad
        torch.testing.assert_close(w.double(), exact, rtol=1e-5, atol=0)


class TestInverseExp(WeightingContract):
    kind = "inverse_exp"


class TestExpDecay(WeightingContract):
    kind = "exp_decay"


class TestNone(WeightingContract):
    kind = "none"

    def test_is_all_ones(self):
        u, known, n = entries("random")
        assert (modulation_weights(t(u), t(known), t(n), strength=5.0, kind="none", per_class=True) == 1).all()


def test_the_weights_are_not_flat():
    u, known, n = entries("random")
    for kind in ("inverse_exp", "exp_decay"):
        w = modulation_weights(t(u), t(known), t(n), strength=5.0, kind=kind, per_class=False)[t(known & (n > 0))]
        assert w.max() > 1.2 and w.min() < 0.8


def test_per_class_keeps_the_share_of_every_class():
    """A reliable background must not silence the foreground."""
    u, known, n = t(np.array([[0.05, 0.3], [0.06, 0.4]])), torch.ones(2, 2, dtype=torch.bool), t([[70, 30], [70, 30]])
    together = modulation_weights(u, known, n, strength=5.0, per_class=False)
    apart = modulation_weights(u, known, n, strength=5.0, per_class=True)
    assert (n * together).sum(0)[1] < 0.5 * n.sum(0)[1]
    torch.testing.assert_close((n * apart).sum(0), n.sum(0).double())


def test_effective_share_of_one_dominant_entry():
    w, known = torch.tensor([[9.0, 1.0, 1.0, 1.0]]), torch.ones(1, 4, dtype=torch.bool)
    assert effective_share(w, known, torch.ones(1, 4)).item() == pytest.approx(144 / (4 * 84))
    assert effective_share(w, ~known, torch.ones(1, 4)) == 1


def test_printed_weights_overflow_and_reward_errors():
    """Eqs. 6 to 8 as printed: infinite below α·u = 0.0113, one entry outweighs the rest, the sign is wrong."""
    assert np.isfinite(ref.printed_modulation_weight(0.0114, 1.0))
    assert np.isinf(ref.printed_modulation_weight(0.0112, 1.0))
    assert np.isinf(ref.printed_classification_loss([2.0, -1.0], [1, 0], [0.002, 0.4], 5.0))
    assert np.isinf(ref.printed_segmentation_loss(np.eye(2), [0, 1], [0.002, 0.4], 5.0))
    # One pixel at u = 0.02 against nine at 0.4: the printed weight leaves nothing to the nine.
    one, nine = (float(ref.printed_modulation_weight(u, 5.0)) for u in (0.02, 0.4))
    assert one / (one + 9 * nine) > 0.998
    u = torch.tensor([[0.02] + [0.4] * 9])
    w = modulation_weights(u, u > 0, torch.ones(1, 10), strength=5.0, per_class=False)
    assert w[0, 0] / w.sum() < 0.35 and torch.isfinite(w).all()
    # Minimising the printed losses drives predictions away from the labels.
    right, wrong = (ref.printed_classification_loss([x], [1], [0.3], 5.0) for x in (3.0, -3.0))
    assert wrong < right < 0
    right, wrong = (ref.printed_segmentation_loss(np.array([[x], [-x]]), [0], [0.3, 0.3], 5.0) for x in (2.0, -2.0))
    assert wrong < right < 0


@pytest.mark.parametrize(("bad", "message"), [({"kind": "linear"}, "'linear'"), ({"bound": 1.0}, "1.0")])
def test_bad_settings_are_refused(bad, message):
    u = torch.ones(1, 1)
    with pytest.raises(ConfigError, match=message):
        modulation_weights(u, u > 0, u, **({"strength": 5.0, "per_class": False} | bad))
