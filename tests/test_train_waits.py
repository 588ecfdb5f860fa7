"""A step never asks a device for a value: on a GPU, every such question makes the host wait for all that came before.

There need not be a GPU to find out. Everything that is made from images, tags, weights or prototypes counts as lying on
the device; reading such a tensor's value, or an operator whose result's size depends on values, is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ugrl.method.objective as objective_module
from tests.tiny import tiny_tree
from ugrl.config import build
from ugrl.data.prepare import prepare
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.train.loop import Trainer

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim", "item"}


class Waits(AssertionError):
    """The host asked for a value."""


class Device(TorchDispatchMode):
    """Follows what comes from the device, by storage."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        # Storages are kept, so that no address is used twice.
        self.held = [t.untyped_storage() for t in tensors]
        self.there = {s.data_ptr() for s in self.held}
        self.allowed = 0

    def has(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self.there

    def check(self, name: str, *args: Any) -> None:
        if not self.allowed and any(self.has(x) for x in args):
            raise Waits(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) and self.has(x) for x in tree_leaves(args[1])
        )
        if name in READS or by_mask:
            self.check(name, *leaves)
        out = func(*args, **(kwargs or {}))
        if any(self.has(x) for x in leaves):
            for x in tree_leaves(out):
                if isinstance(x, Tensor):
                    self.held.append(x.untyped_storage())
                    self.there.add(x.untyped_storage().data_ptr())
        return out


@contextmanager
def device_of(tensors: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device(tensors)
    with monkeypatch.context() as patch:
        for name in ("tolist", "numpy"):  # these read memory without an operator
            plain = getattr(Tensor, name)

            def reads(self: Tensor, *args: Any, plain: Any = plain, name: str = name) -> Any:
                device.check(name, self)
                return plain(self, *args)

            patch.setattr(Tensor, name, reads)
        with device:
            yield device


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("waits") / "shards"
    prepare(ShapesSource(ShapesSpec(train=12, val=4, size=48)), out)
    return out


def test_the_watch_sees_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, host = torch.arange(4.0), torch.arange(3)
    with device_of([x], monkeypatch):
        y = x * 2 + host[1]
        assert host.tolist() == [0, 1, 2] and int(host[2]) == 2
        for wait in (
            lambda: y.tolist(),
            lambda: float(y[0]),
            lambda: bool((y > 1).any()),
            lambda: y[y > 1],
            lambda: (y > 1).nonzero(),
            lambda: y.sum().item(),
        ):
            with pytest.raises(Waits):
                wait()


@pytest.mark.parametrize("share", ["exact", "always"])
@pytest.mark.parametrize("setting, refine", [("IV", "none"), ("IV", "par"), ("III", "none"), ("Base", "none")])
def test_a_step_waits_for_nothing(
    setting: str, refine: str, share: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny_tree()
    tree["method"]["setting"] = setting
    tree["method"]["cam"] |= {"refine": refine, "share": share, "propagate": "affinity", "propagate_after": 3}
    trainer = Trainer(build(tree), shards=shards, out=None, quiet=True, device="cpu")
    trainer.step_fn.target_maker.counts_on_host = False
    trainer.net.train()
    batches = trainer.loader(trainer.loader_spec())
    state = [*trainer.net.parameters(), *trainer.net.buffers(), *trainer.prototypes.buffers()]
    plain = objective_module.contrastive_loss
    called: list[int] = []

    for step in range(4):  # two of the warm-up, one after it, one with propagation
        batch = next(batches).to("cpu")
        with device_of([batch.images_B3HW, batch.tags_BF, *state], monkeypatch) as device:

            def loss(*args: Any, device: Device = device, **kwargs: Any) -> Tensor:
                """The torch form waits once for the class counts; CUDA's form is tested beside its kernels."""
                called.append(1)
                device.allowed += 1
                try:
                    return plain(*args, **kwargs)
                finally:
                    device.allowed -= 1

            monkeypatch.setattr(objective_module, "contrastive_loss", loss)
            if step == 2:  # the warm-up's end asks once in a run whether the prototypes are settled
                trainer.prototypes.freeze()
            out = trainer.step_fn(batch, step)
            out.loss.backward()
            assert len(device.there) > 500
        trainer.optimizer.step(step)
        trainer.optimizer.zero_grad()
    assert len(called) == (2 if setting in ("III", "IV") else 0)
