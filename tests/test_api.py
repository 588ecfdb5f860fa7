"""The public interface: what it offers, what its examples say, and parts of the method in other people's loops."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ugrl
from tests.tiny import tiny_tree
from ugrl import api, config
from ugrl.errors import CheckpointError, ConfigError, DataError
from ugrl.predict.model import Model
from ugrl.predict.prediction import Prediction

ROOT = Path(__file__).parents[1]
# Adding, dropping or renaming one of these is a decision; this list is its record.
PUBLIC = {
    *("load", "prepare", "train", "tune", "Run", "Model", "Prediction", "Config", "UgrlError"),
    *("UGRLNet", "make_backbone", "load_weights", "Prototypes", "PAR", "multi_scale_cam", "class_positions"),
    *("class_vectors", "pseudo_labels", "refine_labels", "reliable_pool", "modulation_weights"),
    *("classification_loss", "segmentation_loss", "affinity_loss", "contrastive_loss"),
}


def test_the_interface_is_frozen() -> None:
    assert set(ugrl.__all__) == PUBLIC and len(ugrl.__all__) == len(PUBLIC) and set(dir(ugrl)) >= PUBLIC
    for name in ugrl.__all__:
        found = getattr(ugrl, name)
        assert callable(found) and (inspect.getdoc(found) or "").strip(), name
    with pytest.raises(AttributeError, match="module 'ugrl' has no attribute 'laod'"):
        ugrl.laod  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "ugrl/__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {a.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert seen == {**ugrl._HOMES, "train": "ugrl.api"}


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (api.load, "where best device"),
        (api.prepare, "root out source tune_val on_error seed reuse quiet teacher options"),
        (api.train, "config overrides data out resume device quiet"),
        (api.tune, "space overrides options"),
        (Model.predict, "self images scales mirror crf tile overlap batch palette on_error protocol tag_prior"),
        (Prediction.overlay, "self alpha legend palette"),
        (Prediction.save, "self path"),
        (Prediction.to_coco, "self image_id first_id"),
    ],
)
def test_arguments_are_frozen(function: object, parameters: str) -> None:
    assert list(inspect.signature(function).parameters) == parameters.split()


LIGHT = """
import sys, ugrl
assert [m for m in sys.modules if m.startswith("ugrl")] == ["ugrl"], "import ugrl imports nothing else"
assert "train" in dir(ugrl) and callable(ugrl.train)
heavy = {"torch", "numpy", "ray", "optuna", "pyarrow", "rich", "timm"} & set(sys.modules)
assert not heavy, heavy
import ugrl.train.loop, ugrl.predict.model
assert callable(ugrl.train) and ugrl.train.loop.Trainer, "a package and a function"
assert not {"ray", "optuna", "cluster", "tuning"} & set(sys.modules)
for name in ugrl.__all__:
    getattr(ugrl, name)
assert not {"ray", "optuna", "cluster", "tuning"} & set(sys.modules)
for absent in ("ray", "optuna"):
    for name in [m for m in sys.modules if m.split(".")[0] == "tuning"]:
        del sys.modules[name]
    sys.modules[absent] = None
    try:
        ugrl.tune("shapes", out="search")
    except ugrl.UgrlError as error:
        assert f"needs the package '{absent}'" in str(error), error
    else:
        raise AssertionError(absent)
    del sys.modules[absent]
print("light")
"""


def test_nothing_is_imported_before_it_is_used(tmp_path: Path) -> None:
    words = [sys.executable, "-c", LIGHT]
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout == "light\n", done.stderr


# -- the examples ---------------------------------------------------------------------------------


def photographs(root: Path) -> Path:
    """Twenty-four tagged pictures of 64 px, in which the tag is the colour of a square."""
    (root / "images").mkdir(parents=True)
    rows = ["file,split,tags"]
    for k in range(24):
        rng = np.random.default_rng(k)
        pixels = rng.integers(90, 130, (64, 64, 3), dtype=np.uint8)
        top, left = rng.integers(4, 34, 2)
        pixels[top : top + 24, left : left + 24] = (200, 60, 40) if k % 2 else (40, 80, 210)
        name = f"{chr(97 + k)}.jpg"
        Image.fromarray(pixels).save(root / "images" / name, quality=95)
        rows.append(f"{name},{'val' if k >= 20 else 'train'},{'red' if k % 2 else 'blue'}")
    (root / "tags.csv").write_text("\n".join(rows) + "\n")
    return root


def examples(*objects: object) -> list[str]:
    """The indented blocks after ``Example::`` in docstrings."""
    found = []
    for thing in objects:
        for block in re.findall(r"Example::\n\n((?:    .*\n|\n)+)", (inspect.getdoc(thing) or "") + "\n"):
            found.append(textwrap.dedent(block))
    return found


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of a first session, in one namespace, in a folder with photographs."""
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "photos")
    blocks = examples(api.prepare, api.train, api.load, Model.predict, Prediction)
    assert len(blocks) == 5
    names = {"ugrl": ugrl}
    for block in blocks:
        exec(compile(block, "example", "exec"), names)
    run = names["run"]
    assert run.path == str(tmp_path / "run") and run.objective == "tag_map" and 0 < run.metrics["tag_map"] <= 1
    assert run.best == pytest.approx(max(run.metrics["tag_map"], run.best))
    assert {p.name for p in tmp_path.iterdir()} == {"photos", "shards", "run", "masks", "mask.png", "look.jpg"}
    assert (tmp_path / "photos" / "shards" / "manifest.json").is_file()
    (one, again) = names["many"]
    assert (one.mask == again.mask).all() and names["annotations"] == names["prediction"].to_coco()
    with Image.open("mask.png") as mask:
        assert (np.asarray(mask) == names["prediction"].mask).all()

    # What exists is not taken for what was asked for.
    with pytest.raises(DataError, match="is prepared already; reuse=True"):
        ugrl.prepare("photos")
    assert ugrl.prepare("photos", reuse=True) == Path("photos/shards")
    with pytest.raises(ConfigError, match="exists already"):
        ugrl.train("own", data="shards", out="run")
    longer = ugrl.train("own", {"train.steps": 10}, data="photos/shards", out="run", resume=True, quiet=True)
    assert longer.metrics == pytest.approx(run.metrics) and ugrl.load(longer).step == 10
    where = f"{tmp_path}/run/checkpoints/step_00000010"
    assert repr(ugrl.load("run")) == f"Model({where}: timm/tf_efficientnet_lite0, 2 classes, step 10)"


def test_a_configuration_is_taken_in_any_form(shards: Path, tmp_path: Path) -> None:
    tree = tiny_tree(steps=2, cls_warmup_iters=1, lr_warmup_iters=1)
    found = []
    for k, form in enumerate((tree, config.build(tree))):
        run = ugrl.train(form, {"seed": 3}, data=shards, out=tmp_path / str(k), device="cpu", quiet=True)
        found.append(run.load(device="cpu"))
        assert found[-1].config.seed == 3
    assert found[0].fingerprint == found[1].fingerprint


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: ugrl.load("nowhere"), CheckpointError, "no checkpoint there"),
        (lambda: ugrl.load("nowhere", device="gpu"), ConfigError, "'gpu' is unknown"),
        (lambda: ugrl.prepare("nowhere"), DataError, "no such folder"),
        (lambda: ugrl.prepare(".", year=2017), DataError, "neither prepared shards"),
        (lambda: ugrl.train("onw"), ConfigError, "did you mean 'own'"),
        (lambda: ugrl.train("own"), ConfigError, "no shards"),
        (lambda: ugrl.train("shapes", {"train.stpes": 3}), ConfigError, "did you mean 'train.steps'"),
        (lambda: ugrl.train("shapes", {"cluster.workers": 2}), ConfigError, "ugrl-train --workers"),
        (lambda: ugrl.train(7), ConfigError, "expected a name, a file, a tree or a Config"),
        (lambda: ugrl.tune("shapes", trails=3), ConfigError, "did you mean 'trials'"),
        (lambda: ugrl.tune("shpaes", out="s"), ConfigError, "did you mean 'shapes'"),
    ],
)
def test_bad_input_is_one_line(
    call: object, kind: type, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=words) as told:
        call()  # type: ignore[operator]
    assert str(told.value).isprintable()


@pytest.mark.ray
def test_a_search_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = {
        "data.crop": 32, "data.shapes.train": 32, "data.shapes.val": 8, "data.shapes.size": 32,
        "train.steps": 4, "train.global_batch": 4, "train.eval_every": 2, "train.lr_warmup_iters": 1,
        "train.cls_warmup_iters": 1, "train.checkpoint_every": 2,
    }  # fmt: skip
    (tmp_path / "space.yaml").write_text(SPACE)
    found = ugrl.tune(tmp_path / "space.yaml", small, out="search", trials=2, concurrent=1, quiet=True)
    assert found.trials == 2 and 0 <= found.value <= 1 and list(found.values) == ["method.uncertainty.alpha"]
    assert found.report.is_file() and config.load(found.best).train.steps == 4
    again = ugrl.tune(tmp_path / "space.yaml", small, out="search", trials=2, resume=True, quiet=True)
    assert again == found


SPACE = """
config: shapes
objective: seg_miou
split: tune_val
final: {best: 0}
trials: 2
search:
  method.uncertainty.alpha: {loguniform: [1, 50]}
"""
