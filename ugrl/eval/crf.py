"""Fully connected CRF as post-processing: own code without a compiled dependency, or ``pydensecrf`` where it is there.

Mean field of Krähenbühl and Koltun (NeurIPS 2011): a Potts model whose pairwise term is the sum of a Gaussian in
position and one in position and colour, both normalised symmetrically. The position filter is exact up to a cut at
4 standard deviations. The bilateral filter runs on a permutohedral lattice (Adams, Baek, Davis, Eurographics 2010):
linear in pixels, and an approximation, because lattice points that no pixel touches carry nothing. Against exact sums
the normalised filter of a step between two colours is off by 0.02 of the step on average and by 0.08 at worst.
Public CRF implementations filter on the same lattice.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ugrl.config import EvalConfig
from ugrl.errors import ConfigError, UgrlError

Backend = Literal["own", "pydensecrf"]

NEGLIGIBLE = 1e-3
"""A class whose probability is nowhere above this takes no part: what it could send cannot make it win anywhere."""
LEAST = 1e-10
"""Smaller probabilities count as this one: their logarithm is finite."""


class PermutohedralLattice:
    """A Gaussian filter of unit standard deviation between scattered points, in O(N d^2).

    Args:
        features_Nd: Positions in units of their standard deviation, on the CPU.

    Raises:
        UgrlError: The points spread over more lattice cells than an int64 can number.
    """

    def __init__(self, features_Nd: Tensor) -> None:
        points, d = features_Nd.shape
        elevated, anchor, rank = self._simplex(features_Nd.double())
        # Barycentric weights: from the sorted distances to the anchor.
        delta = (elevated - anchor) / (d + 1)
        weight = torch.zeros(points, d + 2, dtype=torch.float64)
        weight.scatter_add_(1, d - rank, delta)
        weight.scatter_add_(1, d + 1 - rank, -delta)
        weight[:, 0] += 1 + weight[:, d + 1]
        weight = weight[:, : d + 1]
        # Vertex k of the simplex adds k to the coordinates of rank <= d - k, and k - (d + 1) to the others.
        step = torch.arange(d + 1)[None, :, None]
        shift = torch.where(rank[:, None, :d] <= d - step, step, step - (d + 1))
        keys = anchor[:, None, :d].long() + shift
        lowest = keys.amin((0, 1)) - d - 1
        span = keys.amax((0, 1)) + d + 2 - lowest
        if math.prod(span.tolist()) >= 2**62:
            raise UgrlError(f"crf: features spread over {span.tolist()} lattice cells, expected larger deviations")
        stride = torch.tensor([math.prod(span[i + 1 :].tolist()) for i in range(d)])
        packed = ((keys - lowest) * stride).sum(-1)
        vertices, index = packed.unique(return_inverse=True)
        self.count = len(vertices)
        rows = torch.arange(points)[:, None].expand(-1, d + 1)
        entries = torch.stack([index.flatten(), rows.flatten()])
        size = (self.count, points)
        self._splat = torch.sparse_coo_tensor(
            entries, weight.flatten().float(), size, check_invariants=False
        ).coalesce()
        self._slice = self._splat.t().coalesce()
        # Neighbours along the d + 1 directions; a missing one is the extra row of zeros at the end.
        self._near = []
        for axis in range(d + 1):
            move = torch.ones(d, dtype=torch.int64)
            if axis < d:
                move[axis] = -d
            jump = (move * stride).sum()
            pair = []
            for target in (vertices + jump, vertices - jump):
                at = torch.searchsorted(vertices, target).clamp(max=self.count - 1)
                pair.append(torch.where(vertices[at] == target, at, self.count))
            self._near.append((pair[0], pair[1]))
        self._scale = 1 / (1 + 2.0**-d)

    @staticmethod
    def _simplex(features_Nd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed points in the plane x·1 = 0 and find the simplex around each: its remainder-0 vertex and the ranks."""
        points, d = features_Nd.shape
        axes = torch.arange(d, dtype=torch.float64)
        # The lattice's own blur has a variance of 2/3 (d + 1)^2 in this embedding.
        scaled = features_Nd * (math.sqrt(2 / 3) * (d + 1) / ((axes + 1) * (axes + 2)).sqrt())
        tail = scaled.flip(1).cumsum(1).flip(1)
        elevated = torch.zeros(points, d + 1, dtype=torch.float64)
        elevated[:, :d] += tail
        elevated[:, 1:] -= (axes + 1) * scaled
        anchor = (elevated / (d + 1)).round() * (d + 1)
        excess = (anchor.sum(1, keepdim=True) / (d + 1)).long()
        order = (elevated - anchor).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(d + 1).expand(points, -1).contiguous())
        # Rounding may leave the plane; the coordinates that were rounded the most take it back.
        rank = rank + excess
        wrap = (rank < 0).long() - (rank > d).long()
        return elevated, anchor + wrap * (d + 1), rank + wrap * (d + 1)

    def filter(self, values_NC: Tensor) -> Tensor:
        """Sum over all points of a Gaussian of their distance times their value.

        Args:
            values_NC: float32 values of the points.

        Returns:
            (N, C); up to the lattice's error, ``sum_j exp(-|f_i - f_j|^2 / 2) v_j``.
        """
        lattice = torch.sparse.mm(self._splat, values_NC)
        zero = lattice.new_zeros((1, lattice.shape[1]))
        for one, two in self._near:
            padded = torch.cat([lattice, zero])
            lattice = lattice + 0.5 * (padded[one] + padded[two])
        return torch.sparse.mm(self._slice, lattice) * self._scale


def gaussian_filter(values_CHW: Tensor, std: float) -> Tensor:
    """Sum over pixels of a Gaussian of their distance (peak 1, cut at 4 deviations); nothing beyond the border."""
    reach = max(1, math.ceil(4 * std))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=values_CHW.dtype) / std) ** 2)
    column = F.conv2d(values_CHW[:, None], kernel.view(1, 1, -1, 1), padding=(reach, 0))
    return F.conv2d(column, kernel.view(1, 1, 1, -1), padding=(0, reach))[:, 0]


def dense_crf(
    probs_CHW: np.ndarray,
    image_HW3: np.ndarray,
    *,
    iterations: int = 10,
    pos_w: float = 3.0,
    pos_xy_std: float = 3.0,
    bi_w: float = 4.0,
    bi_xy_std: float = 64.0,
    bi_rgb_std: float = 5.0,
    backend: Backend = "own",
) -> np.ndarray:
    """Sharpen class probabilities along the edges of an image.

    The defaults are those of AFA's released evaluation. As in the public implementations every pixel also sends to
    itself, and a kernel K acts as D^(-1/2) K D^(-1/2) with D its row sums.

    Args:
        probs_CHW: Class probabilities.
        image_HW3: uint8 RGB.
        iterations: Mean-field updates.
        pos_w: Weight of the position kernel.
        pos_xy_std: Its deviation in pixels.
        bi_w: Weight of the position-and-colour kernel.
        bi_xy_std: Its deviation in pixels.
        bi_rgb_std: Its deviation in grey levels.
        backend: What computes it, see :func:`find_backend`; the two give nearly the same labels.

    Returns:
        float32 (C, H, W), summing to 1; classes that are negligible everywhere (below 0.001) become 0.

    Raises:
        UgrlError: Sizes differ, or a deviation is not positive.
    """
    if probs_CHW.ndim != 3 or image_HW3.shape != (*probs_CHW.shape[1:], 3):
        raise UgrlError(f"crf: probabilities {probs_CHW.shape} and image {image_HW3.shape}, expected CHW and HW3")
    if min(pos_xy_std, bi_xy_std, bi_rgb_std) <= 0:
        raise UgrlError(f"crf: deviations {pos_xy_std}, {bi_xy_std}, {bi_rgb_std}, expected positive ones")
    everything = torch.from_numpy(np.ascontiguousarray(probs_CHW, dtype=np.float32))
    kept = (everything.flatten(1).amax(1) > NEGLIGIBLE).nonzero().flatten()
    probs = everything[kept]
    out = torch.zeros_like(everything)
    if backend == "pydensecrf":
        kernels = (pos_w, pos_xy_std, bi_w, bi_xy_std, bi_rgb_std)
        out[kept] = torch.from_numpy(_pydensecrf(probs.numpy(), image_HW3, iterations, *kernels))
        return out.numpy()
    classes, height, width = probs.shape
    unary_CHW = probs.clamp_min(LEAST).log()

    y_HW, x_HW = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    colour_N3 = torch.from_numpy(image_HW3.astype(np.float64)).view(-1, 3) / bi_rgb_std
    place_N2 = torch.stack([y_HW.flatten(), x_HW.flatten()], 1).double() / bi_xy_std
    lattice = PermutohedralLattice(torch.cat([place_N2, colour_N3], 1))
    bi_norm_N1 = lattice.filter(torch.ones(height * width, 1)).clamp_min(1e-20).rsqrt()
    pos_norm_HW = gaussian_filter(torch.ones(1, height, width), pos_xy_std)[0].rsqrt()

    belief_CHW = unary_CHW.softmax(0)
    for _ in range(iterations):
        near_CHW = gaussian_filter(belief_CHW * pos_norm_HW, pos_xy_std) * pos_norm_HW
        alike_NC = lattice.filter(belief_CHW.flatten(1).t() * bi_norm_N1) * bi_norm_N1
        alike_CHW = alike_NC.t().view(classes, height, width)
        belief_CHW = (unary_CHW + pos_w * near_CHW + bi_w * alike_CHW).softmax(0)
    out[kept] = belief_CHW
    return out.numpy()


def _pydensecrf(
    probs_CHW: np.ndarray,
    image_HW3: np.ndarray,
    iterations: int,
    pos_w: float,
    pos_xy_std: float,
    bi_w: float,
    bi_xy_std: float,
    bi_rgb_std: float,
) -> np.ndarray:
    from pydensecrf.densecrf import DenseCRF2D

    classes, height, width = probs_CHW.shape
    field = DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(-np.log(probs_CHW.clip(LEAST)).reshape(classes, -1)))
    field.addPairwiseGaussian(sxy=pos_xy_std, compat=pos_w)
    image = np.array(image_HW3, dtype=np.uint8, order="C")  # a copy: the package takes no read-only memory
    field.addPairwiseBilateral(sxy=bi_xy_std, srgb=bi_rgb_std, rgbim=image, compat=bi_w)
    return np.array(field.inference(iterations), dtype=np.float32).reshape(probs_CHW.shape)


def find_backend(name: str) -> Backend:
    """What computes a CRF on this machine.

    Args:
        name: ``eval.crf_backend``; ``auto`` is ``pydensecrf`` where it is installed.

    Raises:
        ConfigError: It is to be ``pydensecrf``, which is not installed.
    """
    there = importlib.util.find_spec("pydensecrf") is not None
    if name == "pydensecrf" and not there:
        raise ConfigError(
            "eval.crf_backend is pydensecrf, which is not installed; pip install 'ugrl[crf]', or eval.crf_backend=own"
        )
    return "pydensecrf" if there and name != "own" else "own"


def sharpen(probs_CHW: np.ndarray, image_HW3: np.ndarray, how: EvalConfig) -> np.ndarray:
    """:func:`dense_crf` as the configuration says.

    Args:
        probs_CHW: Class probabilities.
        image_HW3: uint8 RGB.
        how: The keys ``crf_…`` are read.

    Raises:
        ConfigError: As :func:`find_backend`.
        UgrlError: As :func:`dense_crf`.
    """
    return dense_crf(
        probs_CHW,
        image_HW3,
        iterations=how.crf_iterations,
        pos_w=how.crf_pos_w,
        pos_xy_std=how.crf_pos_std,
        bi_w=how.crf_bi_w,
        bi_xy_std=how.crf_bi_xy_std,
        bi_rgb_std=how.crf_bi_rgb_std,
        backend=find_backend(how.crf_backend),
    )
