from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tests.reference import ref_multi_scale_cam, ref_normalise, ref_pseudo_labels, ref_random_walk
from ugrl.errors import UgrlError
from ugrl.grid import cell_means, inside_cells, inside_pixels, scatter_pairs, spans
from ugrl.method.cam import CamPass, multi_scale_cam, normalise
from ugrl.method.pseudo import propagate_cam, pseudo_labels, random_walk

PAIRS = torch.tensor([[0, 1], [0, 4], [2, 0]])
BOXES = torch.tensor([[0, 16, 0, 24], [2, 10, 3, 20], [4, 16, 0, 9]])


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Net:
    """A strided convolution that remembers how it was called."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        self.weight = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=g)
        self.calls: list[tuple[tuple[int, int], CamPass]] = []

    def __call__(self, x, view):
        self.calls.append((tuple(x.shape[-2:]), view))
        raw = F.conv2d(x, self.weight, stride=4)
        n = raw.shape[-2] * raw.shape[-1]
        return raw, raw + 1, torch.full((x.shape[0], n, n), float(x.sum())) if view.plain else None


def loop_forward(planes):
    """The same convolution in loops."""
    weight = Net().weight.tolist()
    h, w = len(planes[0]) // 4, len(planes[0][0]) // 4
    return [
        [
            [
                sum(
                    kernel[c][i][j] * planes[c][4 * y + i][4 * x + j]
                    for c in range(3)
                    for i in range(4)
                    for j in range(4)
                )
                for x in range(w)
            ]
            for y in range(h)
        ]
        for kernel in weight
    ]


@pytest.mark.parametrize("scales,mirror", [((1.0, 0.5, 1.5), True), ((0.5, 1.0), False)])
def test_multi_scale_cam_equals_loops(scales, mirror):
    x = images()
    out = multi_scale_cam(Net(), x, PAIRS, BOXES, scales=scales, mirror=mirror)
    for b in (0, 2):
        classes = [f for i, f in PAIRS.tolist() if i == b]
        want = ref_multi_scale_cam(loop_forward, x[b].tolist(), classes, BOXES[b].tolist(), scales, mirror)
        torch.testing.assert_close(out.cam_PHW[PAIRS[:, 0] == b], torch.tensor(want, dtype=torch.float64))


def test_each_pass_is_told_what_it_serves_and_the_plain_one_gives_the_affinity():
    net, x = Net(), images()
    out = multi_scale_cam(net, x, PAIRS, BOXES, scales=(0.5, 1.0, 1.5))
    assert net.calls == [
        ((16, 24), CamPass(1.0, mirrored=False, plain=True)),
        ((16, 24), CamPass(1.0, mirrored=True)),
        ((8, 12), CamPass(0.5, mirrored=False)),
        ((8, 12), CamPass(0.5, mirrored=True)),
        ((24, 36), CamPass(1.5, mirrored=False, largest=True)),
        ((24, 36), CamPass(1.5, mirrored=True)),
    ]
    torch.testing.assert_close(out.f4_BDhw, F.conv2d(x, net.weight, stride=4) + 1)
    assert out.affinity_BNN is not None and float(out.affinity_BNN[0, 0, 0]) == pytest.approx(float(x.sum()))


def test_mirrored_images_give_mirrored_cams():
    whole = torch.tensor([[0, 16, 0, 24]] * 3)
    plain = multi_scale_cam(Net(), images(), PAIRS, whole).cam_PHW
    mirrored = multi_scale_cam(Net(), images().flip(-1), PAIRS, whole).cam_PHW
    torch.testing.assert_close(mirrored.flip(-1), plain)
    alone = multi_scale_cam(Net(), images().flip(-1), PAIRS, whole, mirror=False).cam_PHW
    assert not torch.allclose(alone.flip(-1), multi_scale_cam(Net(), images(), PAIRS, whole, mirror=False).cam_PHW)


def test_cam_range_box_gradient_and_precision():
    x = images().float().requires_grad_()
    net = Net()
    net.weight = net.weight.to(torch.bfloat16)
    out = multi_scale_cam(lambda y, view: net(y.to(torch.bfloat16), view), x, PAIRS, BOXES)
    cam = out.cam_PHW
    assert cam.dtype == torch.float32 and not cam.requires_grad
    inside = inside_pixels(BOXES[PAIRS[:, 0]], (16, 24), "cpu")
    assert cam.min() == 0 and 0.99 < cam.max() < 1
    assert (cam[~inside] == 0).all() and (cam[inside] > 0).any()


def test_a_class_does_not_depend_on_the_other_pairs():
    every = multi_scale_cam(Net(), images(), PAIRS, BOXES).cam_PHW
    one = multi_scale_cam(Net(), images(), PAIRS[1:2], BOXES).cam_PHW
    torch.testing.assert_close(one[0], every[1])


def test_no_pair_still_runs_every_pass():
    net = Net()
    out = multi_scale_cam(net, images(), torch.zeros((0, 2), dtype=torch.int64), BOXES)
    assert out.cam_PHW.shape == (0, 16, 24) and len(net.calls) == 6
    assert cell_means(out.cam_PHW, (4, 6)).shape == (0, 4, 6)
    assert scatter_pairs(out.cam_PHW, torch.zeros((0, 2), dtype=torch.int64), 3, 5).abs().sum() == 0


@pytest.mark.parametrize("scales", [(0.5, 1.5), (1.0, 0.0), ()])
def test_bad_scales_are_named(scales):
    with pytest.raises(UgrlError, match="cam scales"):
        multi_scale_cam(Net(), images(), PAIRS, BOXES, scales=scales)


def test_normalise_equals_loops_and_survives_empty_box_and_constant():
    cam = torch.rand(3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    cam[1] = 0.7
    out = normalise(cam, PAIRS, BOXES)
    torch.testing.assert_close(out[2], torch.tensor(ref_normalise(cam[2].tolist(), BOXES[2].tolist())).double())
    assert (out[1] == 0).all()
    empty = BOXES.clone()
    empty[2, 1] = 4
    assert (normalise(cam, PAIRS, empty)[2] == 0).all()


def test_dense_puts_pairs_where_they_belong_and_zeros_elsewhere():
    cam = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) + 1
    out = scatter_pairs(cam, PAIRS, 3, 5)
    assert out.shape == (3, 5, 4, 5)
    for p, (b, f) in enumerate(PAIRS.tolist()):
        assert torch.equal(out[b, f], cam[p])
    assert (out.flatten(2).sum(-1) > 0).sum() == 3


def test_cell_means_are_the_mean_of_each_cell():
    cam = torch.arange(2 * 4 * 6, dtype=torch.float64).view(2, 4, 6)
    out = cell_means(cam, (2, 3))
    assert out[0].tolist() == [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]
    assert torch.equal(out[1], out[0] + 24)


def test_inside_pixels_and_cells_sample_the_box():
    mask = inside_pixels(torch.tensor([[1, 3, 0, 2], [2, 2, 0, 4]]), (4, 4), "cpu")
    assert mask[0].int().tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert not mask[1].any()
    size, grid = (10, 7), (4, 3)
    boxes = torch.tensor([[3, 9, 1, 4]])
    want = [
        float(3 <= math.floor((i + 0.5) * 10 / 4) < 9 and 1 <= math.floor((j + 0.5) * 7 / 3) < 4)
        for i in range(4)
        for j in range(3)
    ]
    assert inside_cells(boxes, size, grid).flatten(1).float().tolist() == [want]
    assert 0 < sum(want) < 12


def test_spans_count_pairs_and_refuse_disorder():
    assert spans(PAIRS, 4) == [(0, 2), (2, 2), (2, 3), (3, 3)]
    assert spans(PAIRS[:0], 2) == [(0, 0), (0, 0)]
    for bad in (PAIRS.flip(0), PAIRS[[0, 0]]):
        with pytest.raises(UgrlError, match="ascending"):
            spans(bad, 3)
    with pytest.raises(UgrlError, match="images 0 to 2, expected 0 to 1"):
        spans(PAIRS, 2)


def test_pseudo_labels_equal_loops():
    g = torch.Generator().manual_seed(5)
    cam = torch.rand(3, 16, 24, dtype=torch.float64, generator=g)
    labels, conf = pseudo_labels(cam, PAIRS, BOXES, batch=3)
    assert labels.dtype == torch.int64 and conf.dtype == cam.dtype
    for b in range(3):
        own = PAIRS[:, 0] == b
        classes = PAIRS[own, 1].tolist()
        want = ref_pseudo_labels(cam[own].tolist(), classes, BOXES[b].tolist(), (16, 24), 0.55, 0.35)
        assert labels[b].tolist() == want[0]
        torch.testing.assert_close(conf[b], torch.tensor(want[1], dtype=torch.float64), rtol=0, atol=0)
    assert set(labels[0].unique().tolist()) == {0, 2, 5, 255}


def test_thresholds_at_equality_and_ties():
    cam = torch.tensor([[[0.25, 0.5, 0.75, 0.875]], [[0.25, 0.25, 0.75, 0.5]]])
    pairs, boxes = torch.tensor([[0, 2], [0, 3]]), torch.tensor([[0, 1, 0, 4]])
    labels, conf = pseudo_labels(cam, pairs, boxes, batch=1, high=0.5, low=0.25)
    assert labels.tolist() == [[[0, 255, 3, 3]]]
    assert conf.tolist() == [[[0.0, 0.0, 0.25, 0.375]]]
    labels, _ = pseudo_labels(cam, pairs, boxes, batch=1, high=0.5, low=0.5)
    assert labels.tolist() == [[[0, 0, 3, 3]]]


def test_an_image_without_a_tag_is_background_in_its_box():
    labels, conf = pseudo_labels(torch.zeros(0, 16, 24), PAIRS[:0], BOXES, batch=3)
    inside = inside_pixels(BOXES, (16, 24), "cpu")
    assert torch.equal(labels == 0, inside) and (labels[~inside] == 255).all()
    assert torch.equal(conf, inside * torch.tensor(0.35))


def test_thresholds_are_checked():
    for high, low in ((0.3, 0.4), (0.5, -0.1)):
        with pytest.raises(UgrlError, match="thresholds"):
            pseudo_labels(torch.zeros(3, 16, 24), PAIRS, BOXES, batch=3, high=high, low=low)


@pytest.mark.parametrize("beta", [2.0, 1.5])
def test_random_walk_equals_loops(beta):
    g = torch.Generator().manual_seed(7)
    cam = torch.rand(3, 6, dtype=torch.float64, generator=g)
    ahat = torch.rand(3, 6, 6, dtype=torch.float64, generator=g)
    ahat[0, 2] = 0
    out = random_walk(cam, PAIRS, ahat, beta=beta)
    for p, (b, _) in enumerate(PAIRS.tolist()):
        want = ref_random_walk(cam[p].tolist(), ahat[b].tolist(), beta)
        torch.testing.assert_close(out[p], torch.tensor(want, dtype=torch.float64))
    assert out[0, 2] == 0
    scaled = random_walk(cam, PAIRS, ahat * torch.rand(3, 6, 1, generator=g), beta=beta)
    torch.testing.assert_close(scaled, random_walk(cam, PAIRS, ahat, beta=beta))


def test_propagation_fills_an_object_from_a_part_of_it():
    # Two objects, left and right half; the CAM sees one cell of the left one.
    grid = (4, 6)
    side = (torch.arange(6) < 3).repeat(4)
    logits = torch.where(side[:, None] == side[None, :], 6.0, -6.0)[None].expand(3, -1, -1)
    cam = torch.zeros(3, 16, 24)
    cam[:, 4:8, 4:8] = 1
    whole = torch.tensor([[0, 16, 0, 24]] * 3)
    out = cell_means(propagate_cam(cam, PAIRS, logits, whole, grid=grid), grid)[0].flatten()
    assert out[side].min() > 0.07 and out[~side].max() < 0.05
    assert out.max() < 1
    # Nothing beyond the radius, nothing outside the box, and padding gives nothing.
    near = propagate_cam(cam, PAIRS, torch.zeros(3, 24, 24), whole, grid=grid, radius=1)
    assert (near[:, :, 20:] == 0).all() and (near[:, 4:8, 4:8] > 0).all()
    boxed = propagate_cam(
        torch.ones(3, 16, 24) * inside_pixels(BOXES[PAIRS[:, 0]], (16, 24), "cpu"), PAIRS, logits, BOXES, grid=grid
    )
    torch.testing.assert_close(boxed, inside_pixels(BOXES[PAIRS[:, 0]], (16, 24), "cpu").float())
    assert propagate_cam(cam[:0], PAIRS[:0], logits, whole, grid=grid).shape == (0, 16, 24)


def test_propagation_names_what_does_not_fit():
    with pytest.raises(UgrlError, match="affinity"):
        propagate_cam(torch.zeros(3, 16, 24), PAIRS, torch.zeros(3, 9, 9), BOXES, grid=(4, 6))
    with pytest.raises(UgrlError, match="beta 0"):
        random_walk(torch.zeros(3, 6), PAIRS, torch.ones(3, 6, 6), beta=0)
