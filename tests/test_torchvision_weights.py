"""State dicts of torchvision give timm's models the features of torchvision's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ugrl.errors import CheckpointError
from ugrl.model.families import make_backbone
from ugrl.model.pretrained import load_weights

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Batch norms with statistics of their own: small variances show an epsilon that differs."""
    g = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=g) * 0.01)
            module.running_var.copy_(torch.rand(module.num_features, generator=g) * 0.5 + 0.05)
        elif isinstance(module, torch.nn.LayerNorm):
            module.weight.add_(torch.randn(module.weight.shape, generator=g) * 0.1)
    return model.double().eval()


def tokens_of(model: torch.nn.Module, x: Tensor) -> Tensor:
    model.heads = torch.nn.Identity()
    tokens = model.encoder(torch.cat([model.class_token.expand(len(x), -1, -1), model._process_input(x)], dim=1))
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


CASES = {
    "resnet18": ("resnet18", lambda m, x: torch.nn.Sequential(*list(m.children())[:-2])(x)),
    "convnext_tiny": ("convnext_tiny", lambda m, x: m.features(x)),
    "swin_t": ("swin_tiny_patch4_window7_224", lambda m, x: m.norm(m.features(x)).permute(0, 3, 1, 2)),
    "efficientnet_b0": ("efficientnet_b0", lambda m, x: m.features(x)),
    "mobilenet_v2": ("mobilenetv2_100", lambda m, x: m.features(x)),
    "mobilenet_v3_small": ("mobilenetv3_small_100", lambda m, x: m.features(x)),
    "mobilenet_v3_large": ("mobilenetv3_large_100", lambda m, x: m.features(x)),
}


@torch.no_grad()
@pytest.mark.parametrize("theirs", CASES)
def test_features_are_those_of_torchvision(theirs: str, tmp_path: Path) -> None:
    name, features = CASES[theirs]
    side = 224 if theirs == "swin_t" else 64
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    model = lively(getattr(models, theirs)(num_classes=5))
    stride = None if theirs == "swin_t" else 32
    # A .safetensors file forgets the order of its tensors.
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "w.safetensors")
    torch.save({"model": {f"module.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        encoder = make_backbone(f"timm/{name}", output_stride=stride).double()
        report = load_weights(encoder, str(tmp_path / file))
        assert report.layout == ("timm" if theirs == "resnet18" else "torchvision")
        with_own_pixels = (x - encoder.offset_311.double()) / encoder.factor_311.double()
        # Epsilons of layer norms may differ: ConvNeXt's and Swin's are below what these tolerances see.
        torch.testing.assert_close(encoder(with_own_pixels)[0][3], features(model, x), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_vit_is_read_with_its_positions(tmp_path: Path) -> None:
    model = lively(models.VisionTransformer(64, 16, 12, 3, 192, 768, num_classes=5))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    encoder = make_backbone("timm/deit_tiny_patch16_224").double()
    # Its position embedding is resampled to timm's grid, and that back to the image's.
    encoder.body.pos_embed = torch.nn.Parameter(torch.zeros(1, 17, 192, dtype=torch.float64))
    encoder.body.patch_embed.set_input_size((64, 64))
    assert load_weights(encoder, str(tmp_path / "w.pth")).layout == "torchvision"
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(encoder(x)[0][3], tokens_of(model, x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ("efficientnet_v2_s", "tf_efficientnetv2_s", "pads on one side.*expected a model without tf_"),
        ("efficientnet_b0", "tf_efficientnet_b0", "pads on one side"),
        ("mobilenet_v3_small", "mobilenetv3_large_100", "another model of torchvision than timm/mobilenetv3_large"),
        ("mobilenet_v3_small", "resnet18", "another model of torchvision than timm/resnet18"),
        ("swin_v2_t", "swin_tiny_patch4_window7_224", "Swin V2, which no backbone here is"),
        ("regnet_y_400mf", "resnet18", "does not fit timm/resnet18: .*missing"),
        ("swin_t", "swin_small_patch4_window7_224", "does not fit timm/swin_small.*missing"),
    ],
)
def test_what_is_not_the_same_model_is_refused_in_one_line(
    theirs: str, ours: str, message: str, tmp_path: Path
) -> None:
    torch.save(getattr(models, theirs)(num_classes=5).state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(make_backbone(f"timm/{ours}"), str(tmp_path / "w.pth"))
    assert "\n" not in str(caught.value)
