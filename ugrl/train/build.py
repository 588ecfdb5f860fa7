"""From a configuration to everything that a run is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ugrl.config import Config
from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest
from ugrl.device import resolve
from ugrl.distributed import world_size
from ugrl.errors import ConfigError
from ugrl.method.doubts import shares
from ugrl.method.prototypes import Prototypes
from ugrl.method.refine import PAR
from ugrl.model.network import UGRLNet
from ugrl.model.pretrained import load_weights
from ugrl.seeding import derive
from ugrl.storage import Place
from ugrl.train.check import check_run
from ugrl.train.deterministic import make_deterministic
from ugrl.train.optim import Optimizer
from ugrl.train.step import Step


def build_net(cfg: Config, num_classes: int, *, pretrained: bool = True) -> UGRLNet:
    """A network with weights that are a function of ``cfg.seed`` (and ``model.weights``).

    Args:
        cfg: Configuration of the run.
        num_classes: Number of foreground classes F (without background).
        pretrained: Whether to load ``model.weights``; a checkpoint's reader does not need them.

    Raises:
        CheckpointError: ``model.weights`` cannot be found or do not fit.
    """
    m = cfg.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(cfg.seed, "init"))
        net = UGRLNet(
            num_classes=num_classes,
            backbone=m.backbone,
            decoder_dim=m.decoder_dim,
            d_seg=cfg.method.contrast.d_seg,
            pooling=m.pooling,
            affinity=m.affinity,
            norm=m.norm,
            drop_path=m.drop_path,
            dropout=m.dropout,
            output_stride=m.output_stride,
            frozen=m.frozen,
            aux_classifier=m.aux_classifier,
            init=m.init,
        )
    multiple = net.encoder.info.multiple
    if cfg.data.crop % multiple:
        raise ConfigError(f"data.crop is {cfg.data.crop}: {m.backbone} takes multiples of {multiple} px")
    if pretrained and m.weights:
        report = load_weights(net.encoder, m.weights)
        net.loaded, net.doubt = report.text, report.warning
    return net


def build_prototypes(cfg: Config, num_classes: int, dim: int) -> Prototypes:
    """Prototypes for F classes and background.

    Args:
        cfg: Configuration of the run.
        num_classes: Number of foreground classes F (without background).
        dim: D, channels of the encoder's last stage.
    """
    u = cfg.method.uncertainty
    return Prototypes(
        num_classes=num_classes + 1,
        dim=dim,
        d_cls=u.d_cls,
        eta=u.eta,
        encoding=u.encoding,
        center=u.center,
        seed=cfg.seed,
        kind=u.kind,
        against=u.against,
        debias=u.debias,
        within_class=u.within_class,
        weights=shares(u),
        votes=u.votes,
        several=(u.background_prototypes, u.class_prototypes),
    )


def build_par(cfg: Config) -> PAR | None:
    """The refinement of ``method.cam.refine``, or ``None``."""
    c = cfg.method.cam
    if c.refine == "none":
        return None
    return PAR(iterations=c.par_iterations, dilations=c.par_dilations)


@dataclass(slots=True)
class Parts:
    """What a run is made of.

    Attributes:
        device: Device of the network.
        dtype: Type of weights and images.
        manifest: Manifest of the prepared shards.
        val_reader: Reader of ``data.val_split``.
        objective: The metric that the run is judged by.
        fingerprint: Hash of the splits that the run reads; it tells whether a resumed run sees the same images.
        net: Network, not wrapped by DDP.
        prototypes: Prototypes of the C classes.
        par: The refinement of ``method.cam.refine``, if there is one.
        optimizer: AdamW over the network's parameters.
        step: The training step of the method.
    """

    device: torch.device
    dtype: torch.dtype
    manifest: Manifest
    val_reader: ShardReader
    objective: str
    fingerprint: str
    net: UGRLNet
    prototypes: Prototypes
    par: PAR | None
    optimizer: Optimizer
    step: Step


def build_run(
    cfg: Config, shards: Place, *, device: str | None = None, dtype: torch.dtype | None = None, pretrained: bool = True
) -> Parts:
    """Build a run, after a check that it can be trained and judged on these shards.

    Args:
        cfg: Configuration of the run.
        shards: Folder that ``ugrl prepare`` has written.
        device: ``"cuda"`` where there is one, by default.
        dtype: Type of weights and images; ``train.dtype`` by default.
        pretrained: Whether to load ``model.weights``; a resumed run does not need them.

    Raises:
        UgrlError: The shards and the configuration cannot be used together.
    """
    train, data = cfg.train, cfg.data
    dtype = dtype or getattr(torch, train.dtype)
    if train.cpu_threads > 0:
        torch.set_num_threads(train.cpu_threads)
    where = resolve(device)
    if train.deterministic:
        make_deterministic(where)
    if train.global_batch % world_size() != 0:
        raise ConfigError(
            f"train.global_batch is {train.global_batch}; expected a multiple of the {world_size()} workers"
        )
    manifest = Manifest.load(shards)
    val_reader = ShardReader(manifest, data.val_split, data)
    objective = check_run(cfg, manifest)
    num_classes = len(manifest.class_names)
    net = build_net(cfg, num_classes, pretrained=pretrained).to(where, dtype)
    prototypes = build_prototypes(cfg, num_classes, net.dim).to(where, dtype)
    groups = net.parameter_groups(
        train.lr,
        train.head_lr_ratio,
        train.weight_decay,
        train.norm_lr_mult,
        cfg.model.layer_decay,
        train.head_decay,
    )
    optimizer = Optimizer(net, groups, train)
    if train.compile != "none":
        # The encoder alone: nine tenths of a step, one graph, and shapes that do not change from step to step. The
        # last two modes replay CUDA graphs; parameters keep their names.
        net.encoder.compile(dynamic=False, fullgraph=True, mode=train.compile)
    par = build_par(cfg)
    return Parts(
        device=where,
        dtype=dtype,
        manifest=manifest,
        val_reader=val_reader,
        objective=objective,
        fingerprint=manifest.fingerprint(data.train_split, data.val_split),
        net=net,
        prototypes=prototypes,
        par=par,
        optimizer=optimizer,
        step=Step(cfg, net, prototypes, par),
    )
