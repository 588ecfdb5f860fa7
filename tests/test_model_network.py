from __future__ import annotations

import pytest
import torch

from ugrl.errors import ConfigError
from ugrl.model.encoder import attention_logits
from ugrl.model.network import UGRLNet
from ugrl.model.noise import sample_noise

IDS = ["a", "b"]


def build(**options) -> UGRLNet:
    torch.manual_seed(0)
    return UGRLNet(**{"num_classes": 3, "backbone": "tiny", "decoder_dim": 16, "d_seg": 8, **options})


def images(*size, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(2, 3, *size, dtype=dtype)


def test_shapes():
    net = build()
    out = net(images(64, 48), attention=True)
    assert out.logits_BF.shape == (2, 3)
    assert out.seg_BChw.shape == (2, 4, 16, 12)
    assert out.emb_BDhw.shape == (2, 8, 16, 12)
    assert out.affinity_BNN.shape == (2, 48, 48)
    assert out.attn_BMNN.shape == (2, net.encoder.maps, 48, 48)
    assert (net.layers, net.dim) == (10, 192)
    torch.testing.assert_close(net.g_cls(out.attn_BMNN), out.affinity_BNN, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.emb_BDhw.norm(dim=1), torch.ones(2, 16, 12))


def test_only_what_was_asked_for():
    out = build()(images(32, 32), decode=False, affinity=False, embed=False)
    assert (out.seg_BChw, out.emb_BDhw, out.affinity_BNN, out.attn_BMNN) == (None, None, None, None)


def test_asking_for_more_changes_nothing():
    net = build().double()
    x = images(32, 32, dtype=torch.float64)
    full, bare = net(x, attention=True), net(x, decode=False, affinity=False, embed=False)
    assert torch.equal(full.logits_BF, bare.logits_BF)
    assert all(torch.equal(a, b) for a, b in zip(full.features, bare.features, strict=True))


@pytest.mark.parametrize("options", [{}, {"pooling": "gap", "affinity": "mlp", "norm": "group"}])
def test_float64_everywhere(options):
    net = build(**options).double()
    x = images(40, 33, dtype=torch.float64)
    noise = sample_noise(0, 0, IDS, layers=net.layers, channels=16, device="cpu")
    out = net(x, noise=noise, boxes=torch.tensor([[0, 40, 0, 33], [0, 20, 0, 33]]), attention=True)
    tensors = [*out.features, out.logits_BF, out.attn_BMNN, out.affinity_BNN, out.seg_BChw, out.emb_BDhw]
    assert all(t.dtype == torch.float64 and torch.isfinite(t).all() for t in tensors)
    (out.logits_BF.sum() + out.seg_BChw.square().sum() + out.emb_BDhw[:, 0].sum() + out.affinity_BNN.sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_gradient_of_affinity_reaches_the_encoder_and_g_cls_only():
    net = build()
    net(images(32, 32)).affinity_BNN.sigmoid().sum().backward()
    reached = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None}
    assert reached == {"encoder", "g_cls"}
    assert net.encoder.stages[0].embed.proj.weight.grad.abs().sum() > 0
    # The last block's values are read by no attention logit; its queries are.
    attn = net.encoder.stages[3].blocks[1].attn
    assert attn.q.weight.grad.abs().sum() > 0 and attn.proj.weight.grad is None


def test_cam_pass_is_classifier_on_f4_in_any_mode():
    net = build()
    x = images(48, 64)
    out = net.eval()(x)
    with torch.no_grad():
        raw, f4, affinity = net.train().cam(x, affinity=True)
        assert net.cam(x, affinity=False)[2] is None
    torch.testing.assert_close(raw, net.classifier(out.features[3]))
    torch.testing.assert_close(f4, out.features[3])
    torch.testing.assert_close(affinity, out.affinity_BNN)
    torch.testing.assert_close(net.raw_from(f4), raw)


@pytest.mark.parametrize("pooling", ["gmp", "gap"])
def test_pooling(pooling):
    net = build(pooling=pooling)
    out = net(images(32, 48))
    f4 = out.features[3]
    pooled = f4.amax((2, 3)) if pooling == "gmp" else f4.mean((2, 3))
    torch.testing.assert_close(out.logits_BF, pooled @ net.classifier.weight.flatten(1).T)
    if pooling == "gap":
        torch.testing.assert_close(out.logits_BF, net.raw_from(f4).mean((2, 3)))


@pytest.mark.parametrize("pooling", ["gmp", "gap"])
def test_pooling_stays_in_the_box(pooling):
    net = build(pooling=pooling).double()
    f4 = torch.randn(3, 192, 4, 4, dtype=torch.float64)
    # Cells are 8 px: centres 4, 12, 20, 28. The second box holds rows 1–2 and columns 0–1, the third no centre.
    boxes = torch.tensor([[0, 32, 0, 32], [5, 21, 0, 13], [5, 11, 5, 11]])
    got = net.scores(f4, boxes, (32, 32))
    for i, crop in enumerate((f4[0], f4[1, :, 1:3, 0:2], f4[2])):
        torch.testing.assert_close(got[i : i + 1], net.scores(crop[None]))


def test_box_of_the_whole_image_changes_nothing():
    net = build()
    x = images(33, 47)
    boxes = torch.tensor([[0, 33, 0, 47]] * 2)
    assert torch.equal(net(x, boxes=boxes).logits_BF, net(x).logits_BF)


@pytest.mark.parametrize("size", [(32, 32), (37, 59), (96, 50)])
def test_segment_any_size(size):
    net = build().eval()
    with torch.no_grad():
        logits = net.segment(images(*size))
        torch.testing.assert_close(logits, net(images(*size)).seg_BChw)
    assert logits.shape == (2, 4, -(-size[0] // 4), -(-size[1] // 4))


def test_noise_makes_a_sample_independent_of_its_batch():
    net = build(norm="group", drop_path=0.3, dropout=0.5).double().train()
    x = images(32, 32, dtype=torch.float64)
    options = {"layers": net.layers, "channels": 16, "device": "cpu"}
    both = net(x, noise=sample_noise(0, 1, IDS, **options))
    one = net(x[1:], noise=sample_noise(0, 1, IDS[1:], **options))
    torch.testing.assert_close(both.seg_BChw[1:], one.seg_BChw, rtol=0, atol=1e-11)
    torch.testing.assert_close(both.emb_BDhw[1:], one.emb_BDhw, rtol=0, atol=1e-11)
    assert not torch.allclose(both.seg_BChw, net(x).seg_BChw)


def test_evaluation_moves_no_statistics():
    net = build()
    before = {k: b.clone() for k, b in net.named_buffers()}
    with torch.no_grad():
        net.eval()(images(32, 32))
        net.segment(images(32, 32))
    assert all(torch.equal(b, before[k]) for k, b in net.named_buffers())
    net.train()(images(32, 32))
    assert not torch.equal(net.decoder.norm.running_mean, before["decoder.norm.running_mean"])


def test_autocast_keeps_the_islands_in_float32():
    net = build()
    x = images(32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x, attention=True)
    assert out.logits_BF.dtype == out.emb_BDhw.dtype == out.affinity_BNN.dtype == torch.float32
    assert out.seg_BChw.dtype == torch.bfloat16
    torch.testing.assert_close(out.logits_BF, net(x).logits_BF, rtol=0, atol=0.05)
    torch.testing.assert_close(out.emb_BDhw.norm(dim=1), torch.ones(2, 8, 8))
    (out.emb_BDhw[:, 0].sum() + out.seg_BChw.float().sum() + out.affinity_BNN.sum()).backward()
    assert torch.isfinite(net.decoder.fuse.weight.grad).all()


def test_attention_maps_are_those_of_the_last_two_blocks():
    net = build()
    x = images(32, 32)
    seen = []
    for block in net.encoder.stages[3].blocks:
        block.attn.register_forward_hook(lambda module, args, out: seen.append((out[1], out[2])))
    out = net(x, attention=True)
    assert torch.equal(out.attn_BMNN, attention_logits(tuple(seen), net.heads))


def test_parameter_groups_partition_the_network():
    net = build()
    groups = {g["name"]: g for g in net.parameter_groups(1e-4, 10.0, 0.01, 0.5)}
    rates = {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()}
    assert rates == {
        "backbone": (1e-4, 0.01),
        "backbone_norm": (pytest.approx(5e-5), 0.0),
        "head": (pytest.approx(1e-3), 0.01),
        "head_no_decay": (pytest.approx(1e-3), 0.0),
    }
    grouped = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters())
    where = {id(p): name for name, g in groups.items() for p in g["params"]}
    names = {name: where[id(p)] for name, p in net.named_parameters()}
    assert names["encoder.stages.0.embed.norm.weight"] == "backbone_norm"
    assert names["encoder.stages.0.blocks.0.attn.norm.bias"] == "backbone_norm"
    assert names["encoder.stages.3.norm.bias"] == "backbone_norm"
    assert names["encoder.stages.0.embed.proj.bias"] == "backbone"
    assert names["classifier.weight"] == names["decoder.fuse.weight"] == names["g_cls.out.weight"] == "head"
    assert names["decoder.norm.weight"] == names["g_seg.norm.bias"] == names["g_cls.out.bias"] == "head_no_decay"
    torch.optim.AdamW(net.parameter_groups(1e-4, 10.0, 0.01, 0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "mit_b6"}, "model.backbone: got 'mit_b6'; did you mean 'mit_b5'"),
        ({"pooling": "max"}, "model.pooling: got 'max', expected gmp or gap"),
    ],
)
def test_unknown_names(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)
