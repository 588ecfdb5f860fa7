"""Depthwise convolutions: both gradients are those of autograd."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.backbone_kit import network
from ugrl.model.depthwise import DepthwiseConv2d, gains, quicken

C = 6


def depthwise(kernel=5, dilation=1, padding=2, bias=True, **others) -> nn.Conv2d:
    options = {"groups": C, "kernel_size": kernel, "dilation": dilation, "padding": padding, "bias": bias} | others
    torch.manual_seed(0)
    return nn.Conv2d(C, C, **options).double()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kernel": 7, "padding": 3},
        {"kernel": 3, "dilation": 2, "padding": 2},
        {"dilation": 2, "padding": 4},
        {"padding": 0},
        {"kernel": (3, 7), "padding": (1, 2), "dilation": 3},
        {"kernel": 4, "padding": 1, "dilation": 2},
    ],
)
def test_gradients_are_those_of_autograd(options, layout):
    plain = depthwise(**options)
    ours = DepthwiseConv2d.of(plain)
    assert gains(plain)
    x = torch.randn(3, C, 19, 23, dtype=torch.float64).to(memory_format=layout)
    found = []
    for conv in (plain, ours):
        x_own = x.clone().requires_grad_()
        y = conv(x_own)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        found.append((y, *torch.autograd.grad((y * weights).sum(), [x_own, *conv.parameters()])))
    assert len(found[0]) == (3 if plain.bias is None else 4)
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_only_what_is_asked_for_has_a_gradient():
    conv = DepthwiseConv2d.of(depthwise())
    x = torch.randn(2, C, 8, 8, dtype=torch.float64)
    conv(x).sum().backward()
    assert conv.weight.grad is not None and conv.bias.grad is not None
    conv.requires_grad_(False)
    x.requires_grad_()
    conv.weight.grad = None
    conv(x).sum().backward()
    assert conv.weight.grad is None and x.grad is not None


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 3, "padding": 1},
        {"stride": 2},
        {"groups": 1},
        {"groups": 2},
        {"padding": "same"},
        {"padding_mode": "reflect"},
        {"padding": 5},
        {"dilation": (1, 2), "padding": (2, 4)},
    ],
)
def test_what_has_fast_kernels_or_another_form_stays(options):
    body = nn.Sequential(depthwise(**options))
    assert quicken(body) == 0 and type(body[0]) is nn.Conv2d


def test_parameters_and_their_names_stay():
    body = nn.Sequential(depthwise(), nn.Sequential(nn.ReLU(), depthwise(kernel=3, dilation=2)))
    before = dict(body.named_parameters())
    assert quicken(body) == 2 and quicken(body) == 0
    after = dict(body.named_parameters())
    assert list(before) == list(after) and all(before[n] is after[n] for n in before)


@pytest.mark.parametrize("how", ["autocast", "no grad"])
def test_where_it_does_not_help_it_is_its_base_class(how, monkeypatch):
    monkeypatch.setattr("ugrl.model.depthwise._DepthwiseConv.apply", None)
    plain = depthwise().float()
    ours, x = DepthwiseConv2d.of(plain), torch.randn(2, C, 8, 8)
    mode = torch.autocast("cpu", torch.bfloat16) if how == "autocast" else torch.no_grad()
    with mode:
        expected = F.conv2d(x, plain.weight, plain.bias, padding=2, groups=C)
        found = ours(x)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "convnext_atto"])
def test_an_encoder_trains_as_timm_s(name):
    encoder = network(f"timm/{name}").encoder.double()
    changed = [m for m in encoder.modules() if isinstance(m, DepthwiseConv2d)]
    assert len(changed) >= 6
    plain = timm.create_model(name, num_classes=0, output_stride=16).double().eval()
    plain.load_state_dict(encoder.body.state_dict(), strict=False)
    assert not any(isinstance(m, DepthwiseConv2d) for m in plain.modules())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    last = encoder(images)[0][3]
    other = plain.forward_features(encoder._prepared(images))
    weights = torch.randn_like(last)
    (last * weights).sum().backward()
    (other * weights).sum().backward()
    own = dict(plain.named_parameters())
    seen = 0
    for n, p in encoder.body.named_parameters():
        if p.grad is not None and own[n].grad is not None:
            torch.testing.assert_close(p.grad, own[n].grad, rtol=1e-8, atol=1e-8)
            seen += 1
    assert seen > 50
