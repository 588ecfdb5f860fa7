from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.reference import ref_par, ref_refine_labels
from ugrl.errors import UgrlError
from ugrl.method.pseudo import pseudo_labels
from ugrl.method.refine import PAR, refine_labels, refined_at
from ugrl.types import IGNORE

SMALL = PAR(iterations=3, dilations=(1, 2, 5))
PAIRS = torch.tensor([[0, 1], [0, 3], [2, 0]])
BOXES = torch.tensor([[0, 13, 0, 18], [2, 9, 3, 16], [4, 13, 1, 8]])


def scene(dtype=torch.float64):
    """Piecewise constant images with some noise, and smooth maps."""
    g = torch.Generator().manual_seed(2)
    blocks = F.interpolate(torch.rand(3, 3, 3, 4, dtype=torch.float64, generator=g), (13, 18), mode="nearest")
    images = blocks + 0.05 * torch.rand(3, 3, 13, 18, dtype=torch.float64, generator=g)
    coarse = torch.rand(3, 1, 3, 4, dtype=torch.float64, generator=g)
    cam = F.interpolate(coarse, (13, 18), mode="bilinear")[:, 0]
    return images.to(dtype), cam.to(dtype)


@pytest.mark.parametrize("par", [SMALL, PAR(iterations=1), PAR(iterations=2, dilations=(2,), w1=0.7, w2=0.5)])
def test_par_equals_loops(par):
    g = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 7, 9, dtype=torch.float64, generator=g)
    images[1, :, :, 5:] = 0.25  # a flat part: no spread, equal weights
    masks = torch.rand(2, 2, 7, 9, dtype=torch.float64, generator=g)
    out = par(images, masks)
    for b in range(2):
        want = ref_par(images[b].tolist(), masks[b].tolist(), par.iterations, par.dilations, par.w1, par.w2)
        torch.testing.assert_close(out[b], torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-8)


def test_par_keeps_constants_up_to_its_gain_and_ignores_the_image_scale():
    images, _ = scene()
    ones = torch.ones(3, 1, 13, 18, dtype=torch.float64)
    torch.testing.assert_close(SMALL(images, ones), ones * SMALL.gain)
    assert SMALL.gain == pytest.approx(1.01**3)
    masks = torch.rand(3, 2, 13, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scaled = images * torch.tensor([58.0, 57.0, 3.0]).view(3, 1, 1) - 120
    torch.testing.assert_close(SMALL(scaled, masks), SMALL(images, masks), rtol=1e-6, atol=1e-7)
    assert torch.equal(PAR(iterations=0)(images, masks), masks)


def test_par_leaves_its_arguments_alone():
    images, _ = scene()
    masks = torch.rand(3, 2, 13, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = images.clone(), masks.clone()
    SMALL(images, masks)
    assert torch.equal(images, before[0]) and torch.equal(masks, before[1])


def test_par_of_parts_equals_par_of_cuts():
    images, _ = scene()
    masks = torch.rand(3, 2, 13, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sizes = [(13, 18), (5, 18), (7, 4)]
    out = SMALL(images, masks, sizes)
    for b, (h, w) in enumerate(sizes):
        alone = SMALL(images[b : b + 1, :, :h, :w], masks[b : b + 1, :, :h, :w])
        torch.testing.assert_close(out[b, :, :h, :w], alone[0])


@pytest.mark.parametrize("together", [False, True])
def test_refined_labels_equal_loops(together):
    images, cam = scene()
    labels, conf = refine_labels(cam, PAIRS, BOXES, images, batch=3, par=SMALL, high=0.5, low=0.4, together=together)
    assert labels.dtype == torch.int64
    settings = (SMALL.iterations, SMALL.dilations, SMALL.w1, SMALL.w2)
    for b in range(3):
        own = PAIRS[:, 0] == b
        want = ref_refine_labels(
            cam[own].tolist(), PAIRS[own, 1].tolist(), BOXES[b].tolist(), images[b].tolist(), 0.5, 0.4, settings
        )
        assert labels[b].tolist() == want[0]
        torch.testing.assert_close(conf[b], torch.tensor(want[1], dtype=torch.float64), rtol=0, atol=1e-8)
    assert set(labels.unique().tolist()) == {0, 1, 2, 4, 255}


def test_no_iteration_gives_the_plain_confidence():
    # On even blocks halving and doubling back lose nothing at the blocks' centres.
    cam = torch.tensor([[0.9, 0.1], [0.45, 0.6]], dtype=torch.float64).repeat_interleave(8, 0).repeat_interleave(8, 1)
    box = torch.tensor([[0, 16, 0, 16]])
    plain = pseudo_labels(cam[None], PAIRS[:1], box, batch=1)
    refined = refine_labels(
        cam[None], PAIRS[:1], box, torch.zeros(1, 3, 16, 16), batch=1, par=PAR(iterations=0, dilations=(1,))
    )
    for a, b in zip(plain, refined, strict=True):
        torch.testing.assert_close(a[0, 4::8, 4::8].double(), b[0, 4::8, 4::8].double())
    assert plain[0][0, 4::8, 4::8].tolist() == [[2, 0], [255, 2]]


def test_par_moves_labels_to_the_edges_of_the_image():
    # A disc whose CAM is a blob that spills over its edge on one side and falls short on the other.
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    disc = (y - 48) ** 2 + (x - 48) ** 2 < 26**2
    g = torch.Generator().manual_seed(4)
    colour = torch.where(disc, torch.tensor([0.8, 0.3, 0.2]).view(3, 1, 1), torch.tensor([0.2, 0.5, 0.7]).view(3, 1, 1))
    images = (colour + 0.03 * torch.randn(3, 96, 96, generator=g))[None]
    cam = torch.exp(-((y - 48) ** 2 + (x - 40) ** 2) / (2 * 24.0**2))[None] * 0.99
    pairs, box = torch.tensor([[0, 0]]), torch.tensor([[0, 96, 0, 96]])
    truth = disc.long()

    def right(labels):
        return float((labels[0] == truth).double().mean())

    plain, _ = pseudo_labels(cam, pairs, box, batch=1, high=0.5, low=0.5)
    refined, conf = refine_labels(cam, pairs, box, images, batch=1, par=PAR(), high=0.5, low=0.5)
    assert right(plain) < 0.93 and right(refined) > 0.97
    assert (conf >= 0).all()
    wide, _ = refine_labels(cam, pairs, box, images, batch=1, par=PAR())
    sure = wide[0] != 255
    assert sure.double().mean() > 0.8 and float((wide[0] == truth)[sure].double().mean()) > right(refined)


def test_images_without_tags_empty_boxes_and_no_pairs():
    images, cam = scene(torch.float32)
    boxes = BOXES.clone()
    boxes[2] = torch.tensor([4, 4, 1, 8])
    for together in (False, True):
        labels, conf = refine_labels(cam, PAIRS, boxes, images, batch=3, par=SMALL, together=together)
        assert (labels[1, 2:9, 3:16] == 0).all() and (labels[1] == 0).sum() == 7 * 13
        assert (conf[1, 2:9, 3:16] == torch.tensor(0.35)).all()
        assert (labels[2] == 255).all() and (conf[2] == 0).all()
        none, _ = refine_labels(cam[:0], PAIRS[:0], boxes, images, batch=3, par=SMALL, together=together)
        assert none.shape == (3, 13, 18) and (none[0] == 0).all()


def test_padding_has_no_say():
    images, cam = scene()
    other, changed = images.clone(), cam.clone()
    other[2, :, :4], other[2, :, :, 8:], changed[2, 10:, 9:] = 9.0, -3.0, 0.9
    a = refine_labels(cam, PAIRS, BOXES, images, batch=3, par=SMALL)
    b = refine_labels(changed, PAIRS, BOXES, other, batch=3, par=SMALL)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_a_box_of_one_pixel():
    images, cam = scene()
    boxes = BOXES.clone()
    boxes[0] = torch.tensor([3, 4, 5, 6])
    labels, _ = refine_labels(cam, PAIRS, boxes, images, batch=3, par=SMALL)
    assert (labels[0] != 255).sum() <= 1


def test_bad_arguments_are_named():
    images, cam = scene()
    with pytest.raises(UgrlError, match="PAR: got iterations 10, dilations ()"):
        PAR(dilations=())
    with pytest.raises(UgrlError, match="expected the same number and size"):
        SMALL(images, torch.zeros(3, 1, 13, 17, dtype=torch.float64))
    with pytest.raises(UgrlError, match="thresholds"):
        refine_labels(cam, PAIRS, BOXES, images, batch=3, par=SMALL, high=0.2, low=0.4)


def test_several_thresholds_of_one_refinement_are_those_of_several() -> None:
    g = torch.Generator().manual_seed(1)
    pairs = torch.tensor([[0, 0], [0, 2], [2, 1]])
    boxes = torch.tensor([[0, 20, 0, 24], [0, 20, 0, 24], [3, 20, 0, 21]])
    images, cam = torch.randn(3, 3, 20, 24, generator=g), torch.rand(3, 20, 24, generator=g)
    par, grid = PAR(iterations=2, dilations=(1, 2)), (0.2, 0.4, 0.6)
    labels, margins = refined_at(cam, pairs, boxes, images, par=par, grounds=grid)
    for k, t in enumerate(grid):
        want, conf = refine_labels(cam, pairs, boxes, images, batch=3, par=par, high=t, low=t)
        inside = want != IGNORE
        assert torch.equal(labels[k][inside], want[inside])
        torch.testing.assert_close(margins[k].abs()[inside], conf[inside])
