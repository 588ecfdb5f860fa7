"""The training step against the public recipe's (:mod:`bench.baseline.step`): forward, backward and optimiser.

    python -m bench --only step
    python -m bench.step --profile --crop 512 --batch 4
    python -m bench.step --train 200 --crop 512 --batch 8 --amp

Both sides start from the same weights, see the same generated images (MiT-B1, 20 classes, one to three tags an image)
and apply the same schedule; that their first losses agree is part of every entry. On the CPU each side has a process
of its own (:mod:`bench.apart`). ``-base`` is the setting Base without refinement: encoder, decoder and CAM alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.apart import Remote
from bench.baseline.step import PublicStep
from bench.measure import Context, Different, Entry, Skipped, compare
from ugrl.config import Config, build
from ugrl.model.network import UGRLNet
from ugrl.train.build import build_net, build_par, build_prototypes
from ugrl.train.optim import Optimizer, lr_factor
from ugrl.train.step import Step
from ugrl.types import Batch, StepOutput

CLASSES = 20
#: Floating-point operations of one 512² crop after the exact rewrites, and what an H100 can do in a second.
GFLOP_PER_CROP = 383.0
PEAK = {"fp32": 67e12, "bf16": 800e12}
#: In float32 the two ways of computing may differ by this share of a loss; gradients are compared in float64 by tests.
AGREE = 2e-3


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison on the CPU; ``quick`` is the batch for ``--quick``, where there is one."""

    crop: int
    batch: int
    setting: str
    refine: str
    gate: float | None
    memory_gate: float | None
    quick: int | None
    share: str = "exact"
    drop_path: float = 0.1
    warm: bool = False
    note: str = ""


CASES = {
    "step/512": Case(512, 4, "IV", "par", 3.0, 3.0, 1),
    "step/256": Case(256, 4, "IV", "par", 2.0, 3.0, 2),
    "step/256-base": Case(256, 4, "Base", "none", 2.0, 3.0, 2),
    "step/512-base": Case(512, 4, "Base", "none", 3.0, 3.0, 1),
    "step/256-share": Case(
        256, 4, "IV", "par", None, None, None, drop_path=0.0, note="drop-path 0: scale-1 pass shared, exact"
    ),
    "step/256-share-always": Case(
        256, 4, "IV", "par", None, None, None, share="always", note="CAM reads the training pass and its drop-path"
    ),
    "step/256-warmup": Case(
        256, 4, "IV", "par", None, None, None, warm=True, note="a warm-up step: ours skips what no loss reads"
    ),
}
CUDA = ("step/512-cuda-fp32", "step/512-cuda-eager", "step/512-cuda")
NAMES = (*CASES, *CUDA)
#: Seconds that a quick entry may take; one that no longer fits is skipped.
QUICK = {512: 60.0, 256: 25.0}


def configuration(
    crop: int,
    setting: str = "IV",
    refine: str = "par",
    *,
    share: str = "exact",
    drop_path: float = 0.1,
    steps: int = 1000,
    warm: int = 1,
    backbone: str = "mit_b1",
    batch: int = 8,
    scales: tuple[float, ...] = (1.0, 0.5, 1.5),
) -> Config:
    """The paper's settings at a crop size, without ImageNet weights."""
    return build(
        {
            "data": {"crop": crop},
            "model": {"backbone": backbone, "drop_path": drop_path},
            "method": {"setting": setting, "cam": {"refine": refine, "share": share, "scales": list(scales)}},
            "train": {
                "steps": steps,
                "global_batch": batch,
                "cls_warmup_iters": warm,
                "lr_warmup_iters": min(20, steps - 1),
                "lr_warmup_ratio": 0.05,
            },
        }
    )


def generated_batch(seed: int, crop: int, images: int) -> Batch:
    """Photo-like images (noise of falling amplitude by frequency) with a patch of its own colour for every tag."""
    g = torch.Generator().manual_seed(seed)

    def noise(cells: int) -> Tensor:
        return F.interpolate(torch.randn(images, 3, cells, cells, generator=g), (crop, crop), mode="bicubic")

    pictures = 0.8 * noise(4) + 0.4 * noise(16) + 0.2 * noise(64) + 0.05 * noise(crop)
    colours = torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(1234))
    tags = torch.zeros(images, CLASSES)
    axis = torch.arange(crop) / crop
    for b in range(images):
        for f in torch.randperm(CLASSES, generator=g)[: (1, 2, 1, 3)[b % 4]].tolist():
            tags[b, f] = 1
            y, x, r = (0.3 + 0.4 * torch.rand(3, generator=g)).tolist()
            inside = ((axis[:, None] - y) ** 2 + (axis - x) ** 2).sqrt() < 0.5 * r
            pictures[b] = torch.where(inside, 0.4 * pictures[b] + 1.5 * colours[f][:, None, None], pictures[b])
    boxes = torch.tensor([[0, crop, 0, crop]] * images)
    ids = tuple(f"{seed}-{b}" for b in range(images))
    return Batch(ids, pictures, tags, boxes, None, tags.nonzero())


class Side:
    """One way of training: its own copy of the network, prototypes and optimiser.

    Args:
        kind: ``Step`` or ``PublicStep``.
        cfg: The run.
        net: Copied.
        device: Where to train.
        amp: bf16 autocast, as the training loop uses it on CUDA.
        compile: As ``train.compile``: the encoder's mode.
    """

    def __init__(
        self, kind: type, cfg: Config, net: UGRLNet, device: torch.device, *, amp: bool = False, compile: str = "none"
    ) -> None:
        self.cfg, self.device, self.amp = cfg, device, amp
        self.net = copy.deepcopy(net).to(device).train()
        self.compiled = compile != "none"
        if self.compiled:
            self.net.encoder.compile(dynamic=False, fullgraph=True, mode=compile)
        self.step_fn = kind(cfg, self.net, build_prototypes(cfg, CLASSES, net.dim).to(device), build_par(cfg))
        t = cfg.train
        groups = self.net.parameter_groups(t.lr, t.head_lr_ratio, t.weight_decay, t.norm_lr_mult)
        self.optimizer = Optimizer(self.net, groups, t) if kind is Step else None
        self.adamw = torch.optim.AdamW(groups, lr=t.lr) if self.optimizer is None else self.optimizer.adamw
        self.base = [float(g["lr"]) for g in groups]
        self.step = 0
        # The moments live as long as the run: made now (zero gradients, rate 0), no measured step allocates them.
        for group in self.adamw.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        self.adamw.step()
        self.adamw.zero_grad()

    def __call__(self, batch: Batch) -> StepOutput:
        """Forward, backward, update."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, torch.bfloat16) if self.amp else nullcontext():
            out: StepOutput = self.step_fn(batch, self.step)
        out.loss.backward()
        if self.optimizer is not None:
            self.optimizer.step(self.step)
        else:
            for group, base in zip(self.adamw.param_groups, self.base, strict=True):
                group["lr"] = base * lr_factor(self.step, self.cfg.train)
            self.adamw.step()
        self.adamw.zero_grad()
        self.step += 1
        return replace(out, loss=out.loss.detach())


def check(ours: dict[str, float], theirs: dict[str, float], tolerance: float) -> float:
    """Largest relative difference of a loss term that both have.

    Raises:
        Different: More than ``tolerance`` of it.
    """
    worst = max(abs(ours[n] - theirs[n]) / max(abs(theirs[n]), 1e-2) for n in ours.keys() & theirs.keys())
    if not worst <= tolerance:
        raise Different(f"losses {_words(ours)} and {_words(theirs)} differ by {worst:.1e}")
    return worst


def _words(terms: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in sorted(terms.items()))


def _terms(out: StepOutput) -> str:
    return _words({name: float(value) for name, value in out.terms.items()})


def make(kind: str, cfg: Config, images: int, device: str, amp: bool, compile: str) -> Callable[[], dict[str, float]]:
    """A side's step on the same weights and images; a call returns the losses of the side's first step."""
    where = torch.device(device)
    side = Side(Step if kind == "ours" else PublicStep, cfg, build_net(cfg, CLASSES), where, amp=amp, compile=compile)
    data = generated_batch(0, cfg.data.crop, images).to(where)
    first: dict[str, float] = {}

    def step() -> dict[str, float]:
        out = side(data)
        if not first:
            first.update({name: float(value) for name, value in out.terms.items()})
        return first

    return step


def _measure(name: str, case: Case, batch: int, ctx: Context, **options: Any) -> Entry:
    """Compare one pair of sides; their first losses must agree where the way of computing is all that differs."""
    amp, mode = options.pop("amp", False), options.pop("compile", "none")
    cfg = configuration(
        case.crop,
        case.setting,
        case.refine,
        share=case.share,
        drop_path=case.drop_path,
        warm=999 if case.warm else 0,
        batch=batch,
    )
    # CAM from the training pass has another target, bf16 other digits.
    exact = case.share != "always" and not amp
    found: list[float] = []

    def first_losses(mine: dict[str, float], public: dict[str, float]) -> None:
        found.append(check(mine, public, AGREE if exact else math.inf))

    with ExitStack() as stack:
        sides: list[Callable[[], object]] = []
        for kind in ("ours", "public"):
            args = (kind, cfg, batch, str(ctx.device), amp and kind == "ours", mode if kind == "ours" else "none")
            on_cpu = ctx.device.type == "cpu"
            sides.append(stack.enter_context(Remote(make, *args, threads=ctx.threads)) if on_cpu else make(*args))
        entry = compare(name, *sides, ctx=ctx, gate=case.gate, check=first_losses, **options)
    form = ("bf16" if amp else "fp32") + (", encoder compiled" if mode != "none" else "")
    words = f"{batch} crops of {case.crop}, setting {case.setting}, refine {case.refine}, {form}"
    agree = f"; losses agree to {found[0]:.0e}" if exact else ""
    return replace(entry, note=f"{words}{'; ' + case.note if case.note else ''}{agree}")


def entries(ctx: Context) -> Iterator[Entry | Skipped]:
    """Steps on this device; what needs the other one is skipped."""
    if ctx.device.type == "cuda":
        yield from _cuda(ctx)
        yield from (Skipped(name, "a comparison on the CPU") for name in CASES if ctx.wants(name))
        return
    for name, case in CASES.items():
        if not ctx.wants(name) or (ctx.quick and case.quick is None):
            continue
        if ctx.left < QUICK[case.crop]:
            yield Skipped(name, "no time left with --quick")
            continue
        batch = case.quick if ctx.quick and case.quick else case.batch
        budget = None if ctx.quick else 100.0 if case.crop < 512 else 300.0
        yield _measure(name, case, batch, ctx, rounds=5, budget=budget, memory_gate=case.memory_gate)
    yield from (Skipped(name, "needs a CUDA device") for name in CUDA if ctx.wants(name))


def _cuda(ctx: Context) -> Iterator[Entry]:
    batch, case, rounds = 8, CASES["step/512"], 5 if ctx.quick else 20
    plans: dict[str, tuple[float | None, dict[str, Any]]] = {
        "step/512-cuda-fp32": (None, {"memory_gate": 3.0}),
        "step/512-cuda-eager": (None, {"amp": True, "memory_gate": 6.0}),
        "step/512-cuda": (8.0, {"amp": True, "compile": "default", "memory_gate": 6.0, "limit": 0.015}),
    }
    for name in CUDA:
        if not ctx.wants(name):
            continue
        gate, options = plans[name]
        entry = _measure(name, replace(case, gate=gate), batch, ctx, rounds=rounds, **options)
        peak = PEAK["bf16" if options.get("amp") else "fp32"]
        share = GFLOP_PER_CROP * 1e9 * batch / entry.ours / peak
        speed = f"{batch / entry.ours:.0f} images/s, {share:.0%} of {peak / 1e12:.0f} TF/s (an H100's)"
        yield replace(entry, note=f"{entry.note}, public fp32; {speed}")


# --- by hand ----------------------------------------------------------------------------------------------------


def profile(side: Side, batch: Batch, rows: int) -> None:
    """Print the operators with the largest own time in one step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cuda = side.device.type == "cuda"
    side(batch)
    with record(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])) as p:
        side(batch)
        if cuda:
            torch.cuda.synchronize()

    def own(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total)

    events = sorted(p.key_averages(), key=own, reverse=True)
    total = sum(own(e) for e in events)
    print(f"{total / 1e3:.1f} ms in operators")
    for e in events[:rows]:
        print(f"{own(e) / 1e3:10.1f} ms {own(e) / total:6.1%} {e.count:6d}  {e.key[:90]}")


def train(
    cfg: Config, device: torch.device, steps: int, images: int, amps: list[bool], every: int, compile: str = "none"
) -> list[dict]:
    """Real steps on generated images, once per precision; prints losses and returns a summary of each run."""
    net = build_net(cfg, CLASSES)
    data = [generated_batch(seed, cfg.data.crop, images).to(device) for seed in range(8)]
    runs: list[dict] = []
    table: dict[int, list[str]] = {}
    for amp in amps:
        side = Side(Step, cfg, net, device, amp=amp, compile=compile)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        losses: list[Tensor] = []
        since = time.perf_counter()
        for step in range(steps):
            out = side(data[step % len(data)])
            losses.append(out.terms["total"])
            if (step + 1) % every == 0 or step + 1 == steps:
                recent = torch.stack(losses[-every:]).mean().item()
                table.setdefault(step + 1, []).append(f"{recent:8.4f} ({_terms(out)})")
                print(f"{'bf16' if amp else 'fp32'} step {step + 1:4d}: {table[step + 1][-1]}", flush=True)
        values = torch.stack(losses).double().tolist()
        span = max(1, min(every, steps // 2))
        first, last = sum(values[:span]) / span, sum(values[-span:]) / span
        took = time.perf_counter() - since
        runs.append(
            {
                "precision": "bf16" if amp else "fp32",
                "steps": steps,
                "finite": all(math.isfinite(v) for v in values),
                "first": round(first, 4),
                "last": round(last, 4),
                "falling": last < first,
                "s_per_step": round(took / steps, 4),
                "images_per_s": round(images * steps / took, 2),
                "peak_MB": round(torch.cuda.max_memory_allocated() / 1e6) if device.type == "cuda" else None,
            }
        )
    if len(amps) > 1:
        print("mean loss of the last steps, fp32 | bf16")
        for step, cells in table.items():
            print(f"{step:5d}  " + " | ".join(cell.split(" (")[0] for cell in cells))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="print the largest operators of one step")
    parser.add_argument("--public", action="store_true", help="profile the public recipe's step instead")
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="train on generated images")
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--setting", default="IV")
    parser.add_argument("--refine", default="par")
    parser.add_argument("--share", default="exact", help="method.cam.share")
    parser.add_argument("--backbone", default="mit_b1")
    parser.add_argument("--every", type=int, default=20, help="steps between two lines of --train")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast (CUDA): the profile's, or beside fp32")
    parser.add_argument("--compile", default="none", help="train.compile")
    parser.add_argument("--rows", type=int, default=None, help="of the profile; 5 on CUDA, 15 on the CPU by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="also write the summary of --train there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if not (args.profile or args.train):
        parser.error("one of --profile and --train is needed (python -m bench --only step compares)")
    cfg = configuration(
        args.crop,
        args.setting,
        args.refine,
        share=args.share,
        steps=max(args.train, 2),
        warm=0,
        backbone=args.backbone,
        batch=args.batch,
    )
    amp = args.amp and device.type == "cuda"
    if args.amp and not amp:
        print("no bf16 on a CPU: fp32 alone")
    if args.profile:
        kind = PublicStep if args.public else Step
        side = Side(kind, cfg, build_net(cfg, CLASSES), device, amp=amp and not args.public, compile=args.compile)
        batch = generated_batch(0, args.crop, args.batch).to(device)
        profile(side, batch, args.rows or (5 if device.type == "cuda" else 15))
    if args.train:
        amps = [False, True] if amp else [False]
        for run in (runs := train(cfg, device, args.train, args.batch, amps, args.every, args.compile)):
            print(json.dumps(run))
        if args.json:
            args.json.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
