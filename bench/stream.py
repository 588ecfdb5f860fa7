"""Ray Data's loader against the local one on the same shards: speed, memory, and what a training step waits.

Images per second count the processor time of every process of the stream: the consumer, the tasks that read, and all
of Ray's own. Every round opens a stream, waits until it is as far ahead as it may be, takes its batches, and waits
until it is that far ahead again: what is counted is what the batches cost, without the start, which a run has once.
The plain loader is torch's, with a dataset that reads the same shards and cuts the same crops.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench import ray_use
from bench.loader import BATCH, CROP, SEED, kilobytes, photos, write_shards
from bench.loader import cpu_seconds as cpu_seconds_of
from bench.measure import Context, Different, Entry, Skipped, entry
from ugrl import config as configs
from ugrl.config import DataConfig
from ugrl.data.augment import Augment
from ugrl.data.make import OnDevice
from ugrl.data.order import sample_rng
from ugrl.data.reader import ShardReader
from ugrl.data.shards import Manifest
from ugrl.data.spec import LoaderSpec
from ugrl.train.batches import local_loader
from ugrl.train.loop import Trainer
from ugrl.train.observer import Hooks
from ugrl.train.run import ensure_shards
from ugrl.types import Sample, collate

NAMES = (
    "stream/torch-0",
    "stream/torch-2",
    "stream/pixels",
    "stream/floats",
    "stream/pixels-wall",
    "stream/floats-wall",
    "stream/wait",
    "stream/s3",
    "stream/store",
    "stream/memory",
)
GATE = 0.8
STORE = 80_000_000  # about the smallest that Ray takes
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "word", "AWS_DEFAULT_REGION": "us-east-1"}
Make = Callable[[LoaderSpec], Iterator]


# --- speed --------------------------------------------------------------------------------------------------------


def asked(shards: Path, images: int, on_device: OnDevice = "none") -> LoaderSpec:
    """A stream of many epochs, with one thread that decodes."""
    return LoaderSpec(
        shards=shards,
        split="train",
        num_classes=1,
        data=DataConfig(crop=CROP, threads=1, prefetch=2, on_device=on_device),
        seed=SEED,
        global_batch=BATCH,
        rank=0,
        world=1,
        start_step=0,
        total_steps=images // BATCH,
    )


def with_data(spec: LoaderSpec, **values: object) -> LoaderSpec:
    """The same with other values in its section ``data``."""
    return replace(spec, data=replace(spec.data, **values))


def settle(mark: str | None) -> None:
    """Wait until the processes do no more than they always do."""
    until, calm, last = time.perf_counter() + 5, 0, ray_use.cpu_seconds(mark)
    while calm < 2 and time.perf_counter() < until:
        time.sleep(0.15)
        now = ray_use.cpu_seconds(mark)
        calm, last = calm + 1 if now - last < 0.04 else 0, now


def rates(make: Make, spec: LoaderSpec, images: int, mark: str | None) -> tuple[float, float]:
    """Images per second of processor time, and of the clock."""
    stream = make(spec)
    next(stream)
    settle(mark)
    cpu, wall = ray_use.cpu_seconds(mark), time.perf_counter()
    for _ in range(images // BATCH):
        next(stream)
    wall = time.perf_counter() - wall
    settle(mark)
    cpu = ray_use.cpu_seconds(mark) - cpu
    stream.close()  # type: ignore[attr-defined]
    return images / cpu, images / wall


def against_local(ctx: Context, shards: Path, mark: str, on_device: OnDevice, data: str) -> Iterator[Entry]:
    """Ray Data and the local loader, in interleaved rounds."""
    from cluster.ray_data import ray_loader

    name = {"none": "stream/floats", "normalize": "stream/pixels"}[on_device]
    images, rounds = (512, 3) if ctx.quick else (2048, 7)
    # Far more than is taken, so that neither side comes to an end.
    spec = asked(shards, 100 * images, on_device)
    sides: dict[str, tuple[Make, str | None]] = {
        "ours": (lambda s: ray_loader(s, tasks=1), mark),
        "baseline": (local_loader, None),
    }
    few = [make(replace(spec, total_steps=4)) for make, _ in sides.values()]
    for _ in range(4):
        a, b = (next(stream).to("cpu") for stream in few)
        if a.ids != b.ids or not torch.equal(a.images_B3HW, b.images_B3HW):
            raise Different(f"{name}: the loaders' batches differ")
    for stream in few:
        stream.close()  # type: ignore[attr-defined]
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for k in range(rounds):
        if k > 1 and ctx.left < 5:
            break
        ctx.log(f"{name}: round {k + 1} of {rounds}")
        for side in ("ours", "baseline") if k % 2 == 0 else ("baseline", "ours"):
            make, whose = sides[side]
            found[side].append(rates(make, spec, images, whose))
    kind = "float batches" if on_device == "none" else "8-bit batches, as CUDA gets them"
    note = f"Ray Data, one task at a time; local loader; {kind}, one decoding thread, crop {CROP}, {data}"
    for k, (suffix, what, gate) in enumerate((("", "processor time of all processes", GATE), ("-wall", "clock", None))):
        ours, baseline = ([r[k] for r in found[side]] for side in ("ours", "baseline"))
        yield entry(name + suffix, ours, baseline, unit="images/s", gate=gate, note=f"{what}: {note}")


class Plain(Dataset):
    """What a user of torch's loader would write: a row is read, decoded and cut by the same code."""

    def __init__(self, shards: Path) -> None:
        self.shards, self.augment = shards, Augment(CROP, 1)
        self.rows = Manifest.load(shards).rows("train")
        self.reader: ShardReader | None = None

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Sample:
        self.reader = self.reader or ShardReader(self.shards, "train")  # each process opens its own
        row = self.reader[index]
        return self.augment(row, sample_rng(SEED, 0, row.id))


def torch_rate(shards: Path, images: int, workers: int) -> float:
    """Images per second of processor time, of torch's loader and its processes."""

    def work() -> None:
        made = 0
        for batch in DataLoader(
            Plain(shards), batch_size=BATCH, shuffle=True, num_workers=workers, collate_fn=collate, drop_last=True
        ):
            made += len(batch.ids)
            if made >= images:
                break

    return images / cpu_seconds_of(work)


def local_rate(shards: Path, images: int, threads: int) -> float:
    """The same of our loader."""

    def work() -> None:
        loader = local_loader(with_data(asked(shards, 100 * images), threads=threads))
        for _ in range(images // BATCH):
            next(loader)
        loader.close()  # type: ignore[attr-defined]

    return images / cpu_seconds_of(work)


# --- what a step waits ----------------------------------------------------------------------------------------------


def waits(ctx: Context, make: Make, shards: Path) -> tuple[float, float]:
    """Share of a training step that it waits for its batch, in percent, and seconds a step; the shapes run."""
    steps, every = (24, 6) if ctx.quick else (80, 10)
    changes = {"train.steps": steps, "train.log_every": every, "train.eval_every": 10**6, "data.shapes.val": 8}
    changes |= {"train.checkpoint_every": 10**6, "train.picture_every": 10**6, "train.cpu_threads": 1}
    changes |= {"train.cls_warmup_iters": 2, "train.lr_warmup_iters": 2, "data.threads": 1}
    seen: list[tuple[float, float]] = []

    def on_log(_: int, values: dict[str, float]) -> None:
        seen.append((100 * values["data_wait"], values["step_s"]))

    cfg = configs.load("shapes", changes)
    trainer = Trainer(cfg, shards=shards, out=None, loader=make, hooks=Hooks(on_log=on_log), quiet=True, device="cpu")
    trainer.fit()
    later = seen[1:]  # the first holds the start of the stream
    return max(0.01, statistics.mean(w for w, _ in later)), statistics.mean(s for _, s in later)


def waiting(ctx: Context) -> Entry:
    """The same training step fed by either loader."""
    from cluster.ray_data import ray_loader

    ctx.log("stream/wait")
    os.environ.setdefault("UGRL_DATA", str(ctx.tmp / "data"))
    shards = ensure_shards(configs.load("shapes", {"data.shapes.val": 8}), None)
    assert shards.local is not None
    ours, baseline, times = [], [], []
    for _ in range(1 if ctx.quick else 3):
        for side, make in ((ours, lambda s: ray_loader(s, tasks=1)), (baseline, local_loader)):
            share, step_s = waits(ctx, make, shards.local)
            side.append(share)
            times.append(step_s)
    step = f"{1000 * statistics.mean(times):.0f} ms a step"
    note = f"share of a step's time that it waits for its batch: Ray Data; local loader; shapes run, {step}"
    return entry("stream/wait", ours, baseline, unit="%", note=note)


# --- storage --------------------------------------------------------------------------------------------------------


@contextmanager
def bucket(ctx: Context) -> Iterator[str]:
    """A server of S3's protocol in a process of its own; yields the beginning of a URI and its options."""
    import socket

    from pyarrow import fs

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = {key: os.environ.get(key) for key in KEYS}
    os.environ.update(KEYS)
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > until or server.poll() is not None:
                    raise
                time.sleep(0.1)
        root = fs.S3FileSystem(endpoint_override=f"127.0.0.1:{port}", scheme="http", allow_bucket_creation=True)
        root.create_dir("bucket")
        yield f"s3://bucket/{{}}?scheme=http&endpoint_override=127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def read_rate(spec: LoaderSpec, images: int, stream: str) -> float:
    """Rows per second by the clock, as a task of Ray Data reads them."""
    from cluster.read_tasks import fetch

    manifest = Manifest.load(spec.shards)
    start = time.perf_counter()
    span = {"start": np.array([0]), "stop": np.array([images])}
    rows = sum(
        block.num_rows for block in fetch(span, spec=spec, manifest=manifest, block_bytes=16_000_000, stream=stream)
    )
    if rows != images:
        raise Different(f"stream/s3: {rows} rows instead of {images}")
    return images / (time.perf_counter() - start)


def remote(ctx: Context, shards: Path) -> Entry | Skipped:
    """Row groups fetched from a bucket one by one, and read from the disk."""
    if find_spec("moto") is None:
        return Skipped("stream/s3", "moto[server], a local S3 server, is not installed")
    from ugrl.storage import place

    ctx.log("stream/s3")
    images, rounds = (128, 2) if ctx.quick else (512, 5)
    with bucket(ctx) as uri:
        there = place(uri.format("shards"))
        there.upload(shards, last="manifest.json")
        spec = asked(shards, images)
        ours, baseline = [], []
        for k in range(rounds):
            ours.append(read_rate(replace(spec, shards=there), images, f"s3-{k}"))
            baseline.append(read_rate(spec, images, f"disk-{k}"))
    from cluster.read_tasks import REQUESTS

    note = f"rows of a bucket (moto on this machine, {REQUESTS} requests at a time, each of 8 rows); of the disk"
    return entry("stream/s3", ours, baseline, unit="images/s", note=note)


# --- memory ---------------------------------------------------------------------------------------------------------


def bounded(ctx: Context, tmp: Path) -> Iterator[Entry]:
    """A stream of several times the object store, by a consumer that is sometimes fast and sometimes not there."""
    from cluster.blocks import mean_row_bytes, store_part, stream_bytes
    from cluster.ray_data import ray_loader

    times = 2.3 if ctx.quick else 6.0
    noise = ray_use.write_noise(tmp / "noise", int(times * STORE / 1e6))
    manifest = Manifest.load(noise)
    size = sum(s.bytes for s in manifest.split("train").shards)
    steps = manifest.rows("train") // BATCH
    spec = with_data(asked(noise, steps * BATCH, "normalize"), crop=32)
    with ray_use.private_cluster(store_bytes=STORE):
        bound = stream_bytes(mean_row_bytes(manifest, "train"), tasks=2, store_bytes=store_part(1))
        ctx.log("stream/store")
        with ray_use.StoreWatch() as watch:
            for step, _ in enumerate(ray_loader(spec, tasks=2)):
                if step % (steps // 2) == steps // 4:
                    time.sleep(2)
    if watch.beyond:
        raise Different(f"stream/store: {watch.beyond} bytes went to the disk")
    words = f"{size / 1e6:.0f} MB through a store of {STORE / 1e6:.0f} MB, two tasks, two pauses of the consumer"
    yield entry(
        "stream/store",
        [watch.pinned / 1e6],
        [bound / 1e6],
        unit="MB",
        gate=1.0,
        note=f"most that the stream held; the bound it was given; {words}; nothing spilled, at most "
        f"{watch.used / 1e6:.0f} MB with blocks that were deleted but not yet let go of",
    )
    yield entry(
        "stream/memory",
        [max(watch.grown(), 0) / 1e6],
        [size / 1e6],
        unit="MB",
        limit=40.0,
        note=f"growth of the consumer's own memory after the first third; what went through; {words}",
    )


def entries(ctx: Context) -> Iterator[Entry | Skipped]:
    """See the module."""
    ctx = replace(ctx, device=torch.device("cpu"), threads=1)
    rows = photos(32 if ctx.quick else 64)
    count = 512 if ctx.quick else 2048
    rows = [replace(rows[k % len(rows)], id=f"{k:05d}") for k in range(count)]
    shards = write_shards(rows, ctx.tmp / "stream")
    data = f"{count} photographs, {kilobytes(rows)} kB"
    for name, workers in (("stream/torch-0", 0), ("stream/torch-2", 2)):
        if ctx.wants(name):
            ctx.log(name)
            images, rounds = (256, 2) if ctx.quick else (1024, 5)
            pairs = [
                (local_rate(shards, images, workers), torch_rate(shards, images, workers)) for _ in range(rounds + 1)
            ][1:]
            note = f"processor time: local loader, {workers} threads; torch's, {workers} processes, same crops; {data}"
            yield entry(name, [p[0] for p in pairs], [p[1] for p in pairs], unit="images/s", note=note)
    if find_spec("ray") is None:
        yield from (Skipped(n, "Ray is not installed") for n in NAMES[2:] if ctx.wants(n))
        return
    if not Path("/proc/self/statm").is_file():
        yield from (Skipped(n, "no /proc to read other processes' time from") for n in NAMES[2:] if ctx.wants(n))
        return
    if any(ctx.wants(n) for n in NAMES[2:7]):
        ctx.log("stream: a private cluster")
        with ray_use.private_cluster(store_bytes=400_000_000) as mark:
            kinds: tuple[tuple[str, OnDevice], ...] = (("stream/pixels", "normalize"), ("stream/floats", "none"))
            for name, on_device in kinds:
                if ctx.wants(name) or ctx.wants(f"{name}-wall"):
                    yield from against_local(ctx, shards, mark, on_device, data)
            if ctx.wants("stream/wait"):
                yield waiting(ctx)
    if ctx.wants("stream/s3"):
        yield remote(ctx, shards)
    if ctx.wants("stream/store") or ctx.wants("stream/memory"):
        yield from bounded(ctx, ctx.tmp)
