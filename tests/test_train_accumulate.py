"""The encoder in parts: the same losses, gradients, prototypes and statistics as the batch in one piece."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from tests.ranks import leave
from tests.tiny import tiny_tree
from ugrl.config import build
from ugrl.train import checkpoint
from ugrl.train.accumulate import parts_of, run_step
from ugrl.train.loop import Trainer


def tree(**method: object) -> dict:
    made = tiny_tree(steps=6, global_batch=6)
    made["method"].update({k: v for k, v in method.items() if k in ("setting",)})
    made["method"]["cam"]["share"] = method.get("share", "exact")
    made["method"]["contrast"]["scope"] = method.get("scope", "image")
    made["model"]["norm"] = method.get("norm", "sync_batch")
    return made


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("most", range(0, 9))
def test_parts_cover_every_row_once_and_none_is_larger(count: int, most: int) -> None:
    parts = parts_of(count, most)
    assert [k for p in parts for k in range(p.start, p.stop)] == list(range(count))
    sizes = [p.stop - p.start for p in parts]
    assert max(sizes) - min(sizes) <= 1
    assert most == 0 or (max(sizes) <= most and len(parts) == -(-count // most))


@pytest.mark.parametrize(
    ("setting", "share", "scope", "norm"),
    [
        ("IV", "exact", "image", "sync_batch"),
        ("IV", "always", "batch", "sync_batch"),
        ("IV", "warmup", "image", "group"),
        ("Base", "exact", "image", "sync_batch"),
    ],
)
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("step", [0, 3])
def test_parts_change_no_loss_and_no_gradient(
    setting: str, share: str, scope: str, norm: str, micro: int, step: int, shards: Path
) -> None:
    found = []
    for most in (0, micro):
        cfg = build(tree(setting=setting, share=share, scope=scope, norm=norm))
        trainer = Trainer(cfg, shards=shards, out=None, quiet=True, dtype=torch.float64, device="cpu")
        trainer.net.train()
        batches = trainer.loader(trainer.loader_spec())
        seen: list[int] = []
        handle = trainer.net.encoder.register_forward_hook(
            lambda _, args, out, seen=seen: seen.append(len(args[0])) if torch.is_grad_enabled() else None
        )
        out = run_step(trainer.step_fn, next(batches).to("cpu", torch.float64), step, micro_batch=most)
        handle.remove()
        batches.close()
        assert seen == ([6] if most == 0 else [p.stop - p.start for p in parts_of(6, micro)])
        gradients = {n: p.grad for n, p in trainer.net.named_parameters() if p.grad is not None}
        state = {**trainer.prototypes.state_dict(), **dict(trainer.net.named_buffers())}
        found.append((out, gradients, state))
    (whole, g_whole, s_whole), (parts, g_parts, s_parts) = found
    assert whole.terms.keys() == parts.terms.keys() and len(whole.terms) > (1 if step == 0 else 3)
    for name in whole.terms:
        torch.testing.assert_close(parts.terms[name], whole.terms[name], rtol=1e-9, atol=1e-12, msg=name)
    assert g_whole.keys() == g_parts.keys() == dict(trainer.net.named_parameters()).keys()
    scale = max(float(g.abs().max()) for g in g_whole.values())
    for name in g_whole:
        torch.testing.assert_close(g_parts[name], g_whole[name], rtol=1e-7, atol=1e-10 * scale, msg=name)
    for name in s_whole:
        torch.testing.assert_close(s_parts[name], s_whole[name], rtol=1e-9, atol=1e-12, msg=name)


def rank_run(rank: int, world: int, made: dict, shards: str, out: str) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=world)
    Trainer(build(made), shards=Path(shards), out=Path(out), quiet=True, dtype=torch.float64, device="cpu").fit()
    leave()


def test_two_ranks_in_parts_are_one_rank_in_one_piece(shards: Path, tmp_path: Path) -> None:
    made = tree(setting="IV", scope="batch")
    Trainer(build(made), shards=shards, out=tmp_path / "one", quiet=True, dtype=torch.float64, device="cpu").fit()
    made["train"]["micro_batch"] = 2  # three images a rank: parts of two and one
    mp.spawn(rank_run, (2, made, str(shards), str(tmp_path / "two")), nprocs=2)
    for part in ("model", "prototypes", "optimizer"):
        a = load_file(checkpoint.find(tmp_path / "one") / f"{part}.safetensors")
        b = load_file(checkpoint.find(tmp_path / "two") / f"{part}.safetensors")
        assert a.keys() == b.keys()
        for key in a:
            floor = 1e-11 if a[key].is_floating_point() else 0  # biases before a norm follow rounding alone
            torch.testing.assert_close(b[key], a[key], rtol=1e-6, atol=floor, msg=f"{part} {key}")
