"""Parts of the method in other people's loops: a bare one of PyTorch, and Lightning's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ugrl
from ugrl.errors import ConfigError

CLASSES, SIDE, STEPS = 2, 32, 25


def batch(seed: int, size: int = 6) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) with a square whose colour is the tag, and tags (B, F)."""
    rng = torch.Generator().manual_seed(seed)
    images = 0.2 * torch.randn(size, 3, SIDE, SIDE, generator=rng)
    tags = torch.zeros(size, CLASSES)
    for b in range(size):
        label = int(torch.randint(CLASSES, (), generator=rng))
        top, left = torch.randint(1, SIDE - 17, (2,), generator=rng).tolist()
        images[b, label * 2, top : top + 16, left : left + 16] += 2.0
        tags[b, label] = 1
    return images, tags


class Somebodys(nn.Module):
    """A network of somebody's own: the project's encoder, and heads that the project does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ugrl.make_backbone("tiny")
        narrow, wide = self.encoder.info.dims[0], self.encoder.info.dims[3]
        self.classify = nn.Conv2d(wide, CLASSES, 1, bias=False)
        self.segment = nn.Conv2d(narrow, CLASSES + 1, 1)
        self.embed = nn.Conv2d(narrow, 16, 1)
        self.prototypes = ugrl.Prototypes(num_classes=CLASSES + 1, dim=wide, d_cls=64)
        self.par = ugrl.PAR(iterations=3, dilations=(1, 2, 4))

    def losses(self, images: Tensor, tags: Tensor) -> dict[str, Tensor]:
        """Everything of one step, in the order of the method."""
        b, pairs = len(images), tags.nonzero()
        boxes = torch.tensor([[0, SIDE, 0, SIDE]]).repeat(b, 1)
        features, _ = self.encoder(images)
        f1, f4 = features[0], features[3]

        def forward(x: Tensor, view: object) -> tuple[Tensor, Tensor, None]:
            deep = self.encoder(x)[0][3]
            return self.classify(deep), deep, None

        cam = ugrl.multi_scale_cam(forward, images, pairs, boxes, mirror=False, scales=(1.0,))
        labels, conf = ugrl.refine_labels(cam.cam_PHW, pairs, boxes, images, batch=b, par=self.par)
        maps = torch.zeros(b, CLASSES, f4.shape[2] * f4.shape[3])
        maps[pairs[:, 0], pairs[:, 1]] = F.adaptive_avg_pool2d(cam.cam_PHW, f4.shape[2:]).flatten(1)
        positions = ugrl.class_positions(maps, torch.ones(b, maps.shape[2]))
        vectors, present = ugrl.class_vectors(f4.detach().flatten(2), positions, tags)
        u, known = self.prototypes.uncertainty(vectors, present)
        self.prototypes.update(vectors, present)
        weights = ugrl.modulation_weights(u, known, present.float(), strength=5.0, per_class=False)
        size = (f1.shape[2], f1.shape[3])
        small = F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0].long()
        small_conf = F.interpolate(conf[:, None], size, mode="nearest")[:, 0]
        pool = ugrl.reliable_pool(small, u, small_conf, keep=0.35, keys_B=torch.arange(b))
        embedding = F.normalize(self.embed(f1), dim=1)
        return {
            "cls": ugrl.classification_loss(self.classify(f4).amax((2, 3)), tags, weights[:, 1:]),
            "seg": 0.1 * ugrl.segmentation_loss(self.segment(f1), labels, weights),
            "ucl": 0.1 * ugrl.contrastive_loss(embedding, small, pool, tau=0.1),
        }


@pytest.fixture
def net() -> Somebodys:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Somebodys()


def held_out(net: Somebodys) -> tuple[float, float]:
    """Share of unseen images whose tag is the larger score, and the batches that have moved the prototypes."""
    images, tags = batch(10_000, 64)
    with torch.no_grad():
        f4 = net.encoder(images)[0][3]
        right = net.classify(f4).amax((2, 3)).argmax(1) == tags.argmax(1)
    return right.float().mean().item(), float(net.prototypes.counts_C.sum())


def test_a_bare_loop_learns(net: Somebodys) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    history = []
    for step in range(STEPS):
        losses = net.losses(*batch(step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    for head in (net.classify, net.segment, net.embed, net.encoder):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    first, last = history[:5], history[-5:]
    assert sum(h["cls"] for h in last) < 0.5 * sum(h["cls"] for h in first)
    share, votes = held_out(net)
    assert share > 0.9 and votes > STEPS


def test_the_encoder_s_names_are_checked() -> None:
    with pytest.raises(ConfigError, match="'mit_bo'; did you mean 'mit_b"):
        ugrl.make_backbone("mit_bo")


def test_lightning_trains_it(net: Somebodys, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed: pip install ugrl[lightning]")

    class Module(lightning.LightningModule):
        """The same network under Lightning."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, pair: tuple[Tensor, Tensor], index: int) -> Tensor:
            losses = self.net.losses(*pair)
            self.log_dict({name: loss.detach() for name, loss in losses.items()})
            return sum(losses.values())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=2e-3)

    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
    )
    data = torch.utils.data.DataLoader([batch(step) for step in range(STEPS)], batch_size=None)
    module = Module()
    trainer.fit(module, data)
    assert trainer.global_step == STEPS and held_out(net)[0] > 0.9
    # Prototypes are buffers: they go into Lightning's checkpoints with the rest.
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    state = torch.load(tmp_path / "own.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["net.prototypes.prototypes_Cd"], net.prototypes.prototypes_Cd)
