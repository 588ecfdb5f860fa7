"""What the method costs over plain classification with the same encoder, for each family of encoders.

    python -m bench --only backbones
    python -m bench.backbones --table
    python -m bench.backbones --parts --crop 320 timm/tf_efficientnet_lite0

Ours is a step of setting IV behind the warm-up, forward and backward, with PAR. The baseline is timm's own model of
the name: forward, multi-label loss and backward over the same crops, with its own pooling, the same output stride and
the same frozen batch statistics. (For this project's MiT it is the encoder with the classifier.) Neither side applies
an optimiser. Process time of one thread counts, in pairs by round, so that what else runs on the machine disturbs
little. A ratio of an entry is baseline / ours, as everywhere in ``bench``; the tables here say ours / baseline.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.apart import Remote
from bench.measure import Context, Entry, Skipped, compare, threads
from bench.step import CLASSES, configuration, generated_batch
from ugrl.config import Config
from ugrl.model.backbone import BackboneInfo
from ugrl.model.families import make_backbone
from ugrl.model.network import Encoded
from ugrl.model.specs import SPECS, TIMM
from ugrl.train.build import build_net, build_par, build_prototypes
from ugrl.train.flops import step_gflop
from ugrl.train.step import Step
from ugrl.types import Batch, ModelOutput

#: The encoders of the table in docs/backbones.md.
TABLE = (
    "tiny",
    "mit_b1",
    *(f"{TIMM}tf_efficientnet_lite{k}" for k in range(3)),
    f"{TIMM}resnet50",
    f"{TIMM}convnext_tiny",
    *(f"{TIMM}mobilenetv3_{size}_100" for size in ("small", "large")),
    f"{TIMM}pvt_v2_b1",
    f"{TIMM}swin_tiny_patch4_window7_224",
    f"{TIMM}hiera_tiny_224",
    *(f"{TIMM}vit_{size}_patch16_224" for size in ("small", "base")),
    *(f"{TIMM}deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
    f"{TIMM}vit_small_patch14_dinov2",
    f"{TIMM}vit_small_patch16_dinov3",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison.

    ``scales`` are those of the CAM. Nothing is dropped, so that the training pass is the plain CAM pass as well.
    """

    backbone: str
    crop: int = 224
    batch: int = 4
    scales: tuple[float, ...] = (1.0, 0.5)
    gate: float | None = None
    memory_gate: float | None = None

    @property
    def cfg(self) -> Config:
        """The run whose step is measured."""
        return configuration(
            self.crop, drop_path=0.0, warm=0, batch=self.batch, backbone=self.backbone, scales=self.scales
        )


LITE0 = f"{TIMM}tf_efficientnet_lite0"
CASES = {
    # The goal: three times the time and twice the memory.
    "backbones/lite0-320": Case(LITE0, 320, gate=0.333, memory_gate=0.5),
    "backbones/lite0-320-three-scales": Case(LITE0, 320, scales=(1.0, 0.5, 1.5)),
    **{f"backbones/{name.removeprefix(TIMM)}": Case(name) for name in TABLE},
}
NAMES = tuple(CASES)
QUICK = NAMES[:1]


def plain_model(cfg: Config, classes: int) -> nn.Module:
    """Plain multi-label classification: images → logits."""
    name = cfg.model.backbone
    if name in SPECS:
        return _OfMaps(make_backbone(name), SPECS[name].dims[3], classes)
    import timm

    bare, options = name.removeprefix(TIMM), {}
    info = make_backbone_info(name)
    if bare.startswith("mobilenetv3"):  # only its form with maps can be told a stride
        return _OfMaps(timm.create_model(bare, features_only=True, output_stride=16), info.dims[3], classes, 1)
    if info.ups[0] > 1:
        options = {"dynamic_img_size": True}
    elif bare.startswith("hiera"):
        options = {"img_size": (cfg.data.crop,) * 2}
    elif bare.startswith("swin"):
        options = {"strict_img_size": False}
    elif not bare.startswith("pvt"):
        options = {"output_stride": 16}
    return timm.create_model(bare, num_classes=classes, **options)


class _OfMaps(nn.Module):
    """A mean of the last map, and a linear layer."""

    def __init__(self, encoder: nn.Module, dim: int, classes: int, bare: int = 0) -> None:
        super().__init__()
        self.encoder, self.head, self.bare = encoder, nn.Linear(dim, classes), bare

    def forward(self, images: Tensor) -> Tensor:
        found = self.encoder(images)
        maps: Sequence[Tensor] = found if self.bare else found[0]
        logits: Tensor = self.head(maps[-1].mean((2, 3)))
        return logits


def make_backbone_info(name: str) -> BackboneInfo:
    """The facts of an encoder, without its weights."""
    with torch.device("meta"):
        return make_backbone(name).info


def make_plain(case: Case, classes: int = CLASSES) -> Callable[[], float]:
    """Forward, loss and backward of plain classification; a call returns the loss."""
    torch.manual_seed(0)
    model = plain_model(case.cfg, classes).eval()
    batch = generated_batch(0, case.crop, case.batch)
    images = batch.images_B3HW
    if make_backbone_info(case.backbone).affinity == "projection":
        images = images.contiguous(memory_format=torch.channels_last)  # as our own encoder takes them

    def step() -> float:
        loss = F.binary_cross_entropy_with_logits(model(images), batch.tags_BF)
        loss.backward()
        model.zero_grad()
        return loss.item()

    return step


def made(case: Case) -> tuple[Step, Batch]:
    """Our step in the state that training is in: every class has been seen."""
    cfg = case.cfg
    net = build_net(cfg, CLASSES).train()
    step = Step(cfg, net, build_prototypes(cfg, CLASSES, net.dim), build_par(cfg))
    batch = generated_batch(0, case.crop, case.batch)
    with torch.no_grad():
        step.targets(batch, 1)
    return step, batch


def make_ours(case: Case) -> Callable[[], float]:
    """Forward and backward of a step of the method; a call returns the loss."""
    step_fn, batch = made(case)

    def step() -> float:
        loss = step_fn(batch, 1).loss
        loss.backward()
        step_fn.net.zero_grad()
        return loss.item()

    return step


# --- by part ----------------------------------------------------------------------------------------------------

PARTS = ("classification", "CAM passes", "labels, PAR", "prototypes", "pool", "decoder, L_seg", "contrast", "affinity")


class Parts:
    """A step in pieces, each with its own clock; the gradients are those of the step.

    The heads work on copies of the encoder's maps that end the graph. What they leave there goes through the encoder
    at the end, as in :mod:`ugrl.train.accumulate`. So each loss is run back by itself, and its time is known.

    Args:
        case: What to measure.
    """

    def __init__(self, case: Case) -> None:
        self.step_fn, self.batch = made(case)
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = 0.0
        maker = self.step_fn.target_maker
        for method, part in (("cam", "CAM passes"), ("labels", "labels, PAR"), ("_choose_pool", "pool")):
            setattr(maker, method, self._timed(getattr(maker, method), part))

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            out = function(*args, **kwargs)
            spent = time.process_time() - start
            self.seconds[part] += spent
            self.inner += spent
            return out

        return timed

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Books the time of a block, less what was booked inside of it."""
        self.inner, start = 0.0, time.process_time()
        yield
        self.seconds[part] += time.process_time() - start - self.inner

    def __call__(self, at: int = 1) -> dict[str, float]:
        """One step; the seconds of its parts. The gradients stay in the network."""
        self.seconds.clear()
        step_fn, batch, net = self.step_fn, self.batch, self.step_fn.net
        terms, lam = step_fn.objective.terms, step_fn.cfg.method.loss
        noise, size = step_fn.noise(batch, at), (batch.images_B3HW.shape[-2], batch.images_B3HW.shape[-1])
        with self.clock("classification"):
            encoded = Encoded(*net.encoder(batch.images_B3HW, noise))
            ends = encoded.tensors()
            leaves = [x.detach().requires_grad_() for x in ends]
        features, pairs = Encoded.of(leaves)
        plain = encoded.detached() if step_fn.schedule.shares(at) else None
        with self.clock("prototypes"):
            t = step_fn.targets(batch, at, plain)
        alone = {
            "cls": replace(t, labels_BHW=None, embed_Bn=None, coarse_Bhw=None),
            "seg": replace(t, embed_Bn=None, coarse_Bhw=None),
            "ucl": replace(t, labels_BHW=None, coarse_Bhw=None),
            "aux": replace(t, labels_BHW=None, embed_Bn=None),
        }
        with self.clock("classification"):
            logits = net.scores(features[3], batch.boxes_B4, size)
            terms(batch, ModelOutput(features, logits), alone["cls"])["cls"].backward()
        still = ModelOutput(features, logits.detach())
        with self.clock("decoder, L_seg"):
            z = net.decoder.fused(features)
            z_leaf = z.detach().requires_grad_()
            out = replace(still, seg_BChw=net.decoder.logits(z_leaf, noise))
            (lam.lambda1 * terms(batch, out, alone["seg"])["seg"]).backward()
        with self.clock("contrast"):
            out = replace(still, emb_BDhw=net.g_seg(z_leaf, t.embed_Bn))
            (lam.lambda2 * terms(batch, out, alone["ucl"])["ucl"]).backward()
        with self.clock("decoder, L_seg"):
            z.backward(z_leaf.grad)
        with self.clock("affinity"):
            own = net.g_cls.pairs(features[3], pairs)
            out = replace(still, affinity_BNN=net.g_cls.from_pairs(own, net.heads, t.affinity_Bn))
            (lam.lambda3 * terms(batch, out, alone["aux"])["aux"]).backward()
        with self.clock("classification"):
            kept = [(x, y.grad) for x, y in zip(ends, leaves, strict=True) if y.grad is not None]
            torch.autograd.backward([x for x, _ in kept], [g for _, g in kept])
        return {part: self.seconds[part] for part in PARTS}


def parts_table(case: Case, rounds: int) -> list[str]:
    """Seconds of each part and their share of plain classification, as Markdown: medians of paired rounds."""
    with threads(1):
        ours, plain = Parts(case), make_plain(case)
        found: list[dict[str, float]] = []
        for k in range(rounds + 1):
            start = time.process_time()
            plain()
            base = time.process_time() - start
            found.append(ours() | {"plain": base})
            ours.step_fn.net.zero_grad()
            if k == 0:
                found.clear()  # the warm-up
    scales = ", ".join(f"{s:g}" for s in case.scales)
    images = case.batch
    lines = [f"{case.backbone}, {images} crops of {case.crop} px, CAM scales {scales}, {rounds} rounds, one thread", ""]
    lines += ["| part | CPU seconds an image | over plain classification |", "| --- | ---: | ---: |"]
    rows = [("plain classification (timm)", [f["plain"] for f in found])]
    rows += [(part, [f[part] for f in found]) for part in PARTS]
    rows.append(("whole step", [sum(f[p] for p in PARTS) for f in found]))
    for name, values in rows:
        ratio = statistics.median(v / f["plain"] for v, f in zip(values, found, strict=True))
        lines.append(f"| {name} | {statistics.median(values) / images:.3f} | {ratio:.2f} |")
    return lines


# --- by family --------------------------------------------------------------------------------------------------


def _entry(name: str, case: Case, ctx: Context, **options: Any) -> Entry:
    with ExitStack() as stack:
        sides = [stack.enter_context(Remote(make, case, threads=ctx.threads)) for make in (make_ours, make_plain)]
        entry = compare(name, *sides, ctx=ctx, gate=case.gate, memory_gate=case.memory_gate, **options)
    memory = 1 / entry.memory_ratio if entry.memory_ratio else float("nan")
    words = f"IV costs {1 / entry.ratio:.2f} times the time and {memory:.2f} times the memory of plain classification"
    scales = ", ".join(f"{s:g}" for s in case.scales)
    return replace(entry, note=f"{case.batch} crops of {case.crop}, CAM scales {scales}: {words}")


def entries(ctx: Context) -> Iterator[Entry | Skipped]:
    """One comparison for each family; with ``--quick`` that of lite0 alone."""
    for name, case in CASES.items():
        if not ctx.wants(name):
            continue
        if ctx.device.type == "cuda":
            yield Skipped(name, "a comparison on the CPU")
        elif not ctx.quick:
            yield _entry(name, case, ctx, rounds=5, budget=60.0)
        elif name in QUICK:
            yield _entry(name, replace(case, batch=1), ctx)


def facts(name: str) -> list[str]:
    """What the table of families says of an encoder without measuring anything."""
    with torch.device("meta"):
        encoder = make_backbone(name)
    info, count = encoder.info, sum(p.numel() for p in encoder.parameters())
    same = len(set(info.dims)) == 1
    strides = f"{info.reductions[0]}, four times" if same else ", ".join(map(str, info.reductions))
    dims = str(info.dims[0]) if same else ", ".join(map(str, info.dims))
    return [
        f"`{name}`",
        f"{count / 1e6:.1f} M",
        strides,
        dims,
        str(info.multiple),
        info.affinity,
        info.licence or "",
    ]


def row(name: str, ctx: Context, rounds: int, case: Case | None = None) -> str:
    """A row of the table of families, as Markdown."""
    case = case or Case(name)
    entry = _entry(name, case, ctx, rounds=rounds, budget=600.0)
    cells = [
        *facts(name),
        f"{step_gflop(case.cfg, CLASSES):.0f}",
        f"{1 / entry.ratio:.1f}",
        f"{1 / (entry.memory_ratio or 1):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "| backbone | parameters | strides of F1…F4 | channels | crops are multiples of | affinity | licence of the "
    "weights | GFLOP | time | memory |\n| --- | ---: | --- | --- | ---: | --- | --- | ---: | ---: | ---: |"
)


def main(words: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", action="store_true", help="the table of families: facts, GFLOP an image, and ratios")
    what.add_argument("--parts", action="store_true", help="the seconds of each part of the step")
    parser.add_argument("names", nargs="*", metavar="BACKBONE", help="default: those of the documentation")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.5], help="method.cam.scales")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(words)
    chosen = args.names or (TABLE if args.table else [LITE0])
    cases = [Case(name, args.crop, args.batch, tuple(args.scales)) for name in chosen]
    if args.parts:
        for case in cases:
            print("\n".join(parts_table(case, args.rounds)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as tmp:
        ctx = Context(False, torch.device("cpu"), 1, Path(tmp), lambda text: None)
        print(HEAD, flush=True)
        for case in cases:
            print(row(case.backbone, ctx, args.rounds, case), flush=True)


if __name__ == "__main__":
    main()
