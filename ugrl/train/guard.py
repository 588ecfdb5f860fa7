"""Steps whose loss or gradients are not finite: skipped, recorded, and too many in a row end the run.

A step moves more than weights: prototypes and the norms' running statistics follow the batch before its loss is known,
and a NaN in them would stay for ever. So they are copied before the step and put back if it turns out bad. The verdict
is a number on the device: a GPU skips the update by itself, and the host learns of it when it next reads values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ugrl.distributed import all_reduce_sum, world_size
from ugrl.errors import UgrlError

# Buffers that no step changes.
FIXED = ("phi_dD", "bias_d")


@dataclass(slots=True)
class Guard:
    """Watches over the steps of a run.

    Attributes:
        modules: Modules whose buffers a step may change.
        params: Parameters whose gradients are checked; under DDP they are the same on every rank.
        patience: Bad steps in a row that end the run.
        out: The run's folder, on the rank that writes.
        ids_of: Names of the images of a step's global batch.
        say: Told of a skipped step, in one line.
    """

    modules: Sequence[nn.Module]
    params: Sequence[nn.Parameter]
    patience: int
    out: Path | None
    ids_of: Callable[[int], Sequence[str]]
    say: Callable[[str], None]
    in_a_row: int = 0
    skipped: int = 0
    _saved: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _open: list[tuple[int, Tensor]] = field(default_factory=list)

    def keep(self) -> None:
        """Before a step: copy what it may change."""
        buffers = [b for m in self.modules for name, b in m.named_buffers() if name.split(".")[-1] not in FIXED]
        self._saved = [(b, b.clone()) for b in buffers]

    def judge(self, step: int, loss: Tensor) -> Tensor:
        """After the backward pass: whether the step may be taken; puts the buffers back if not.

        Args:
            step: Number of the training step, counted from 0.
            loss: Loss of this rank.

        Returns:
            bool scalar on the device, the same on every rank.
        """
        finite = torch.isfinite(loss.detach())
        if world_size() > 1:
            finite = all_reduce_sum((~finite).float()) == 0
        gradients = [p.grad for p in self.params if p.grad is not None]
        if gradients:
            # Largest magnitudes, not a norm: squares overflow where the gradient itself is finite.
            largest = torch.stack(torch._foreach_norm(gradients, float("inf")))
            finite = finite & torch.isfinite(largest).all()
        if finite.device.type == "cpu":
            if not finite:
                for buffer, before in self._saved:
                    buffer.copy_(before)
        else:
            for buffer, before in self._saved:
                buffer.copy_(torch.where(finite, buffer, before))
        self._saved = []
        self._open.append((step, finite))
        return finite

    def collect(self) -> list[bool]:
        """Read the verdicts since the last call: which steps were taken. Waits for the device.

        Raises:
            UgrlError: ``patience`` bad steps in a row.
        """
        if not self._open:
            return []
        verdicts = [bool(v) for v in torch.stack([v for _, v in self._open]).tolist()]
        steps = [step for step, _ in self._open]
        self._open = []
        for step, good in zip(steps, verdicts, strict=True):
            if good:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            self.skipped += 1
            self._record(step)
            if self.in_a_row >= self.patience:
                where = f"{self.out / 'nonfinite.jsonl'} names their images; " if self.out is not None else ""
                raise UgrlError(
                    f"step {step}: loss or gradients were not finite {self.in_a_row} steps in a row; {where}"
                    "try a lower train.lr, train.grad_clip=1, train.amp=off, or a larger method.contrast.tau, and "
                    "continue from the last checkpoint"
                )
        return verdicts

    def _record(self, step: int) -> None:
        self.say(f"step {step + 1}: loss or gradients are not finite; skipped")
        if self.out is not None:
            with (self.out / "nonfinite.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step + 1, "ids": list(self.ids_of(step))}) + "\n")
