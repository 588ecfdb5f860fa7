"""The surface of the command lines, and what bad input gets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny import tiny_tree
from ugrl.cli import build_parser, main
from ugrl.config import build
from ugrl.train import checkpoint
from ugrl.train.loop import Trainer


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def test_the_surface_is_what_the_readme_says() -> None:
    """Adding or dropping an option is a decision: this list is its record."""
    parser = build_parser()
    commands = parser._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert set(commands) == {"prepare", "check", "eval", "predict", "view", "figures", "export"}
    looking = {"--help", "--version", "--best", "--device", "--data", "--split", "--limit", "--palette", "--out"}
    assert options(commands["view"].format_help()) == looking | {"--size", "--embed", "--serve", "--port"}
    assert options(commands["figures"].format_help()) == looking | {"--images"}
    common = {"--help", "--version", "--best", "--scales", "--mirror", "--tag-prior", "--crf", "--device"}
    measured = {"--data", "--split", "--list", "--what", "--refined-cam", "--threshold", "--threshold-from"}
    measured |= {"--protocol", "--set", "--out", "--json", "--masks", "--compare"}
    assert options(commands["eval"].format_help()) == common | measured
    own = {"--out", "--batch", "--tile", "--overlap", "--palette", "--overlay", "--cam", "--uncertainty", "--export"}
    assert options(commands["predict"].format_help()) == common | own | {"--on-error", "--protocol"}
    exported = {"--help", "--version", "--best", "--to", "--out", "--size", "--images", "--data"} | {
        "--split",
        "--device",
    }
    assert options(commands["export"].format_help()) == exported
    assert {"--root", "--out", "--on-error", "--tune-val", "--keep-unannotated", "--labels", "--teacher"} <= options(
        commands["prepare"].format_help()
    )
    for command in commands.values():
        assert "examples:" in command.format_help() and "exit status:" in command.format_help()


def test_a_bare_run_names_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for name in ("prepare", "eval", "predict", "export", "ugrl-train", "ugrl-tune"):
        assert name in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "--config", "voc"], "error: ugrl train is a command of its own: ugrl-train --config voc"),
        (["tune", "--out", "a b"], "error: ugrl tune is a command of its own: ugrl-tune --out 'a b'"),
        (["report", "runs/x"], "error: ugrl report is a command of its own: ugrl-tune report runs/x"),
    ],
)
def test_what_is_elsewhere_is_pointed_to(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == line + "\n"


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    tree = tiny_tree(steps=2, cls_warmup_iters=1, lr_warmup_iters=1, checkpoint_every=1, eval_every=1)
    Trainer(build(tree), shards=shards, out=out, quiet=True, device="cpu").fit()
    checkpoint.write_json(out / "checkpoints/best.json", {"checkpoint": "step_00000001", "value": 1.0})
    return out


def test_eval_prints_the_table_of_the_last_validation(
    trained: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(trained), "--data", str(shards), "--device", "cpu"]
    assert main(words) == 0
    text, told = capsys.readouterr()
    assert "checkpoint: step_00000002, the newest; --best takes step_00000001; split 'val': 16 images\n" in told
    assert "16/16 images (100 %)" in told
    logged = [json.loads(s) for s in (trained / "metrics.jsonl").read_text().splitlines()]
    wanted = {line["step"]: line for line in logged if "val/seg_miou" in line}
    assert re.search(rf"seg_miou\W+{100 * wanted[2]['val/seg_miou']:.1f}\b", text)
    assert "background" in text

    assert main([*words, "--best", "--json"]) == 0
    text, told = capsys.readouterr()
    assert "checkpoint: step_00000001, the best; split" in told
    found = json.loads(text)
    assert (found["step"], found["split"], found["images"], found["data"]) == (1, "val", 16, str(shards))
    assert found["metrics"]["seg_miou"] == pytest.approx(wanted[1]["val/seg_miou"])
    assert set(found["classes"]["seg_iou"]) == {
        "background",
        *checkpoint.read_state(checkpoint.find(trained)).class_names,
    }


def draw(path: Path, size: tuple[int, int] = (40, 36), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)).save(path)
    return path


def test_predict_writes_palette_masks_of_any_size(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    sizes = {"a": (61, 47), "b": (20, 90), "c": (7, 5)}
    for name, size in sizes.items():
        draw(folder / f"{name}.jpg", size)
    (folder / "d.png").write_text("no image")
    (folder / "e.png").symlink_to(tmp_path / "nowhere.png")
    grey = draw(tmp_path / "grey.png", (50, 33), "L")
    out = tmp_path / "masks"
    words = ["predict", str(trained), str(folder), str(grey), str(grey), "--out", str(out), "--device", "cpu"]
    for _ in range(2):  # its own masks are written anew
        assert main(words) == 2
        text, told = capsys.readouterr()
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        assert [Path(line.split(": ")[1]).name for line in errors] == ["d.png", "e.png"]
        assert "2 of 6 images could not be used" in told and "--best takes step_00000001" in told
        assert len(text.splitlines()) == 4
    assert {p.name for p in out.iterdir()} == {"a.png", "b.png", "c.png", "grey.png"}
    for name, size in {**sizes, "grey": (50, 33)}.items():
        with Image.open(out / f"{name}.png") as mask:
            assert mask.mode == "P" and mask.size == size
            assert int(np.asarray(mask).max()) <= 6
            assert mask.getpalette()[3:6] == [128, 0, 0]


@pytest.mark.parametrize("how", ["same folder", "linked folder", "linked image", "hard link", "another's mask"])
def test_predict_leaves_everybodys_files_alone(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded: there is no such run."""
    monkeypatch.chdir(tmp_path)
    photo, out = draw(Path("photos/a.png")), Path("masks")
    if how == "same folder":
        out = Path("photos/../photos")
    elif how == "linked folder":
        out.symlink_to("photos")
    else:
        out.mkdir()
        if how == "linked image":
            (out / "a.png").symlink_to(photo.absolute())
        elif how == "hard link":
            os.link(photo, out / "a.png")
        else:
            draw(out / "a.png", mode="L")
    files = {p: p.read_bytes() for p in (photo, out / "a.png")}
    assert main(["predict", "run", "photos", "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{out / 'a.png'}: " in err and "choose another --out" in err
    assert {p: p.read_bytes() for p in files} == files


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("predict {run} {tmp}/none.jpg --out {tmp}/m", "no such image"),
        ("predict {run} {tmp}/empty --out {tmp}/m", "no image in this folder"),
        ("predict {run} {tmp}/text.jpg --out {tmp}/m", "text.jpg: not "),
        ("predict {run} {tmp}/fifo.png --out {tmp}/m", "fifo.png"),
        ("predict {run} {tmp}/wide.png --out {tmp}/m --scales 8", "wide.png: 2000 × 1000 pixels at scale 8; expected"),
        ("predict {run} {tmp}/wide.png {tmp}/other/wide.jpg --out {tmp}/m", "would both be written as wide.png"),
        ("predict {run} {tmp}/wide.png --out {tmp}/text.jpg", "text.jpg: is a file"),
        ("predict {run} {tmp}/wide.png --out {tmp}/text.jpg/m", "text.jpg is a file"),
        ("predict {run} {tmp}/wide.png --out ", "--out is empty"),
        ("predict {tmp}/empty {tmp}/wide.png --out {tmp}/m", "no checkpoint there"),
        ("predict {run} {tmp}/wide.png --out {tmp}/m --device xyz", "--device 'xyz' is unknown; expected cpu, cuda"),
        ("predict {run} {tmp}/wide.png --out {tmp}/m --device gpu", "--device 'gpu' is unknown; expected cpu, cuda"),
        ("predict {run} {tmp}/wide.png --out {tmp}/m --device cuda:999", "--device cuda:999: "),
        ("eval {run} --data {tmp}/empty", "manifest"),
        ("eval {run} --data {shards} --split vall", "vall"),
    ],
)
def test_bad_input_is_one_line_and_a_status(
    argv: str, message: str, trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    os.mkfifo(tmp_path / "fifo.png")
    Image.new("1", (2000, 1000)).save(tmp_path / "wide.png")
    draw(tmp_path / "other/wide.jpg")
    assert main([a.format(run=trained, tmp=tmp_path, shards=shards) for a in argv.split(" ")]) == 2
    lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("scale", ["nan", "inf", "0", "-1", "1000", "1e400", "x"])
@pytest.mark.parametrize("command", ["eval run --data s", "predict run a.jpg --out m"])
def test_scales_are_refused_by_the_rule_of_the_configuration(
    command: str, scale: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--scales", "1", scale])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"argument --scales: '{scale}' is no scale; expected 0.1 … 8" in err


# Numpy comes with the readers; what takes seconds, or what only a run needs, does not.
LIGHT = """
import contextlib, io, sys
from cluster.cli import main as train
from tuning.cli import main as tune
from ugrl.cli import main as ugrl
calls = [(ugrl, w) for w in (["--help"], ["--version"], ["prepare", "--help"], ["eval", "-h"], ["predict", "-h"],
         ["view", "--help"], ["figures", "-h"], ["export", "-h"], ["evl"], ["train"],
         ["predict", "r", "i", "--out", "m", "--scales", "nan"])]
calls += [(train, w) for w in (["--help"], ["--version"], ["--wrong"], ["--data", "x"], ["--workers", "0"])]
calls += [(tune, w) for w in (["--help"], ["--version"], ["--wrong"], ["report", "--help"], ["--data", ""])]
for main, words in calls:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = main(words)
        except SystemExit as ended:
            status = ended.code or 0
    assert status == (0 if {"--help", "-h", "--version"} & set(words) else 2), (words, status)
    assert len(err.getvalue().splitlines()) == (status == 2), (words, err.getvalue())
    heavy = {"torch", "ray", "optuna", "pyarrow", "scipy", "matplotlib", "timm"} & set(sys.modules)
    assert not heavy, (words, heavy)
print("light")
"""


def test_words_are_answered_before_anything_heavy_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "light\n", done.stderr


def test_the_script_exits_with_the_status(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ugrl.cli", "predict", "r", str(tmp_path), "--out", "m"], capture_output=True
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr and done.stderr.count(b"\n") == 1
