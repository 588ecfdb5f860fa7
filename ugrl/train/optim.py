"""AdamW, its schedule, and its state by parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ugrl.config import TrainConfig
from ugrl.errors import CheckpointError
from ugrl.text import brief, line
from ugrl.train.checkpoint import check_tensor

_KINDS = {"step", "exp_avg", "exp_avg_sq"}


def lr_factor(step: int, cfg: TrainConfig) -> float:
    """Learning-rate multiplier of a step: linear warm-up, then polynomial decay counted from step 0.

    Source: AFA's schedule, which the paper inherits.

    >>> cfg = TrainConfig(steps=100, lr_warmup_iters=10, lr_warmup_ratio=1e-6)
    >>> lr_factor(0, cfg), lr_factor(10, cfg), lr_factor(50, cfg)
    (1e-06, 0.9, 0.5)
    """
    warm = cfg.at(cfg.lr_warmup_iters)
    if step < warm:
        return cfg.lr_warmup_ratio + (1.0 - cfg.lr_warmup_ratio) * step / warm
    return float((1.0 - step / cfg.steps) ** cfg.power)


class Optimizer:
    """AdamW over the network's named parameter groups."""

    def __init__(self, net: nn.Module, groups: list[dict], cfg: TrainConfig, *, fused: bool | None = None) -> None:
        self.cfg = cfg
        # One kernel for all parameters where there is one that needs no copy of them.
        self.fused = all(p.device.type == "cuda" for p in net.parameters()) if fused is None else fused
        self.adamw = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.999), fused=self.fused)
        self.base = [float(g["lr"]) for g in self.adamw.param_groups]
        self.names = {id(p): name for name, p in net.named_parameters()}

    def step(self, step: int, taken: Tensor | None = None) -> float:
        """Apply the gradients with the learning rate of ``step``; returns the backbone's rate.

        Args:
            step: Number of the training step, counted from 0.
            taken: bool scalar on the parameters' device: false leaves weights and moments as they are. The fused kernel
                reads it there; otherwise the host does.
        """
        factor = lr_factor(step, self.cfg)
        for group, base in zip(self.adamw.param_groups, self.base, strict=True):
            group["lr"] = base * factor
        if taken is not None and not self.fused and not taken:
            return self.cfg.lr * factor
        if self.cfg.grad_clip > 0:
            params = [p for g in self.adamw.param_groups for p in g["params"]]
            nn.utils.clip_grad_norm_(params, self.cfg.grad_clip)
        if self.fused and taken is not None:
            # What a gradient scaler would tell it.
            self.adamw.grad_scale = None  # type: ignore[attr-defined]
            self.adamw.found_inf = (~taken).float()  # type: ignore[attr-defined]
        self.adamw.step()
        return self.cfg.lr * factor

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """``{"exp_avg/encoder.…": tensor, …}``."""
        out: dict[str, Tensor] = {}
        for param, entries in self.adamw.state.items():
            for key, value in entries.items():
                out[f"{key}/{self.names[id(param)]}"] = value.detach()
        return out

    def load(self, state: Mapping[str, Tensor], where: Path) -> None:
        """Take over what :meth:`state` returned.

        Raises:
            CheckpointError: The state is of another network, or incomplete.
        """
        params = {name: p for g in self.adamw.param_groups for p in g["params"] for name in [self.names[id(p)]]}
        kinds: dict[str, set[str]] = {}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if name not in params or kind not in _KINDS:
                raise CheckpointError(f"{line(where)}: optimizer state {brief(key)}, which this network does not have")
            p = params[name]
            like = torch.zeros(()) if kind == "step" else p
            check_tensor(value, like, f"{line(where)}: optimizer state '{key}'")
            if kind == "step":  # the fused kernel reads it on the device, the others on the host
                on = value.to(p.device if self.fused else "cpu").clone()
            else:
                on = value.to(p.device, p.dtype).clone()
            self.adamw.state[p][kind] = on
            kinds.setdefault(name, set()).add(kind)
        for name, found in kinds.items():
            if missing := sorted(_KINDS - found):
                raise CheckpointError(f"{line(where)}: no optimizer state '{missing[0]}/{name}'; it is damaged")
