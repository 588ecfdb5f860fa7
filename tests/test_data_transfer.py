"""Batches arrive on the device as they are on the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.loaders import local
from ugrl.data.loader import LocalLoader
from ugrl.data.reader import ShardReader
from ugrl.data.transfer import Transfer

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device to copy to")
    ),
]


def loader(shards: Path, mode: str, pin_memory: bool) -> LocalLoader:
    return local(
        ShardReader(shards, "train"), 40, 6, seed=3, global_batch=4, threads=1, on_device=mode, pin_memory=pin_memory
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["none", "normalize", "augment"])
def test_batches_are_those_of_the_host(shards: Path, device: str, mode: str) -> None:
    where = torch.device(device)
    plain = loader(shards, mode, pin_memory=False)
    moved = Transfer(loader(shards, mode, pin_memory=device == "cuda"), where, torch.float64)
    busy = torch.rand(1024, 1024, device=where)
    for _ in range(6):
        busy = busy @ busy / 1024  # a step that is still running when the next batch is asked for
        batch, expected = next(moved), next(plain).to("cpu", torch.float64)
        assert batch.ids == expected.ids and batch.images_B3HW.device.type == device
        assert batch.images_B3HW.dtype == torch.float64 and batch.boxes_B4.device.type == "cpu"
        torch.testing.assert_close(batch.images_B3HW.cpu(), expected.images_B3HW, rtol=0, atol=1e-5)
        for name in ("tags_BF", "boxes_B4", "masks_BHW", "pairs_P2"):
            assert torch.equal(getattr(batch, name).cpu(), getattr(expected, name)), name
    plain.close()
    moved.close()
    assert moved.batches._pool._shutdown


def test_the_end_of_a_loader_is_the_end(shards: Path) -> None:
    few = loader(shards, "none", pin_memory=False)
    moved = Transfer(iter([next(few), next(few)]), torch.device("cpu"))
    few.close()
    assert len(list(moved)) == 2
    moved.close()  # a plain iterator has nothing to close
