"""Files of a run that were damaged or edited: one line that names the file, never something else than was written."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_tree
from ugrl.config import build
from ugrl.errors import CheckpointError, ConfigError, UgrlError
from ugrl.ownership import LostError
from ugrl.storage import place
from ugrl.train import checkpoint
from ugrl.train.checkpoint_writer import CheckpointWriter, Snapshot
from ugrl.train.interrupt import Interrupted
from ugrl.train.loop import Trainer
from ugrl.train.observer import Hooks
from ugrl.train.restore import restore
from ugrl.train.run import stored_config
from ugrl.train.run_folder import RunFolder

CFG = build(tiny_tree(steps=3, eval_every=1, keep_best=2))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    Trainer(CFG, shards=shards, out=out, quiet=True, device="cpu").fit()
    return out


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def refused(action: Callable[[], Any], words: str, kind: type[UgrlError] = CheckpointError) -> None:
    with pytest.raises(kind, match=words) as caught:
        action()
    text = str(caught.value)
    assert text.isprintable() and len(text) < 400, text


def edit(file: Path, change: Callable[[dict[str, Any]], Any] | str) -> None:
    if isinstance(change, str):
        file.write_text(change)
        return
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("[]", r"\[\]; expected keys and values"),
        ("", "broken JSON at line 1"),
        ("[" * 5000, "nested too deep"),
        ('{"format": 1}', "no key 'step' among 'format'"),
        ('{"format": [1]}', r"checkpoint format \[1\]; this version reads 1"),
        (lambda s: s.update(step="three"), "step: 'three'; expected a whole number"),
        (lambda s: s.update(step=-1), "step: -1"),
        (lambda s: s.update(step=2), "step 2; expected that of step_00000003"),
        (lambda s: s.update(class_names="cat"), "class_names: 'cat'; expected a list"),
        (lambda s: s.update(class_names=[[1]]), "class_names: .*; expected a text"),
        (lambda s: s.update(class_names=[]), "an empty list of class_names"),
        (lambda s: s.update(metrics=[]), r"metrics: \[\]; expected keys"),
        (lambda s: s.update(metrics={"x": "high"}), "metrics: 'x': 'high'; expected a finite number"),
        (lambda s: s.update(config=[]), r"config: \[\]; expected keys"),
        (lambda s: s.update(config={}), "an empty config"),
        (lambda s: s["config"].update(sheep={}), "state.json: .*sheep"),
        (lambda s: s.update(data=7), "data: 7; expected a text"),
        (lambda s: s.pop("metrics"), "no key 'metrics'"),
    ],
)
def test_a_broken_state_is_named(run: Path, change: Any, words: str) -> None:
    edit(run / "checkpoints/step_00000003/state.json", change)
    refused(lambda: restore(run, device=CPU), words)


def test_what_is_no_file_is_not_opened(run: Path) -> None:
    state, part = (run / "checkpoints/step_00000003" / name for name in ("state.json", "model.safetensors"))
    part.unlink()
    os.mkfifo(part)
    refused(lambda: checkpoint.read_part(part.parent, "model"), "model.safetensors: cannot be read: no such file")
    state.unlink()
    os.mkfifo(state)
    refused(lambda: checkpoint.read_state(state.parent), "state.json: a pipe")
    assert checkpoint.latest(run) == place(run / "checkpoints/step_00000002")


def test_an_undefined_metric_is_read_back(run: Path) -> None:
    edit(run / "checkpoints/step_00000003/state.json", lambda s: s.update(metrics={"a": float("nan"), "b": 1}))
    metrics = checkpoint.read_state(run / "checkpoints/step_00000003").metrics
    assert math.isnan(metrics["a"]) and metrics["b"] == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("[]", r"best.json: \[\]; expected keys"),
        ("{}", "best.json: no key 'checkpoint' among none"),
        ("\x00", "best.json: "),
        (lambda b: b.update(checkpoint=["x"]), r"checkpoint \['x'\]; expected a name such as step_00000100"),
        (lambda b: b.update(checkpoint="../../../step_00000001"), "expected a name such as"),
        (lambda b: b.update(checkpoint="step_00000001/.."), "expected a name such as"),
        (lambda b: b.update(value="best"), "value: 'best'; expected a finite number"),
        (lambda b: b.update(ranking={}), "ranking: {}; expected a list"),
        (lambda b: b.update(ranking=[None]), "best.json: None; expected keys"),
        (lambda b: b.update(checkpoint="step_00000099"), "its best.json names step_00000099, which is not there"),
    ],
)
def test_a_broken_best_json_is_named_where_it_is_asked(run: Path, change: Any, words: str) -> None:
    edit(run / "checkpoints/best.json", change)
    refused(lambda: restore(run, device=CPU, best=True), words)
    assert checkpoint.find(run).name == "step_00000003"
    if "not there" not in words:  # nobody knows which are the best: none is dropped
        checkpoint.prune(run / "checkpoints", 1)
        assert len(list((run / "checkpoints").glob("step_*"))) == 3


def test_best_is_what_was_marked_and_without_a_mark_the_newest(run: Path) -> None:
    ranked = checkpoint.ranking(run / "checkpoints")
    values = {
        name: checkpoint.read_state(run / "checkpoints" / name).metrics["seg_miou"]
        for name in (f"step_{k:08d}" for k in (1, 2, 3))
    }
    assert len(ranked) == 2 and all(r.value == values[r.checkpoint] for r in ranked)
    assert ranked[0].value == max(values.values())
    assert checkpoint.find(run, best=True).name == ranked[0].checkpoint
    (run / "checkpoints/best.json").unlink()
    assert checkpoint.find(run, best=True).name == "step_00000003"


def test_a_run_that_was_lost_while_its_storage_was_away_writes_no_more(tmp_path: Path) -> None:
    """Another driver has taken it over meanwhile: the next try is not made."""
    tries = []

    def check() -> None:
        tries.append(1)
        if len(tries) > 1:
            raise LostError("another driver has taken it over")

    (tmp_path / "checkpoints").write_text("in the way")
    keeper = CheckpointWriter(
        tmp_path,
        mirror=None,
        config={},
        class_names=("a",),
        objective="m",
        keep=1,
        keep_best=1,
        patience_s=300.0,
        log=lambda text: (tmp_path / "checkpoints").unlink(),  # it is back
        check=check,
    )
    keeper.submit(Snapshot(1, {"m": 0.5, "step": 1}, {"model": {"x": torch.ones(1)}}))
    with pytest.raises(LostError, match="another driver has taken it over"):
        keeper.flush()
    keeper.close()
    assert len(tries) == 2 and not (tmp_path / "checkpoints").exists()


def test_a_ranking_that_cannot_be_read_begins_anew(tmp_path: Path) -> None:
    said: list[str] = []
    common: dict[str, Any] = {
        "mirror": None,
        "config": {},
        "class_names": ("a",),
        "keep": 1,
        "keep_best": 1,
        "patience_s": 5.0,
    }
    keeper = CheckpointWriter(tmp_path, objective="m", log=said.append, **common)
    for step, value in ((1, 0.5), (2, 0.4), (3, float("nan"))):
        keeper.submit(Snapshot(step, {"m": value, "step": step}, {"model": {"x": torch.ones(1)}}))
        keeper.flush()
        if step == 1:
            (tmp_path / "checkpoints/best.json").write_text("[]")
    keeper.close()
    assert checkpoint.ranking(tmp_path / "checkpoints") == [checkpoint.Ranked("step_00000002", 0.4)]
    assert len(said) == 1 and "the ranking begins anew" in said[0]


# ---- tensors ---------------------------------------------------------------------------------------


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda t: t.pop(next(k for k in t if name in k))


def change(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], Any]:
    def apply(tensors: dict[str, Any]) -> None:
        key = next(k for k in tensors if name in k)
        tensors[key] = how(tensors[key])

    return apply


@pytest.mark.parametrize(
    ("part", "spoil", "words"),
    [
        ("model", change("weight", torch.Tensor.int), r"tensor '.*weight' holds torch.int32; expected torch.float32"),
        ("model", change("weight", lambda t: t[None]), "has shape .*; expected"),
        ("model", drop("weight"), "tensor '.*' is missing: the checkpoint is of another configuration"),
        ("model", lambda t: t.update({"x\x1b[31m": torch.ones(1)}), r"tensor 'x.*' is unexpected"),
        ("prototypes", drop(""), "is missing"),
        ("optimizer", drop("exp_avg_sq/"), "no optimizer state 'exp_avg_sq/.*'; it is damaged"),
        ("optimizer", change("exp_avg/", lambda t: t[:1]), "optimizer state 'exp_avg/.*' has shape"),
        ("optimizer", change("step/", torch.Tensor.int), "optimizer state 'step/.*' holds torch.int32"),
        ("optimizer", lambda t: t.update({"sum/x": torch.ones(1)}), "optimizer state 'sum/x', which this network"),
        ("random", drop("torch"), "no random state 'torch'"),
        (
            "random",
            change("torch", torch.Tensor.float),
            "random state 'torch' holds torch.float32; expected torch.uint8",
        ),
        ("random", change("torch", lambda t: t[:9]), "random state 'torch' has shape"),
        ("random", change("torch", lambda t: t * 0 + 255), "a random state that cannot be"),
    ],
)
def test_tensors_that_do_not_fit_are_named(run: Path, shards: Path, part: str, spoil: Any, words: str) -> None:
    file = run / f"checkpoints/step_00000003/{part}.safetensors"
    tensors = load_file(file)
    spoil(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    before = torch.get_rng_state()
    refused(lambda: Trainer(CFG, shards=shards, out=None, resume_from=run, quiet=True, device="cpu"), words)
    torch.set_rng_state(before)


# ---- the run's folder ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "^[^:]*config.yaml: is empty; expected keys and values"),
        ("# nothing\n", "config.yaml: is empty"),
        ("{}\n", "config.yaml: is empty; expected the configuration that the run was started with"),
        ("- 1\n", r"config.yaml: expected keys and values at the top level, found \[1\]"),
        ("a: &a [*a]\n", "config.yaml: .*alias"),
        ("train: {steps: [", "config.yaml: line 1"),
        ("\xff", "config.yaml: .*expected keys"),
    ],
)
def test_a_broken_configuration_of_a_run_is_refused(run: Path, text: str, words: str) -> None:
    (run / "config.yaml").write_text(text)
    refused(lambda: stored_config(place(run)), words, ConfigError)
    (run / "config.yaml").unlink()
    os.mkfifo(run / "config.yaml")
    refused(lambda: stored_config(place(run)), "config.yaml: a pipe", ConfigError)


LINES = [
    b'{"step": 1, "total": 0.5}',
    b'{"step": 2, "total": NaN}',  # as Python writes it
    b'{"eval": 2, "ids": ["a"]}',
    b"[]",
    b'{"step": "two"}',
    b"[" * 3000,
    b"\xff\xfe",
    b'{"step": 3}',
    b'{"step": 1, "tot',
]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    folders = []

    def open_(done: int) -> Path:
        folder = RunFolder(
            place(tmp_path / "run"), CFG, class_names=("a",), objective="m", data="d", say=lambda text: None
        )
        folders.append(folder)
        folder.open(done)
        return tmp_path / "run"

    yield open_
    for folder in folders:
        folder.close()


def test_of_a_log_the_lines_up_to_a_step_stay(opened: Callable[[int], Path]) -> None:
    log = opened(0) / "metrics.jsonl"
    log.write_bytes(b"\n".join(LINES))
    opened(2)
    assert log.read_bytes().splitlines() == LINES[:3] and log.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_run_that_dies_while_it_opens_its_folder_leaves_what_was_there(
    opened: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out = opened(0)
    (out / "metrics.jsonl").write_bytes(LINES[0] + b"\n" + LINES[7] + b"\n")
    before = {n: (out / n).read_bytes() for n in ("config.yaml", "metrics.jsonl")}
    replace = os.replace

    def dying(a: Any, b: Any) -> None:
        if Path(b).name == name:
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        opened(1)
    assert {n: (out / n).read_bytes() for n in before} == before
    monkeypatch.undo()
    opened(1)
    assert (out / "metrics.jsonl").read_bytes() == LINES[0] + b"\n"


def test_a_stop_at_a_save_writes_one_checkpoint(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(RunFolder, "submit", lambda self, make: made.append(make().step))
    cfg = build(tiny_tree(steps=4, eval_every=2))
    with pytest.raises(Interrupted):
        Trainer(cfg, shards=shards, out=tmp_path, quiet=True, hooks=Hooks(stop=lambda: bool(made))).fit()
    assert made == [2]


def test_a_checkpoint_stays_until_its_successor_of_the_same_step_is_whole(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run / "checkpoints"
    before = (folder / "step_00000003" / "state.json").read_bytes()
    replace = os.replace

    def killed(old: Path, new: Path) -> None:
        if str(old).endswith("step_00000003.tmp"):
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, 3, config={}, class_names=(), metrics={}, parts={})
    monkeypatch.undo()
    checkpoint.sweep(folder)
    assert (folder / "step_00000003" / "state.json").read_bytes() == before
    assert not list(folder.glob(".step*"))
