"""Damaged files of COCO, of shards and of runs: a reader answers, or refuses in one short printable line.

As :mod:`tests.test_fuzz_data`, whose inputs these are; ``UGRL_FUZZ`` counts here, too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from tests.test_fuzz_data import damaged, fuzzed, refused
from tests.tiny import tiny_tree
from ugrl import config
from ugrl.data.coco import CocoSource
from ugrl.data.coco_masks import spans
from ugrl.data.prepare import prepare
from ugrl.data.reader import ShardReader
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.data.shards import Manifest, ShardInfo, SplitInfo, _column
from ugrl.errors import UgrlError
from ugrl.storage import place
from ugrl.train import checkpoint
from ugrl.train.run import stored_config

ODD: list[Any] = [
    *(None, True, False, [], {}, "", "1", " 2 ", "x\x1b[31m\n", "../../x", "/dev/zero", "[/b]", "k" * 20_000),
    *(-1, 0, 1, 2, 254, 2**31, 2**63, 10**400, 0.5, -1e19, 3e8, 1e308, float("inf"), float("nan")),
    *([[]], [None], [1, [2]], {"a": {}}, {"size": [20, 30], "counts": "o"}, {"image_id": 1, "category_id": 1}),
]


@st.composite
def edited(draw: Any, tree: Any) -> bytes:
    """A sound tree of which some values, at any depth, are other ones, gone or there twice; as JSON."""
    made = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 4))):
        at = made
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and at[key] and draw(st.booleans()):
                at = at[key]
                continue
            what = draw(st.sampled_from(["set", "set", "drop", "double"]))
            if what == "set":
                at[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
            elif what == "drop":
                del at[key]
            elif isinstance(at, list):
                at.append(copy.deepcopy(at[key]))
            break
    return json.dumps(made).encode()


def files(tree: Any) -> st.SearchStrategy[bytes]:
    """Edited as a tree, or damaged as bytes."""
    return st.one_of(edited(tree), damaged([json.dumps(tree, indent=1).encode()]))


# ---- COCO ------------------------------------------------------------------------------------------

SQUARE = [2.0, 2.0, 10.0, 2.0, 10.0, 10.0, 2.0, 10.0]
SHAPES = [[SQUARE], {"size": [20, 30], "counts": [100, 40, 460]}, {"size": [20, 30], "counts": "T3X1\\>"}, []]
COCO = {
    "images": [{"id": k, "file_name": f"{k}.jpg", "width": 30, "height": 20} for k in (1, 2, 3, 4)],
    "annotations": [
        {"id": k, "image_id": k, "category_id": 7, "iscrowd": k % 2, "segmentation": shape}
        for k, shape in enumerate(SHAPES, start=1)
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(COCO))
    for k in (1, 2, 3, 4):
        Image.new("RGB", (30, 20)).save(root / "train2017" / f"{k}.jpg")
    return root


@fuzzed
@given(data=files(COCO))
def test_coco_files(coco: Path, data: bytes) -> None:
    (coco / "annotations" / "instances_train2017.json").write_bytes(data)

    def read() -> None:
        source = CocoSource(coco)
        for id in source.splits()["train"]:
            source.tags("train", id)
            refused(lambda id=id: source.row("train", id))

    refused(read)


counts = st.one_of(
    st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=40),
    st.lists(st.one_of(st.integers(-5, 400), st.sampled_from(ODD)), max_size=6),
    st.sampled_from(["o" * 500, "~" * 5000, [0] * 5000, [2**62, 2**62, -(2**63)]]),
)
number = st.one_of(st.floats(), st.floats(-100, 100), st.integers(), st.sampled_from([1e7, -1e7, 5e6]))


@fuzzed
@given(
    shape=st.one_of(
        st.fixed_dictionaries({"size": st.sampled_from([[20, 30], [[20], 30], 7, None]), "counts": counts}),
        st.lists(st.lists(number, max_size=14), max_size=3),
        st.sampled_from(ODD),
    )
)
def test_segmentations(shape: Any) -> None:
    try:
        for start, inside in spans(shape, 20, 30):
            assert inside.dtype == bool and 0 <= start <= start + len(inside) <= 600
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 200


# ---- shards ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fuzz") / "out"
    prepare(ShapesSource(ShapesSpec(train=9, val=1, size=32)), out, tune_val=0)
    return out


@fuzzed
@given(data=st.data())
def test_manifests(shards: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = shards / "manifest.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(files(json.loads(whole))))
        refused(lambda: Manifest.load(shards).ids("train"))
    finally:
        path.write_bytes(whole)


@fuzzed
@given(data=st.data())
def test_shards(shards: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any bytes of a shard, its footer and page headers above all, are other ones."""
    whole = (shards / "train-00000.parquet").read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.sampled_from([0, 0, len(whole) - footer, len(whole) - footer]))
        at = data.draw(st.integers(begin, min(begin + footer, len(whole) - 1)))
        piece = data.draw(st.one_of(st.binary(min_size=1, max_size=6), st.sampled_from([b"\xff" * 9, b"\x00" * 9])))
        broken[at : at + len(piece)] = piece
    folder = tmp_path_factory.getbasetemp() / "broken"
    folder.mkdir(exist_ok=True)
    file = folder / "train-00000.parquet"
    file.unlink(missing_ok=True)  # readers of the one before may have it mapped
    file.write_bytes(broken)
    info = ShardInfo(file.name, 9, len(broken), "0" * 64)
    manifest = Manifest(folder, "shapes", {}, tuple("abcdef"), {"train": SplitInfo(9, 9, (info,))})
    _column.cache_clear()
    refused(lambda: manifest.ids("train"))
    refused(lambda: manifest.tags("train"))
    reader = ShardReader(manifest, "train")
    for k in range(9):
        refused(lambda k=k: reader[k])


# ---- runs ------------------------------------------------------------------------------------------

CONFIG = config.to_dict(config.build(tiny_tree()))
STATE = {
    "format": 1,
    "step": 100,
    "class_names": ["cat", "dog"],
    "metrics": {"seg_miou": 0.5, "step": 100.0},
    "data": "0123456789abcdef",
    "config": CONFIG,
}
BEST = {
    "checkpoint": "step_00000100",
    "objective": "seg_miou",
    "value": 0.5,
    "ranking": [{"checkpoint": "step_00000100", "value": 0.5}, {"checkpoint": "step_00000050", "value": 0.4}],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fuzz") / "run"
    (out / "checkpoints" / "step_00000100").mkdir(parents=True)
    return out


def outcome(action: Callable[[], object]) -> None:
    refused(action, UgrlError)


@fuzzed
@given(data=files(STATE))
def test_states(run: Path, data: bytes) -> None:
    (run / "checkpoints" / "step_00000100" / "state.json").write_bytes(data)
    outcome(lambda: checkpoint.read_state(checkpoint.find(run)))


@fuzzed
@given(data=files(BEST))
def test_marks_of_the_best(run: Path, data: bytes) -> None:
    (run / "checkpoints" / "step_00000100" / "state.json").write_text(json.dumps(STATE))
    (run / "checkpoints" / "best.json").write_bytes(data)
    outcome(lambda: checkpoint.find(run, best=True).relative_to(run / "checkpoints"))


@fuzzed
@given(data=st.one_of(edited(CONFIG), damaged([yaml.safe_dump(CONFIG, sort_keys=False).encode()])))
def test_configurations_of_runs(run: Path, data: bytes) -> None:
    (run / "config.yaml").write_bytes(data)
    outcome(lambda: stored_config(place(run)))


WHOLE = save({"weight": torch.ones(3, 4), "bias": torch.zeros(3)})


@fuzzed
@given(data=damaged([WHOLE]))
def test_tensors(run: Path, data: bytes) -> None:
    folder = run / "checkpoints" / "step_00000100"
    (folder / "model.safetensors").write_bytes(data)
    module = torch.nn.Linear(4, 3)
    outcome(lambda: checkpoint.load_module(module, checkpoint.read_part(folder, "model"), folder))
    assert np.isfinite(module.weight.shape).all()
