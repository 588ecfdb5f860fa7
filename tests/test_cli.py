"""The surface of the command lines, and what bad input gets."""

from __future__ import annotations

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
from ugrl.train.loop import Trainer


def options(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]*", text))


def test_the_surface_is_what_the_readme_says() -> None:
    """Adding or dropping an option is a decision: this list is its record."""
    parser = build_parser()
    commands = parser._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert set(commands) == {"prepare", "check", "eval", "predict"}
    common = {"--help", "--best", "--scales", "--mirror", "--crf", "--device"}
    assert options(commands["eval"].format_help()) == common | {"--data", "--split", "--refined-cam"}
    assert options(commands["predict"].format_help()) == common | {"--out"}
    assert {"--root", "--out", "--on-error", "--tune-val", "--keep-unannotated", "--labels"} <= options(
        commands["prepare"].format_help()
    )


def test_a_bare_run_names_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for name in ("prepare", "eval", "predict", "ugrl-train", "ugrl-tune"):
        assert name in text


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    tree = tiny_tree(steps=2, cls_warmup_iters=1, lr_warmup_iters=1)
    Trainer(build(tree), shards=shards, out=out, quiet=True, device="cpu").fit()
    return out


def test_eval_prints_the_table_of_the_last_validation(
    trained: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(trained), "--data", str(shards), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    line = [s for s in (trained / "metrics.jsonl").read_text().splitlines() if "val/seg_miou" in s][-1]
    wanted = float(re.search(r'"val/seg_miou": ([0-9.e-]+)', line).group(1))  # type: ignore[union-attr]
    assert re.search(rf"seg_miou\W+{100 * wanted:.1f}\b", text)
    assert "background" in text
    assert (
        main(["eval", str(trained), "--data", str(shards), "--split", "tune_val", "--mirror", "--device", "cpu"]) == 0
    )


def test_predict_writes_palette_masks_of_any_size(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for name, (w, h) in {"a": (61, 47), "b": (20, 90), "c": (7, 5)}.items():
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(folder / f"{name}.jpg")
    grey = tmp_path / "grey.png"
    Image.fromarray(rng.integers(0, 255, (33, 50), dtype=np.uint8)).save(grey)
    out = tmp_path / "masks"
    assert main(["predict", str(trained), str(folder), str(grey), "--out", str(out), "--device", "cpu"]) == 0
    sizes = {"a": (61, 47), "b": (20, 90), "c": (7, 5), "grey": (50, 33)}
    for name, size in sizes.items():
        with Image.open(out / f"{name}.png") as mask:
            assert mask.mode == "P"
            assert mask.size == size
            assert int(np.asarray(mask).max()) <= 6
            assert mask.getpalette()[3:6] == [128, 0, 0]
    assert len(list(out.iterdir())) == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["predict", "{run}", "{tmp}/none.jpg", "--out", "{tmp}/m"], "no such image"),
        (["predict", "{run}", "{tmp}/empty", "--out", "{tmp}/m"], "no image in this folder"),
        (["predict", "{run}", "{tmp}/text.jpg", "--out", "{tmp}/m"], "text.jpg: cannot be decoded"),
        (["predict", "{tmp}/empty", "{tmp}/text.jpg", "--out", "{tmp}/m"], "no checkpoint there"),
        (["eval", "{run}", "--data", "{tmp}/empty"], "manifest"),
        (["eval", "{run}", "--data", "{shards}", "--split", "vall"], "vall"),
    ],
)
def test_bad_input_is_one_line_and_a_status(
    argv: list[str], message: str, trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    filled = [a.format(run=trained, tmp=tmp_path, shards=shards) for a in argv]
    assert main(filled) == 2
    err = capsys.readouterr().err.strip().splitlines()
    lines = [s for s in err if s.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_the_script_exits_with_the_status(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ugrl.cli", "eval", str(tmp_path), "--data", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
