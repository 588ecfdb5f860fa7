"""Class vectors, prototypes and u against the float64 loops, alone and on two ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import multiprocessing as mp
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests import reference as ref
from tests.reference_prototypes import PrototypesByLoop
from ugrl.errors import ConfigError, UgrlError
from ugrl.method import prototypes
from ugrl.method.class_vectors import class_positions, class_vectors, local_affinity
from ugrl.method.prototypes import Prototypes
from ugrl.method.weighting import effective_share, modulation_weights
from ugrl.seeding import generator

GRID = (3, 4)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def t(x):
    return torch.from_numpy(np.asarray(x))


def scene(B=3, F=4, D=5):
    """CAM, features, affinity, tags and box on a small grid; image 1 has no tag, class 4 no image."""
    rng = generator("scene")
    N = GRID[0] * GRID[1]
    tags = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=np.float32)
    cam = rng.random((B, F, N)) * tags[:, :, None]
    inside = np.ones((B, N))
    inside[0, :4] = 0
    inside[2, 3::4] = 0
    return cam, inside, tags, rng.standard_normal((B, D, N)), 3 * rng.standard_normal((B, N, N))


class TestClassVectors:
    def test_positions_match_the_loop(self):
        cam, inside, _, _, _ = scene()
        got = class_positions(t(cam), t(inside))
        np.testing.assert_allclose(got, ref.class_position_maps(cam, inside), **CLOSE)
        assert (got[1, 0] == 1).all() and (got[1, 1:] == 0).all()  # no tag: all background

    @pytest.mark.parametrize("radius", [1, 2, 8])
    @pytest.mark.parametrize("boxed", [True, False])
    def test_affinity_matches_the_loop(self, radius, boxed):
        _, inside, _, _, logits = scene()
        box = inside if boxed else None
        got = local_affinity(t(logits), grid=GRID, radius=radius, inside_BN=t(box) if boxed else None)
        np.testing.assert_allclose(got, ref.local_affinity_rows(logits, GRID, radius, box), **CLOSE)
        np.testing.assert_allclose(got.sum(-1), np.ones_like(inside) if box is None else box, **CLOSE)

    def test_affinity_survives_logits_whose_sigmoid_underflows(self):
        got = local_affinity(torch.full((1, 12, 12), -1e4), grid=GRID, radius=1)
        torch.testing.assert_close(got.sum(-1), torch.ones(1, 12))

    def test_affinity_refuses_another_grid(self):
        with pytest.raises(UgrlError, match="expected"):
            local_affinity(torch.zeros(1, 12, 12), grid=(3, 5))

    @pytest.mark.parametrize("spread", [True, False])
    def test_vectors_match_the_loop(self, spread):
        cam, inside, tags, f4, logits = scene()
        m = ref.class_position_maps(cam, inside)
        ahat = ref.local_affinity_rows(logits, GRID, 1, inside) if spread else None
        r, present = class_vectors(t(f4), t(m), t(tags), t(ahat) if spread else None)
        r_ref, present_ref = ref.class_vectors_under_maps(f4, m, tags, ahat)
        np.testing.assert_array_equal(present, present_ref)
        np.testing.assert_allclose(r, r_ref, **CLOSE)
        assert (r[~present] == 0).all()

    def test_padding_has_no_say(self):
        cam, inside, tags, f4, logits = scene()
        other = np.where(inside[:, None] > 0, f4, 1e3)
        m, a = class_positions(t(cam), t(inside)), local_affinity(t(logits), grid=GRID, inside_BN=t(inside))
        torch.testing.assert_close(
            class_vectors(t(f4), m, t(tags), a)[0], class_vectors(t(other), m, t(tags), a)[0], rtol=1e-12, atol=0
        )

    def test_everything_ignored_gives_nothing(self):
        cam, inside, tags, f4, logits = scene()
        m = class_positions(t(cam), torch.zeros(3, 12))
        a = local_affinity(t(logits), grid=GRID, inside_BN=torch.zeros(3, 12))
        r, present = class_vectors(t(f4), m, t(tags), a)
        assert not present.any() and (r == 0).all()

    @pytest.mark.parametrize(("mass", "exists"), [(2e-6, True), (5e-7, False)])
    def test_an_almost_empty_map_makes_no_vector(self, mass, exists):
        m = torch.zeros(1, 2, 4, dtype=torch.float64)
        m[0, 1, 2] = mass
        r, present = class_vectors(torch.full((1, 3, 4), 7.0).double(), m, torch.ones(1, 1))
        assert present[0].tolist() == [False, exists]
        torch.testing.assert_close(r[0, 1], torch.full((3,), 7.0 if exists else 0.0).double())

    def test_types_and_gradient(self):
        cam, inside, tags, f4, logits = (t(x).float() for x in scene())
        f4, logits = f4.half().requires_grad_(), logits.bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ahat = local_affinity(logits, grid=GRID, inside_BN=inside)
            r, _ = class_vectors(f4, class_positions(cam, inside), tags, ahat)
        exact, _ = class_vectors(f4.double(), class_positions(cam, inside), tags, ahat.double())
        assert r.dtype == ahat.dtype == torch.float32 and exact.dtype == torch.float64
        assert not r.requires_grad
        torch.testing.assert_close(r.double(), exact, rtol=1e-5, atol=1e-6)  # bfloat16 would miss by 1e-2


def batches(n=4, B=4, C=5, D=6):
    """Class vectors with a large common part. Class 4 is never present; others come and go."""
    rng = generator("batches")
    common, classes = 5 * rng.standard_normal(D), rng.standard_normal((C, D))
    r = common + classes + 0.5 * rng.standard_normal((n, B, C, D))
    present = rng.random((n, B, C)) < 0.5
    present[:, :, 0] = True
    present[:, :, 4] = False
    present[0, :, 3] = False  # seen only later
    present[1, :, 1:] = False  # background alone
    present[2, :, 1:] = np.eye(4, 4) > 0  # every image alone with its class …
    present[2, :, 4] = False
    present[3, 2:] = False  # images with nothing inside the box
    return r, present


class PrototypeContract:
    """What every encoding keeps."""

    options: dict

    def make(self, C=5, D=6, d_cls=16, seed=1, **kwargs):
        settings = {"eta": 0.8, "centre_momentum": 0.6} | self.options | kwargs
        return Prototypes(num_classes=C, dim=D, d_cls=d_cls, seed=seed, **settings)

    def loop_of(self, p):
        bias = p.bias_d.numpy() if p.encoding == "fourier" else None
        return PrototypesByLoop(
            p.phi_dD.numpy(), bias, len(p.counts_C), eta=p.eta, center=p.center, centre_momentum=p.centre_momentum
        )

    def same(self, p, loop):
        for c, (prototype, mean) in enumerate(zip(loop.prototypes, loop.means, strict=True)):
            np.testing.assert_allclose(p.prototypes_Cd[c], 0 if prototype is None else prototype, **CLOSE)
            np.testing.assert_allclose(p.mean_CD[c], 0 if mean is None else mean, **CLOSE)
            assert bool(p.mean_seen_C[c]) == (mean is not None)
        assert p.counts_C.tolist() == loop.counts
        if p.encoding == "fourier":
            np.testing.assert_allclose(p.sigma, loop.sigma or 0, **CLOSE)

    def test_updates_match_the_loop(self):
        p = self.make().double()
        loop = self.loop_of(p)
        for step, (r, present) in enumerate(zip(*batches(), strict=True)):
            if step == 3:
                p.freeze()
                loop.freeze()
                self.same(p, loop)
            u, known = p.uncertainty(t(r), t(present))
            u_ref, known_ref = loop.uncertainty(r, present)
            np.testing.assert_array_equal(known, known_ref)
            np.testing.assert_allclose(u, u_ref, rtol=1e-9, atol=1e-10)
            p.update(t(r), t(present))
            loop.update(r, present)
            self.same(p, loop)
        assert p.counts_C.tolist()[4] == 0 and not known[:, 4].any()  # never seen: no u

    def test_a_pair_alone_with_its_class_is_not_compared_with_itself(self):
        p = self.make().double()
        r, present = batches()
        p.update(t(r[0]), t(present[0]))
        alone, first = t(present[2]), t(r[2])
        u, known = p.uncertainty(first, alone)
        assert not known[2, 3]  # class 3: first image, nothing to compare with
        assert u[0, 1] > 1e-3 and known[0, 1]
        assert (u[~known] == 0).all()

    def test_u_spans_0_to_2(self):
        p = self.make(center=False).double()
        r = t(batches()[0][0])
        h = p.encode(r)
        p.prototypes_Cd.copy_(3 * h[0])
        everywhere = torch.ones(4, 5, dtype=torch.bool)
        assert p.uncertainty(r, everywhere)[0][0].abs().max() < 1e-12
        p.prototypes_Cd.copy_(-3 * h[0])
        torch.testing.assert_close(p.uncertainty(r, everywhere)[0][0], torch.full((5,), 2.0).double())

    def test_an_empty_batch_changes_nothing(self):
        p = self.make()
        r, present = batches()
        r, present = t(r).float(), t(present)
        p.update(r[0], present[0])
        before = {k: v.clone() for k, v in p.state_dict().items()}
        u, known = p.uncertainty(r[1], torch.zeros_like(present[1]))
        p.update(r[1], torch.zeros_like(present[1]))
        assert not known.any() and (u == 0).all()
        for name, value in p.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_absent_vectors_are_not_read(self):
        r, present = batches()
        states = []
        for filler in (0.0, math.nan):
            p = self.make()
            for x, here in zip(r, present, strict=True):
                x = t(np.where(here[..., None], x, filler)).float()
                u, _ = p.uncertainty(x, t(here))
                p.update(x, t(here))
            states.append((u, p.prototypes_Cd, p.mean_CD))
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
        assert torch.isfinite(states[1][1]).all()

    def test_one_vector_in_the_first_batch(self):
        """Nothing to centre on, and no pair to measure a length scale with: no NaN either way."""
        p = self.make().double()
        loop = self.loop_of(p)
        r, present = batches()
        one = np.zeros((4, 5), dtype=bool)
        one[0, 2] = True
        p.update(t(r[0]), t(one))
        loop.update(r[0], one)
        self.same(p, loop)
        # Linear and centred, it is its own mean and has no direction; Fourier has no σ yet.
        assert p.counts_C.sum() == (p.encoding == "linear" and not p.center)
        p.freeze()
        loop.freeze()
        for step in (0, 1):  # the first σ is the final one
            p.update(t(r[step]), t(present[step]))
            loop.update(r[step], present[step])
            self.same(p, loop)

    def test_one_class_only(self):
        r, present = t(batches()[0]), torch.zeros(4, 5, dtype=torch.bool)
        present[:, 1] = True
        p = self.make().double()
        p.update(r[0], present)
        p.freeze()  # Fourier, centred: the code of the only mean is the centre itself, without direction
        u, known = p.uncertainty(r[1], present)
        restarted = p.encoding == "fourier" and p.center
        assert known[:, 1].all() != restarted and known.any() != restarted
        assert torch.isfinite(u).all() and (u[known] > 0).all()
        assert p.counts_C.tolist() == [0, 0 if restarted else 1, 0, 0, 0]
        p.update(r[1], present)
        assert p.uncertainty(r[2], present)[1][:, 1].all()

    def test_a_step_never_waits_for_the_device(self):
        with FakeTensorMode(), torch.device("cpu"):  # has shapes but no values: reading one raises
            p = self.make()
            r, present = torch.zeros(4, 5, 6), torch.ones(4, 5, dtype=torch.bool)
            u, known = p.uncertainty(r, present)
            p.update(r, present)
            w = modulation_weights(u, known, present, strength=5.0, per_class=True)
            assert effective_share(w, known, present).shape == ()
            with pytest.raises(DataDependentOutputException):
                bool(w.sum() > 0)

    def test_a_final_scale_needs_no_gathering(self, monkeypatch):
        r, present = t(batches()[0]).float(), t(batches()[1])
        p, resumed = self.make(), self.make()
        p.update(r[0], present[0])
        p.freeze()
        resumed.load_state_dict(p.state_dict())
        monkeypatch.setattr(prototypes, "all_gather_rows", None)  # calling it would raise
        p.update(r[2], present[2])
        resumed.update(r[2], present[2])
        assert torch.equal(p.prototypes_Cd, resumed.prototypes_Cd)

    def test_checkpoint_resumes_to_the_bit(self, tmp_path):
        r, present = t(batches()[0]).float(), t(batches()[1])
        p, other = self.make(), self.make(seed=2)
        assert not torch.equal(p.phi_dD, other.phi_dD)
        p.update(r[0], present[0])
        p.freeze()
        save_file(p.state_dict(), tmp_path / "p.safetensors")
        other.load_state_dict(load_file(tmp_path / "p.safetensors"))
        for step in (2, 3):
            for x in (p, other):
                x.update(r[step], present[step])
        for name, value in p.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
        assert torch.equal(p.uncertainty(r[1], present[1])[0], other.uncertainty(r[1], present[1])[0])

    def test_float32_without_parameters_or_gradient(self):
        p = self.make()
        r = t(batches()[0]).float().requires_grad_()
        present = t(batches()[1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            p.update(r[0], present[0])
            u, known = p.uncertainty(r[2].bfloat16(), present[2])
        assert not list(p.parameters()) and u.dtype == p.prototypes_Cd.dtype == torch.float32
        assert not u.requires_grad and not p.prototypes_Cd.requires_grad
        exact = self.make().double()
        exact.update(r[0], present[0])
        torch.testing.assert_close(p.prototypes_Cd.double(), exact.prototypes_Cd, rtol=0, atol=1e-4)

    def test_prototypes_lie_within_the_unit_ball(self):
        p = self.make()
        for r, present in zip(*batches(), strict=True):
            p.update(t(r).float(), t(present))
        assert (p.prototypes_Cd.norm(dim=1) <= 1 + 1e-6).all()

    def test_another_shape_is_refused(self):
        with pytest.raises(UgrlError, match=r"expected \(B, 5, 6\)"):
            self.make().update(torch.zeros(2, 5, 7), torch.ones(2, 5, dtype=torch.bool))


class TestLinear(PrototypeContract):
    options = {"encoding": "linear", "center": True}


class TestLinearUncentred(PrototypeContract):
    options = {"encoding": "linear", "center": False}


class TestFourier(PrototypeContract):
    options = {"encoding": "fourier", "center": True}


class TestFourierUncentred(PrototypeContract):
    options = {"encoding": "fourier", "center": False}


@pytest.mark.parametrize(
    ("bad", "message"), [({"encoding": "cubic"}, "encoding: 'cubic'"), ({"eta": 1.0}, "eta"), ({"d_cls": 0}, "d_cls")]
)
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(ConfigError, match=message):
        Prototypes(**({"num_classes": 3, "dim": 4, "d_cls": 8} | bad))


def test_phi_is_a_function_of_the_seed():
    """Values, not just equality: another machine must draw the same Φ."""
    phi = Prototypes(num_classes=2, dim=3, d_cls=4, seed=7).phi_dD
    assert torch.equal(phi, Prototypes(num_classes=5, dim=3, d_cls=4, seed=7).phi_dD)
    expected = generator(7, "prototypes", "linear", "phi").standard_normal((4, 3)) / 2
    np.testing.assert_array_equal(phi, expected.astype(np.float32))


def test_linear_codes_ignore_a_common_drift_and_fourier_codes_cannot_be_shifted():
    """Centred u is the same when every feature moves by one vector, then and now alike."""
    r, present = t(batches()[0]), t(batches()[1])
    u = []
    for shift in (0.0, 50.0):
        p = Prototypes(num_classes=5, dim=6, d_cls=64, encoding="linear").double()
        p.update(r[0] + shift, present[0])
        u.append(p.uncertainty(r[2] + shift, present[2])[0])
    torch.testing.assert_close(u[0], u[1], rtol=1e-8, atol=1e-9)

    p = Prototypes(num_classes=5, dim=6, d_cls=4096, encoding="fourier", center=False).double()
    p.update(r[0], present[0])
    near, far = (torch.nn.functional.normalize(p.encode(r[0, :, 0] + s), dim=-1) for s in (0.0, 50.0))
    gap = (near @ near.mT - far @ far.mT).abs().max()
    assert gap < 0.08  # Monte-Carlo error of 4096 features: the code sees differences alone
    sigma = p.sigma
    kernel = torch.exp(-torch.cdist(r[0, :, 0], r[0, :, 0]).square() / (2 * sigma**2))
    assert (near @ near.mT - kernel).abs().max() < 0.08


def test_printed_equations_2_to_5_give_0_or_2_whatever_phi_is():
    cam, inside, tags, f4, _ = scene()
    m = ref.class_position_maps(cam, inside)
    f = ref.printed_class_scalars(f4, m)[[0, 2]][:, [0, 2]]  # the classes that two images share
    answers = []
    for seed, d_cls in ((0, 1), (1, 8), (2, 300)):
        phi = generator("printed", seed).standard_normal((2, d_cls))
        answers.append(ref.printed_uncertainty(f, phi))
        assert np.minimum(np.abs(answers[-1]), np.abs(answers[-1] - 2)).max() < 1e-12
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-12)
    np.testing.assert_allclose(answers[0], answers[2], atol=1e-12)

    r, present = class_vectors(t(f4), t(m), t(tags))
    for d_cls in (8, 300):
        p = Prototypes(num_classes=5, dim=5, d_cls=d_cls, center=False).double()
        p.update(r, present)
        u, known = p.uncertainty(r, present)
        shared = u[[0, 2]][:, [0, 2]]
        assert known[[0, 2]][:, [0, 2]].all()
        assert torch.minimum(shared, (shared - 2).abs()).min() > 1e-3


# Two ranks. Rank 1 never has a foreground class, and in the last batch nothing at all.

KINDS = [(encoding, center) for encoding in ("linear", "fourier") for center in (True, False)]


def uneven():
    r, present = t(batches()[0]), t(batches()[1]).clone()
    present[:, 2:, 1:] = False
    present[3, 2:] = False
    return r, present


def pixel_numbers(present):
    return present * t(generator("pixels").integers(0, 50, present.shape))


def collect(rows):
    """Everything that must not depend on the number of ranks, for the images ``rows``."""
    r, present = uneven()
    out = {}
    for encoding, center in KINDS:
        p = Prototypes(num_classes=5, dim=6, d_cls=16, eta=0.8, encoding=encoding, center=center).double()
        for step in range(len(r)):
            if step == 2:
                p.freeze()
            x, here = r[step, rows], present[step, rows]
            u, known = p.uncertainty(x, here)
            out[f"{encoding} {center} u {step}"] = u
            out[f"{encoding} {center} known {step}"] = known
            p.update(x, here)
            n = pixel_numbers(present[step])[rows]
            for per_class in (True, False):
                for kind in ("inverse_exp", "exp_decay"):
                    w = modulation_weights(u, known, n, strength=5.0, kind=kind, per_class=per_class)
                    out[f"{encoding} {center} w {step} {kind} {per_class}"] = w
                    share = effective_share(w, known, n, per_class=per_class)
                    out[f"{encoding} {center} share {step} {kind} {per_class}"] = share.expand(len(w))
        for name, value in p.state_dict().items():
            out[f"{encoding} {center} state {name}"] = value
    return out


def run_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(collect(slice(2 * rank, 2 * rank + 2)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one(tmp_path):
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    moved = 0
    for name, whole in collect(slice(None)).items():
        if " state " in name:
            for half in halves:
                torch.testing.assert_close(half[name], whole, rtol=1e-10, atol=1e-12, msg=name)
        else:
            both = torch.cat([half[name] for half in halves])
            torch.testing.assert_close(both, whole, rtol=1e-9, atol=1e-10, msg=name)
            moved += bool(" w " in name and (whole != 1).any())
    assert moved > 8  # the weights compared were not all 1
