"""The method's stateful parts, from a configuration."""

from __future__ import annotations

from ugrl.config import Config
from ugrl.method.prototypes import Prototypes
from ugrl.method.refine import PAR


def build_prototypes(cfg: Config, num_classes: int, dim: int) -> Prototypes:
    """Prototypes for F classes and background.

    Args:
        cfg: The run.
        num_classes: F, without background.
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
    )


def build_par(cfg: Config) -> PAR | None:
    """The refinement of ``method.cam.refine``, or ``None``."""
    c = cfg.method.cam
    if c.refine == "none":
        return None
    return PAR(iterations=c.par_iterations, dilations=c.par_dilations)
