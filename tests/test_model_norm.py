from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from ugrl.errors import ConfigError
from ugrl.model.decoder import Decoder
from ugrl.model.norm import GroupNorm2d, SyncBatchNorm2d, make_norm

DIMS = (4, 6, 8, 10)
SPLIT = [3, 2]
OFFSET = 100.0


def module_and_data() -> tuple[nn.ModuleDict, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    modules = nn.ModuleDict({"norm": SyncBatchNorm2d(6), "decoder": Decoder(DIMS, 3, dim=8)}).double()
    nn.init.normal_(modules["norm"].weight)
    nn.init.normal_(modules["norm"].bias)
    x = torch.randn(5, 6, 4, 5, dtype=torch.float64) * 2 + OFFSET
    features = [torch.randn(5, d, s, s, dtype=torch.float64) for d, s in zip(DIMS, (8, 4, 2, 2), strict=True)]
    return modules, x, torch.randn(5, 6, 4, 5, dtype=torch.float64), features


def run(rows: slice) -> dict[str, torch.Tensor]:
    """Two training steps and one evaluation on some rows of the batch."""
    modules, x, weight, features = module_and_data()
    norm, decoder = modules["norm"], modules["decoder"]
    out: dict[str, torch.Tensor] = {}
    for step in range(2):
        part = (x[rows] + step).requires_grad_()
        y = norm(part)
        # Not linear in y, so that every rank's loss depends on every rank's statistics to second order.
        (y.square() * weight[rows] + y * weight[rows]).sum().backward()
        out |= {f"y{step}": y.detach(), f"grad{step}": part.grad}
    levels = [f[rows].requires_grad_() for f in features]
    decoder(tuple(levels))[1].square().sum().backward()
    out |= {f"level{i}": f.grad for i, f in enumerate(levels)}
    out |= {f"param.{k}": p.grad for k, p in modules.named_parameters()}
    out |= {f"buffer.{k}": b.clone() for k, b in modules.named_buffers()}
    out["eval"] = norm.eval()(x[rows]).detach()
    out |= {f"after.{k}": b.clone() for k, b in norm.named_buffers()}
    return out


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    start = sum(SPLIT[:rank])
    out = run(slice(start, start + SPLIT[rank]))
    norm = SyncBatchNorm2d(2)
    torch.manual_seed(rank)
    out["far.x"] = torch.randn(8, 2, 16, 16) + 1000
    for _ in range(60):
        out["far.y"] = norm(out["far.x"]).detach()
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What two real processes computed."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{r}.pt") for r in range(2)]


def test_two_uneven_ranks_equal_one_process(ranks: list[dict[str, torch.Tensor]]):
    whole = run(slice(0, 5))
    for key, want in whole.items():
        if key.startswith(("buffer.", "after.")):
            for got in ranks:
                torch.testing.assert_close(got[key], want, rtol=0, atol=1e-10, msg=key)
            assert torch.equal(ranks[0][key], ranks[1][key]), key
        else:
            got = sum(r[key] for r in ranks) if key.startswith("param.") else torch.cat([r[key] for r in ranks])
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")
    assert torch.equal(whole["after.running_mean"], whole["buffer.norm.running_mean"])  # evaluation moved nothing
    assert whole["after.num_batches_tracked"] == 2


def test_large_means_do_not_cancel(ranks: list[dict[str, torch.Tensor]]):
    x = torch.cat([r["far.x"] for r in ranks]).double()
    want = nn.BatchNorm2d(2).double()(x).detach()
    # float32 holds 1000 + ε to 6e-5; a variance from raw squares (1e6 ± 0.1) would be off by several per cent.
    torch.testing.assert_close(torch.cat([r["far.y"] for r in ranks]).double(), want, rtol=0, atol=1e-3)


def test_one_process_is_torch_batch_norm():
    torch.manual_seed(0)
    ours, theirs = SyncBatchNorm2d(5).double(), nn.BatchNorm2d(5).double()
    x = torch.randn(4, 5, 3, 7, dtype=torch.float64)
    for mode in (True, True, False):
        assert torch.equal(ours.train(mode)(x), theirs.train(mode)(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_group_norm_does_not_see_the_batch():
    norm = make_norm("group", 48)
    assert isinstance(norm, GroupNorm2d) and norm.num_groups == 16
    x = torch.randn(3, 48, 4, 4)
    torch.testing.assert_close(norm(x)[1:2], norm(x[1:2]))
    torch.testing.assert_close(norm(x), nn.GroupNorm(16, 48)(x))
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_unknown_norm():
    with pytest.raises(ConfigError, match="got 'layer', expected sync_batch or group"):
        make_norm("layer", 8)
