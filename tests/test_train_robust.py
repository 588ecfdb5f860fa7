"""What goes wrong in a long run: values that are not finite, a full disk, a storage that is away, a wish to stop."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from rich.console import Console
from safetensors.torch import load_file

from tests.ranks import leave
from tests.tiny import tiny_tree
from ugrl.config import TrainConfig, build
from ugrl.errors import CheckpointError, UgrlError
from ugrl.eval import passes
from ugrl.storage import place, retry
from ugrl.train import checkpoint
from ugrl.train.checkpoint_writer import CheckpointWriter, Snapshot
from ugrl.train.interrupt import Interrupted
from ugrl.train.loop import Trainer
from ugrl.train.observer import Hooks
from ugrl.train.optim import Optimizer

TIMES = ("images_per_s", "step_s", "data_wait", "device_memory_mb")


def make(shards: Path, out: Path | None, tree: dict, **more: object) -> Trainer:
    return Trainer(build(tree), shards=shards, out=out, quiet=True, device="cpu", **more)


def spoil(trainer: Trainer, steps: set[int], *, inner: bool = False) -> None:
    """Batches of some steps hold a NaN."""
    loader = trainer.loader

    def spoiled(spec):
        for step, batch in enumerate(loader(spec), start=spec.start_step):
            if step in steps:
                batch.images_B3HW[0, 0, 5, 5] = float("nan")
            yield batch

    trainer.loader = spoiled


def test_a_bad_step_changes_nothing_but_the_count(shards: Path, tmp_path: Path) -> None:
    events: list[str] = []
    trainer = make(shards, tmp_path / "run", tiny_tree(steps=6), hooks=Hooks(on_event=events.append))
    spoil(trainer, {3})
    states = {}
    step_fn, judge = trainer.step_fn.targets, None

    def watch(batch, step, plain=None):
        states[step] = {k: v.clone() for m in (trainer.net, trainer.prototypes) for k, v in m.state_dict().items()}
        return step_fn(batch, step, plain)

    assert judge is None
    trainer.step_fn.targets = watch
    trainer.fit()
    assert states[3].keys() == states[4].keys()
    for key in states[3]:
        assert torch.equal(states[3][key], states[4][key]), key  # weights, prototypes, running statistics
    assert any(not torch.equal(states[4][k], states[5][k]) for k in states[4])
    assert all(torch.isfinite(v).all() for v in trainer.net.state_dict().values() if v.is_floating_point())
    line = json.loads((tmp_path / "run" / "nonfinite.jsonl").read_text())
    assert line["step"] == 4 and line["ids"] == trainer.ids_of(3) and len(set(line["ids"])) == 4
    assert [e for e in events if "finite" in e] == ["step 4: loss or gradients are not finite; skipped"]
    logged = [json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in logged if "lr" in r] == [1, 2, 3, 4, 5, 6]
    assert [r.get("skipped", 0) for r in logged if "lr" in r] == [0, 0, 0, 1, 1, 1]
    assert "total" not in next(r for r in logged if r["step"] == 4)


def test_too_many_in_a_row_end_the_run_with_advice(shards: Path, tmp_path: Path) -> None:
    trainer = make(shards, tmp_path, tiny_tree(steps=6, nan_patience=2, checkpoint_every=1))
    spoil(trainer, {1, 3, 4})
    with pytest.raises(UgrlError, match=r"^step 4: .* 2 steps in a row; .*nonfinite.jsonl .*train.lr") as caught:
        trainer.fit()
    assert "\n" not in str(caught.value)
    assert [json.loads(s)["step"] for s in (tmp_path / "nonfinite.jsonl").read_text().splitlines()] == [2, 4, 5]
    assert checkpoint.read_state(checkpoint.find(tmp_path)).step == 4  # and what it holds is finite
    weights = load_file(checkpoint.find(tmp_path) / "model.safetensors")
    assert all(torch.isfinite(v).all() for v in weights.values())


def test_the_fused_kernel_skips_by_itself() -> None:
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        groups = [{"params": list(net.parameters()), "lr": 0.1, "weight_decay": 0.1}]
        optimizer = Optimizer(net, groups, TrainConfig(steps=10, lr=0.1, lr_warmup_iters=0), fused=fused)
        for step, taken in enumerate([True, False, True]):
            net(torch.ones(1, 3)).square().sum().backward()
            before = [p.detach().clone() for p in net.parameters()]
            optimizer.step(step, torch.tensor(taken))
            assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)) != taken
            optimizer.zero_grad()
        found.append((optimizer.state(), [p.detach() for p in net.parameters()]))
    (plain, p_plain), (kernel, p_kernel) = found
    for key in plain:
        torch.testing.assert_close(kernel[key], plain[key], msg=key)
    torch.testing.assert_close(p_kernel, p_plain)


def test_any_wish_to_stop_saves_and_leaves(shards: Path, tmp_path: Path) -> None:
    asked = iter([False, False, True])
    whole: list[int] = []
    hooks = Hooks(stop=lambda: next(asked), on_checkpoint=lambda step, where, _: whole.append(step) if where else None)
    with pytest.raises(Interrupted) as caught:
        make(shards, tmp_path, tiny_tree(steps=6), hooks=hooks).fit()
    assert caught.value.step == 3 and whole == [3]
    assert checkpoint.read_state(checkpoint.find(tmp_path)).step == 3


@pytest.mark.parametrize("every", [3, 100])  # in the middle, and when all steps are done
def test_a_stop_in_a_validation_is_heard_in_it_and_the_next_run_makes_up_for_it(
    shards: Path, tmp_path: Path, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "BATCH_PIXELS", 1)  # a batch is an image
    tree = tiny_tree(steps=6, eval_every=every, checkpoint_every=2, record_ids=True)
    make(shards, tmp_path / "whole", tree).fit()
    trainer = make(shards, tmp_path / "cut", tree, hooks=Hooks(stop=lambda: bool(seen)))
    seen: list[dict] = []
    note = trainer.folder.note_ids
    trainer.folder.note_ids = lambda what, ids: (seen.append(what) if "eval" in what else None, note(what, ids))[1]
    with pytest.raises(Interrupted) as caught:
        trainer.fit()
    at = min(every, 6)
    assert caught.value.step == at and len(seen) == 1  # after its first batch of several
    found = checkpoint.latest(tmp_path / "cut")
    state = checkpoint.read_state(found) if found is not None else None
    assert state is not None and state.step == at and not state.metrics and not state.ends(6)
    # Stopped once more while it makes up for it, then not.
    again = Hooks(stop=lambda: True)
    with pytest.raises(Interrupted):
        make(shards, tmp_path / "cut", tree, hooks=again, resume_from=found).fit()
    made = make(shards, tmp_path / "cut", tree, resume_from=checkpoint.latest(tmp_path / "cut"))
    last = made.fit()
    lines = [
        [{k: v for k, v in json.loads(s).items() if k not in TIMES} for s in (tmp_path / n / "metrics.jsonl").open()]
        for n in ("whole", "cut")
    ]
    saw = [(tmp_path / n / "seen" / "rank_00.jsonl").read_text() for n in ("whole", "cut")]
    assert saw[0] == saw[1]  # what an interrupted validation has seen is not told twice
    assert lines[0] == lines[1] and sum("val/seg_miou" in line for line in lines[0]) == 6 // at
    for name in ("whole", "cut"):
        state = checkpoint.read_state(checkpoint.latest(tmp_path / name))
        assert state.ends(6) and state.metrics == last


def rank_run(rank: int, made: dict, shards: str, out: str, stop_at: int) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    passes.BATCH_PIXELS = 1  # a batch of a validation is an image
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=2)
    calls = iter(range(100))
    # Only rank 1 is told.
    hooks = Hooks(stop=lambda: rank == 1 and next(calls) == stop_at)
    try:
        make(Path(shards), Path(out), made, hooks=hooks).fit()
        left = "end"
    except Interrupted as stopped:
        left = f"stopped {stopped.step}"
    Path(f"{out}.rank{rank}").write_text(left)
    leave()


# Asked after each step, and before each batch of a validation.
@pytest.mark.parametrize(("stop_at", "step"), [(2, 3), (6, 6)], ids=["in a step", "in the last validation"])
def test_ranks_stop_together_though_one_is_told(stop_at: int, step: int, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tree = tiny_tree(steps=6, eval_every=6)
    mp.spawn(rank_run, (tree, str(shards), str(out), stop_at), nprocs=2)
    assert [Path(f"{out}.rank{r}").read_text() for r in (0, 1)] == [f"stopped {step}"] * 2
    state = checkpoint.read_state(checkpoint.find(out))
    assert state.step == step and not state.metrics


def saver(folder: Path, **more: object) -> tuple[CheckpointWriter, list[str]]:
    said: list[str] = []
    options: dict = {
        "mirror": None,
        "config": {},
        "class_names": ("a",),
        "objective": "m",
        "keep": 2,
        "keep_best": 2,
        "patience_s": 20.0,
        "log": said.append,
        **more,
    }
    return CheckpointWriter(folder, **options), said


def state(step: int, value: float | None = None) -> Snapshot:
    metrics = {} if value is None else {"m": value, "step": float(step)}
    return Snapshot(step, metrics, {"model": {"x": torch.full((64,), float(step))}})


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    keeper, _ = saver(tmp_path)
    for step, value in enumerate([0.5, 0.9, 0.2, None, 0.7, 0.1, 0.1], start=1):
        keeper.submit(state(step, value))
    assert [s.step for s in keeper.flush()] == [1, 2, 3, 4, 5, 6, 7]
    keeper.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*")) == [f"step_{n:08d}" for n in (2, 5, 6, 7)]
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert best["checkpoint"] == "step_00000002" and best["value"] == 0.9
    assert [r["checkpoint"] for r in best["ranking"]] == ["step_00000002", "step_00000005"]


def test_a_storage_that_is_away_for_a_while_loses_nothing(tmp_path: Path) -> None:
    home = tmp_path / "mount" / "run"
    home.mkdir(parents=True)
    keeper, said = saver(home)
    keeper.submit(state(1))
    keeper.flush()
    (tmp_path / "mount").rename(tmp_path / "away")
    (tmp_path / "mount").write_text("")  # nothing can be made below it
    began = time.monotonic()
    keeper.submit(state(2))  # does not wait
    assert time.monotonic() - began < 15
    time.sleep(1.0)
    assert [s.step for s in keeper.poll()] == []
    (tmp_path / "mount").unlink()
    (tmp_path / "away").rename(tmp_path / "mount")
    assert [s.step for s in keeper.flush()] == [2]
    keeper.close()
    assert checkpoint.read_part(checkpoint.find(home), "model")["x"][0] == 2
    assert len(said) == 2 and "trying again for up to 20 s" in said[0] and "back" in said[1]


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_train_robust import saver, state
import torch
from ugrl.train.checkpoint_writer import Snapshot
keeper, said = saver(Path(sys.argv[1]), patience_s=1.0)
keeper.submit(state(1)); keeper.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # files cannot grow beyond it: as on a full disk
keeper.submit(Snapshot(2, {{}}, {{"model": {{"x": torch.zeros(100_000)}}}}))
try:
    keeper.flush()
except Exception as error:
    print(type(error).__name__, error)
keeper.close()
"""


def test_a_full_disk_ends_with_the_last_checkpoint_whole(tmp_path: Path) -> None:
    code = FULL.format(root=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CheckpointError") and "the checkpoint of step 2 could not be written" in done.stdout
    assert "the last whole one is of step 1" in done.stdout and "--resume" in done.stdout
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]  # no half one, no draft
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


LOGS = """
import resource, sys
from ugrl.config import load
from ugrl.storage import place
from ugrl.train.run_folder import RunFolder
said, none = [], resource.RLIM_INFINITY
cfg = load("shapes", {"train.record_ids": True})
folder = RunFolder(place(sys.argv[1]), cfg, class_names=(), objective="x", data="", say=said.append)
folder.open(0)
for step in range(1, 7):
    if step in (3, 5):  # there is room for half a line, then for all
        resource.setrlimit(resource.RLIMIT_FSIZE, (50 if step == 3 else none, none))
    folder.record({"step": step, "total": 0.5})
    folder.note_ids({"step": step}, ["image"])
print(*said, sep="; ")
"""


def test_a_full_disk_leaves_each_line_of_a_log_once_and_whole(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOGS, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("its lines wait in memory") == 2  # of two logs, each said once
    for log in ("metrics.jsonl", "seen/rank_00.jsonl"):
        assert [json.loads(s)["step"] for s in (tmp_path / log).read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_what_waiting_cannot_cure_is_not_waited_for(tmp_path: Path) -> None:
    calls = []

    def refuse() -> None:
        calls.append(1)
        raise PermissionError(13, "Permission denied")

    with pytest.raises(PermissionError):
        retry("it", refuse, patience_s=30)
    assert len(calls) == 1
    assert place(tmp_path / "none").names() == []


def test_saving_does_not_hold_up_the_steps(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that hangs: steps go on, and the end waits for it."""
    gate, steps = threading.Event(), []
    save = checkpoint.save

    def hanging(*args: object, **kwargs: object) -> Path:
        assert gate.wait(60)
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", hanging)

    def on_log(step: int, _: dict[str, float]) -> None:
        steps.append(step)
        if step == 5:  # three steps after the write began
            gate.set()

    tree = tiny_tree(steps=6, checkpoint_every=2, log_every=1, keep_checkpoints=9)
    make(shards, tmp_path, tree, hooks=Hooks(on_log=on_log)).fit()
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [checkpoint.read_state(p).step for p in sorted((tmp_path / "checkpoints").glob("step_*"))] == [2, 4, 6]


def test_leftovers_of_a_dead_writer_are_removed_and_said(shards: Path, tmp_path: Path) -> None:
    tree = tiny_tree(steps=3)
    make(shards, tmp_path, tree).fit()
    draft = tmp_path / "checkpoints" / ".step_00000009.tmp"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "total": 1.0}\n{"step": 8, "to')
    said: list[str] = []
    trainer = make(shards, tmp_path, tree, resume_from=tmp_path, hooks=Hooks(on_event=said.append))
    trainer.fit()
    assert not draft.exists() and [".step_00000009.tmp" in text for text in said].count(True) == 1
    assert [json.loads(s)["step"] for s in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1] == 3


def test_ids_are_recorded_once_an_epoch(shards: Path, tmp_path: Path) -> None:
    tree = tiny_tree(steps=10, record_ids=True)  # two epochs of five
    trainer = make(shards, tmp_path, tree)
    trainer.fit()
    lines = [json.loads(s) for s in (tmp_path / "seen" / "rank_00.jsonl").read_text().splitlines()]
    for epoch in (0, 1):
        ids = [i for r in lines if "step" in r and (r["step"] - 1) // 5 == epoch for i in r["ids"]]
        assert sorted(ids) == sorted(trainer.manifest.ids("train")) and len(ids) == 20
    seen = [i for r in lines if "eval" in r for i in r["ids"]]
    assert sorted(seen) == sorted(trainer.manifest.ids("val"))


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_sigterm_is_a_checkpoint_and_then_the_end(number: int, shards: Path, tmp_path: Path) -> None:
    tree, out = tiny_tree(steps=4000, log_every=1), tmp_path / "run"
    code = (
        "import json, sys; from tests.test_train_robust import make; from pathlib import Path;"
        "make(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])).fit()"
    )
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(shards), str(out), json.dumps(tree)],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        log = out / "metrics.jsonl"
        while not (log.is_file() and log.read_text().count("\n") >= 2):
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert "Interrupted" in err and child.returncode != 0
    step = checkpoint.read_state(checkpoint.find(out)).step
    assert step == len([s for s in log.read_text().splitlines() if '"lr"' in s]) >= 2


def test_events_reach_the_console(shards: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    trainer = Trainer(build(tiny_tree(steps=3)), shards=shards, out=tmp_path, console=console, device="cpu")
    spoil(trainer, {1})
    trainer.fit()
    assert "step 2: loss or gradients are not finite; skipped" in console.export_text()
    with pytest.raises(CheckpointError):
        checkpoint.find(tmp_path / "nothing")
