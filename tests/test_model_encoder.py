from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from ugrl.errors import UgrlError
from ugrl.model import encoder, network
from ugrl.model.encoder import SPECS, MiT, attention_logits, to_grid, to_tokens
from ugrl.model.network import UGRLNet
from ugrl.model.noise import Noise, keep_scale, sample_noise
from ugrl.model.weights import convert


def tiny(seed: int = 0, **changes: object) -> MiT:
    torch.manual_seed(seed)
    net = MiT(replace(SPECS["tiny"], **changes)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return net


@pytest.mark.parametrize("name", ["mit_b0", "mit_b1"])
def test_features_equal_transformers(name):
    from transformers import SegformerConfig, SegformerModel

    spec = SPECS[name]
    theirs = SegformerModel(
        SegformerConfig(
            hidden_sizes=list(spec.dims),
            depths=list(spec.depths),
            num_attention_heads=list(spec.heads),
            sr_ratios=list(spec.sr_ratios),
            strides=list(spec.strides),
        )
    ).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    # transformers gives every norm eps 1e-5; the published encoder has 1e-6 around blocks and at the end of stages.
    changed = 0
    for key, module in theirs.named_modules():
        parts = key.split(".")
        if parts[-1] in ("layernorm_before", "layernorm_after") or parts[2:] == ["layer_norm"]:
            module.eps = 1e-6
            changed += 1
    assert changed == 2 * sum(spec.depths) + 4
    ours = MiT(spec).double()
    ours.load_state_dict(convert(theirs.state_dict(), "transformers")[0])
    images = torch.randn(2, 3, 64, 72, dtype=torch.float64)
    with torch.no_grad():
        features, _ = ours(images)
        expected = theirs.eval()(images, output_hidden_states=True).hidden_states[-4:]
    for mine, other in zip(features, expected, strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-8)


def test_grid_sizes_and_layout():
    net = tiny()
    features, pairs = net(torch.randn(1, 3, 96, 96, dtype=torch.float64))
    assert [tuple(f.shape[1:]) for f in features] == [(32, 24, 24), (64, 12, 12), (128, 12, 12), (192, 12, 12)]
    assert [tuple(t.shape) for pair in pairs for t in pair] == [(1, 144, 192)] * 4
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)
    x = features[1]
    assert torch.equal(to_grid(to_tokens(x), (12, 12)), x)


def test_tiny_parameter_count():
    count = sum(p.numel() for p in MiT(SPECS["tiny"]).parameters())
    assert 1_200_000 < count < 1_400_000


def test_published_sizes():
    """Parameter counts of the ImageNet encoders, computed layer by layer from the published shapes."""
    for name in ("mit_b0", "mit_b2", "mit_b5"):
        spec = SPECS[name]
        want = 0
        for i, (c, depth, sr) in enumerate(zip(spec.dims, spec.depths, spec.sr_ratios, strict=True)):
            kernel, c_in = (7, 3) if i == 0 else (3, spec.dims[i - 1])
            want += kernel * kernel * c_in * c + c + 2 * c + 2 * c
            reduction = sr * sr * c * c + c + 2 * c if sr > 1 else 0
            attention = 4 * (c * c + c) + reduction
            mlp = c * 4 * c + 4 * c + 4 * c * 9 + 4 * c + 4 * c * c + c
            want += depth * (attention + mlp + 4 * c)
        with torch.device("meta"):
            assert sum(p.numel() for p in MiT(spec).parameters()) == want, name


def test_last_stage_without_attention_maps_is_refused():
    with pytest.raises(UgrlError, match="sr_ratio 2"):
        MiT(replace(SPECS["tiny"], sr_ratios=(4, 2, 1, 2)))


def test_attention_path_equals_sdpa_path():
    """Softmax of the returned logits, scaled, reproduces what the fused attention computed."""
    net = tiny()
    blocks = list(net.stages[3].blocks)
    seen = []
    for block in blocks:
        block.attn.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out[0])))
    _, pairs = net(torch.randn(2, 3, 48, 64, dtype=torch.float64))
    logits = attention_logits(pairs, 6)
    assert logits.shape == (2, 12, 48, 48)
    for i, (attn, x, fused) in enumerate(seen):
        head = F.linear(x, attn.kv.weight[192:], attn.kv.bias[192:]).unflatten(-1, (6, 32)).transpose(1, 2)
        weights = (logits[:, 6 * i : 6 * i + 6] / 32**0.5).softmax(-1)
        torch.testing.assert_close(attn.proj((weights @ head).transpose(1, 2).flatten(2)), fused, rtol=0, atol=1e-12)
    # A logit by hand: block 1, head 2, query 5, key 7.
    q, k = pairs[1]
    assert logits[0, 8, 5, 7].item() == pytest.approx((q[0, 5, 64:96] * k[0, 7, 64:96]).sum().item(), abs=1e-12)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (61, 100)])
def test_any_size(size):
    features, _ = tiny()(torch.randn(1, 3, *size, dtype=torch.float64))
    assert tuple(features[0].shape[-2:]) == tuple(-(-n // 4) for n in size)
    assert all(torch.isfinite(f).all() for f in features)
    with torch.device("meta"):
        assert MiT(SPECS["mit_b0"])(torch.empty(1, 3, *size))[0][3].shape[1] == 256


def test_too_small_image_is_named():
    with pytest.raises(UgrlError, match=r"31x40 px .* at least 32 px"):
        MiT(SPECS["mit_b0"])(torch.zeros(1, 3, 31, 40))


def test_noise_follows_the_sample():
    options = {"layers": 10, "channels": 6, "device": "cpu"}
    many = sample_noise(3, 11, ["a", "b", "c"], **options)
    few = sample_noise(3, 11, ["c", "a"], **options)
    assert torch.equal(many.drop_path_BL[[2, 0]], few.drop_path_BL)
    assert torch.equal(many.dropout_BD[[2, 0]], few.dropout_BD)
    for other in (sample_noise(4, 11, ["a"], **options), sample_noise(3, 12, ["a"], **options)):
        assert not torch.equal(other.drop_path_BL[0], many.drop_path_BL[0])
    assert not torch.equal(many.drop_path_BL[0, :6], many.dropout_BD[0])


def test_noise_is_uniform():
    u = sample_noise(0, 0, [str(i) for i in range(500)], layers=8, channels=8, device="cpu")
    for part in (u.drop_path_BL, u.dropout_BD):
        assert 0 <= part.min() and part.max() < 1
        assert abs(part.mean().item() - 0.5) < 0.02
        assert abs((part < 0.1).double().mean().item() - 0.1) < 0.02


def test_keep_scale_has_mean_one():
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert keep_scale(u, 0.1).mean().item() == pytest.approx(1.0)


def test_sample_is_the_same_in_any_batch():
    net = tiny(drop_path=0.5).train()
    images = torch.randn(3, 3, 48, 48, dtype=torch.float64)
    options = {"layers": net.layers, "channels": 1, "device": "cpu"}
    together = net(images, sample_noise(0, 5, ["a", "b", "c"], **options))[0][3]
    alone = net(images[1:2], sample_noise(0, 5, ["b"], **options))[0][3]
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-11)
    assert not torch.allclose(together, net(images, sample_noise(0, 6, ["a", "b", "c"], **options))[0][3])


def test_without_noise_nothing_is_dropped_in_either_mode():
    net = tiny(drop_path=0.9)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(net.train()(images)[0][3], net.eval()(images)[0][3])
    kept = Noise(torch.full((2, net.layers), 0.999, dtype=torch.float64), None)
    assert not torch.allclose(net(images, kept)[0][3], net(images)[0][3])  # kept branches are scaled up


def test_dropped_branches_are_skipped():
    """With every branch but the first block's dropped, a stage is its embedding and norm."""
    net = tiny(drop_path=0.5)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    features, _ = net(images, Noise(torch.zeros(1, net.layers, dtype=torch.float64), None))
    stage = net.stages[1]
    tokens, size = stage.embed(features[0])
    torch.testing.assert_close(features[1], to_grid(stage.norm(tokens), size), rtol=0, atol=1e-12)
    assert net.rates_L.tolist() == pytest.approx([0, 0, 0.125, 0.125, 0.25, 0.25, 0.375, 0.375, 0.5, 0.5])


def test_passes_without_gradients_compute_the_same() -> None:
    """oneDNN's products (where this torch has them) against the training pass's, for every backbone width."""
    torch.manual_seed(0)
    for name in ("tiny", "mit_b0"):
        net = MiT(SPECS[name])
        x = torch.randn(2, 3, 64, 96)
        features, pairs = net(x)
        with torch.no_grad():
            plain_features, plain_pairs = net(x)
        for a, b in zip(
            (*features, *pairs[0], *pairs[1]), (*plain_features, *plain_pairs[0], *plain_pairs[1]), strict=True
        ):
            torch.testing.assert_close(a.detach(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("size", [(64, 96), (40, 33)])
def test_work_in_small_parts_is_exact(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of rows in the feed-forward part, and image by image, against everything at once, in float64."""
    torch.manual_seed(0)
    net = UGRLNet(num_classes=3, backbone="tiny").double()
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    ffn = net.encoder.stages[0].blocks[0].mlp
    calls: list[int] = []
    ffn.dwconv.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        whole = net.cam(x, affinity=True)
        assert len(calls) == 1
        for module in (encoder, network):
            monkeypatch.setattr(module, "CPU_BYTES", 2**13)
        parts = net.cam(x, affinity=True)
    assert len(calls) > 1 + 3  # each image by itself, and in strips
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    calls.clear()
    net.encoder(x)  # with gradients nothing is cut
    assert len(calls) == 1
