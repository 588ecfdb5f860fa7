from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ugrl.errors import ConfigError
from ugrl.model.affinity import AffinityHead
from ugrl.model.decoder import Decoder, ProjectionHead
from ugrl.model.encoder import attention_logits
from ugrl.model.noise import Noise

DIMS = (5, 6, 7, 9)
SIZES = {
    "published strides": ((12, 16), (6, 8), (3, 4), (3, 4)),
    "tiny strides": ((12, 16), (6, 8), (6, 8), (6, 8)),
    "odd sizes": ((13, 11), (7, 6), (4, 3), (4, 3)),
    "all the same": ((4, 4), (4, 4), (4, 4), (4, 4)),
}


def features(sizes, seed=0):
    torch.manual_seed(seed)
    return tuple(torch.randn(2, d, *s, dtype=torch.float64).requires_grad_() for d, s in zip(DIMS, sizes, strict=True))


def naive(decoder: Decoder, levels, training_noise=None):
    """The head as published: project, upsample, concatenate F4…F1, fuse, norm, ReLU, dropout, classify."""
    full = levels[0].shape[-2:]
    maps = []
    for level, layer in zip(levels, decoder.project, strict=True):
        y = layer(level.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, level.shape[-2:])
        maps.append(F.interpolate(y, size=full, mode="bilinear", align_corners=False))
    z = F.relu(decoder.norm(decoder.fuse(torch.cat(maps[::-1], dim=1))))
    dropped = z
    if training_noise is not None:
        keep = (training_noise.dropout_BD >= decoder.dropout).double() / (1 - decoder.dropout)
        dropped = z * keep[:, :, None, None]
    return z, decoder.classify(dropped)


@pytest.mark.parametrize("norm", ["sync_batch", "group"])
@pytest.mark.parametrize("name", SIZES)
def test_decoder_is_exact(name, norm):
    torch.manual_seed(1)
    decoder = Decoder(DIMS, 4, dim=8, norm=norm, dropout=0.4).double()
    for p in decoder.parameters():
        torch.nn.init.normal_(p, std=0.5)
    noise = Noise(None, torch.rand(2, 8, dtype=torch.float64))
    results = []
    for function in (decoder, lambda x, n: naive(decoder, x, n)):
        levels = features(SIZES[name])
        decoder.zero_grad()
        z, logits = function(levels, noise)
        (logits.square().sum() + z.pow(3).sum()).backward()
        results.append([z, logits, *(x.grad for x in levels), *(p.grad.clone() for p in decoder.parameters())])
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-9)


def test_dropout_is_by_channel_and_needs_noise():
    decoder = Decoder(DIMS, 3, dim=8, dropout=0.5).double()
    z = torch.rand(2, 8, 3, 3, dtype=torch.float64)
    plain = F.conv2d(z, decoder.classify.weight, decoder.classify.bias)
    torch.testing.assert_close(decoder.train().logits(z), plain)
    u = torch.zeros(2, 8, dtype=torch.float64)
    u[1] = 0.9
    dropped = decoder.logits(z, Noise(None, u))
    torch.testing.assert_close(dropped[0], decoder.classify.bias[:, None, None].expand(3, 3, 3))
    torch.testing.assert_close(dropped[1], F.conv2d(2 * z[1:], decoder.classify.weight, decoder.classify.bias)[0])


def test_embeddings_have_unit_length():
    torch.manual_seed(0)
    head = ProjectionHead(8, 16)
    e = head(torch.randn(2, 8, 5, 5))
    assert e.shape == (2, 16, 5, 5) and e.dtype == torch.float32
    torch.testing.assert_close(e.norm(dim=1), torch.ones(2, 5, 5))
    assert head.double()(torch.randn(2, 8, 5, 5, dtype=torch.float64)).dtype == torch.float64


def test_zero_embedding_is_no_nan():
    head = ProjectionHead(8, 16, norm="group")
    z = torch.zeros(1, 8, 2, 2, requires_grad=True)
    e = head(z)
    assert torch.equal(e, torch.zeros_like(e))
    e.sum().backward()
    assert torch.isfinite(z.grad).all() and all(torch.isfinite(p.grad).all() for p in head.parameters())


def loops(head: AffinityHead, attn):
    """Eq. 1 pair by pair."""
    b, _, n, _ = attn.shape
    out = torch.zeros(b, n, n, dtype=attn.dtype)
    for k in range(b):
        for i in range(n):
            for j in range(n):
                s = attn[k, :, i, j] + attn[k, :, j, i]
                if head.hidden is not None:
                    s = head.hidden(s).relu()
                out[k, i, j] = head.out(s)
    return out


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_affinity_is_eq_1(kind):
    torch.manual_seed(0)
    head = AffinityHead(6, kind, head_dim=4).double()
    for p in head.parameters():
        torch.nn.init.normal_(p)
    pairs = tuple(tuple(torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True) for _ in "qk") for _ in range(2))
    attn = attention_logits(pairs, 3)
    a = head(attn)
    torch.testing.assert_close(a, loops(head, attn), rtol=0, atol=1e-12)
    assert torch.equal(a, a.transpose(1, 2))
    fast = head.from_pairs(pairs, 3)
    torch.testing.assert_close(fast, a, rtol=0, atol=1e-12)
    assert torch.equal(fast, fast.transpose(1, 2))
    leaves = [t for pair in pairs for t in pair] + list(head.parameters())
    weight = torch.randn_like(a)
    for mine, plain in zip(
        torch.autograd.grad((fast.sigmoid() * weight).sum(), leaves, retain_graph=True),
        torch.autograd.grad((a.sigmoid() * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)


def test_linear_affinity_starts_as_mean_of_scaled_logits():
    attn = torch.randn(1, 6, 4, 4)
    want = (attn + attn.transpose(-1, -2)).mean(1) / 8
    torch.testing.assert_close(AffinityHead(6, head_dim=64)(attn), want)


def test_unknown_affinity():
    with pytest.raises(ConfigError, match="got 'conv', expected linear or mlp"):
        AffinityHead(4, "conv")
