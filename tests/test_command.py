"""The top of every command, and what a run is continued with."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.table import Table

from cluster import cli as train
from tests.tiny import tiny_tree
from tuning.study.store import open_storage
from ugrl import config
from ugrl.command import BAD_INPUT, FAULT, folder_for, guarded, pasted
from ugrl.errors import ConfigError
from ugrl.storage import StorageError, place
from ugrl.terminal import Terminal
from ugrl.train.run import plan_run, stored_config

SECRET = "pa55word"


def raised(error: BaseException) -> int:
    def body() -> int:
        raise error

    return guarded(body)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            ConfigError(f"a\nb \x1b[31m https://me:{SECRET}@host/x"),
            BAD_INPUT,
            r"error: a b \x1b[31m https://***@host/x",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), FAULT, "error: out of memory; the traceback is in "),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), FAULT, "error: out of memory; "),
        (OSError(28, "No space left on device", "/full/x"), 3, "error: /full/x: No space left on device; /full/x: "),
        (RecursionError("deep\n" * 500), FAULT, "error: a fault of the program (RecursionError: deep deep"),
        (
            ValueError(f"s3://key:{SECRET}@b"),
            FAULT,
            "error: a fault of the program (ValueError: s3://***@b); the trace",
        ),
        # A pipe of the program's own, while stdout and stderr are read: no reason to be silent.
        (BrokenPipeError(32, "Broken pipe"), FAULT, "error: Broken pipe; the traceback is in "),
    ],
)
def test_whatever_ends_a_command_is_one_line(
    error: BaseException,
    status: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert raised(error) == status
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1 and len(err) < 500
    logs = list(tmp_path.iterdir())
    assert len(logs) == (status == FAULT)
    for log in logs:
        assert str(log) in err and "Traceback" in log.read_text() and SECRET not in log.read_text()


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import ugrl.command as c; raise SystemExit(c.guarded(lambda: [print(k) for k in range(10**5)] and 0))"
    script = f"{sys.executable} -c {shlex.quote(code)} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.stdout, done.stderr) == ("0\n141\n", "")


def test_text_from_outside_is_text_on_the_terminal() -> None:
    """Also where a caller asks for markup; and a style is still a style."""
    out = io.StringIO()
    console = Terminal(file=out, width=60, force_terminal=True, color_system="standard")
    console.print("cat[/b] :smile: [red]x[/red]\x1b[2J\x07\r\u202e", markup=True, emoji=True, style="bold")
    table = Table("[/head]", title="[/t]\x07")
    table.add_row("[/cell]\x9b31m", style="red")
    console.print(table)
    text = out.getvalue()
    assert text.startswith("\x1b[1mcat[/b] :smile: [red]x[/red]\\x1b[2J\\x07 \\u202e\x1b[0m\n")
    for part in ("[/head]", r"[/t]\x07", r"[/cell]\x9b31m"):
        assert part in text
    assert set(re.findall(r"\x1b(?!\[[\d;]*m)", text)) == set()


# -- what to continue with -------------------------------------------------------------------------


def test_a_printed_command_is_one_for_the_shell_and_holds_no_credentials() -> None:
    words = [
        "ugrl-train",
        "--data",
        f"s3://me:{SECRET}@b/x?region=eu",
        "--out",
        "a b;c",
        f"train.mlflow=https://u:{SECRET}@h",
    ]
    text, note = pasted(words)
    assert shlex.split(text) == [*words[:2], "s3://b/x?region=eu", "--out", "a b;c", "train.mlflow=https://h"]
    assert SECRET not in text and note.startswith("left out of it: the credentials in --data, train.mlflow;")
    assert pasted(["ugrl", "eval", "s3://b/x"]) == ("ugrl eval s3://b/x", "")


class Stopped(KeyboardInterrupt):
    number = 2


def test_continue_with_is_what_was_typed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed line, typed again, plans the run that was interrupted."""
    from ugrl.train import loop

    made: list[loop.Trainer] = []

    def stop(trainer: loop.Trainer) -> None:
        trainer.folder.open(0)
        trainer.folder.close()
        made.append(trainer)
        raise Stopped

    monkeypatch.setattr(loop.Trainer, "fit", stop)
    file = tmp_path / "my config.yaml"
    file.write_text(yaml.safe_dump(tiny_tree(steps=3)))
    typed = [
        "--config",
        str(file),
        "--data",
        str(shards),
        "--out",
        str(tmp_path / "a #1"),
        "--device",
        "cpu",
        "--quiet",
    ]
    assert train.main([*typed, "seed=5", "train.lr=1e-3"]) == 130
    line = capsys.readouterr().err.splitlines()[-1]
    words = shlex.split(line.partition("continue with: ")[2])
    assert words[0] == "ugrl-train" and {"--device", "--quiet", "--resume", "seed=5"} <= set(words)
    assert train.main(words[1:]) == 130
    first, second = made
    assert second.cfg == first.cfg and second.quiet and str(second.folder.home) == str(first.folder.home)

    again = ["--out", str(tmp_path / "a #1"), "--resume"]  # what the run was started with is in its folder
    assert train.main(again) == 130
    words = shlex.split(capsys.readouterr().err.splitlines()[-1].partition("continue with: ")[2])
    assert words == ["ugrl-train", *again]


def test_each_problem_of_a_configuration_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", "shapes", "train.stpes=3", "train.steps=0", "name=a/b"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: shapes.yaml: unknown config key 'train.stpes'; did you mean 'train.steps'?",
        "error: shapes.yaml: config key 'train.steps' is 0; expected ≥ 1",
        "error: shapes.yaml: config key name is 'a/b'; expected a name that a folder can have",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--data {shards}", "--config is missing, which says what is trained on it; shipped: "),
        ("data.shards={shards}", "--config is missing"),
        ("--config shapes --data ", "--data is empty"),
        ("--config shapes --out=", "--out is empty"),
        ("--config shapes --data s3:///x", "names no bucket"),
        ("--config shapes --workers 2 --device cpu --data {shards}", "--device cpu: is for one process"),
        ("--config nowhere/shapes.yaml", "no file 'nowhere/shapes.yaml', and no shipped one"),
        ("--config shapes --device gpu", "--device 'gpu' is unknown"),
        ("--config shapes --out {tmp}/file", "is a file; expected a folder"),
        ("--config shapes --out s3://[x", "no URI"),
        ("--config shapes --out s3://b/a#1", "write %23"),
        ("--config {tmp}/empty.yaml --data {shards}", "empty.yaml: is empty; expected keys and values"),
        ("--config {tmp} --data {shards}", "folder"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    words: str, said: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert train.main([w.format(shards=shards, tmp=tmp_path) for w in words.split(" ")]) == BAD_INPUT
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not Path("runs").exists()


# -- credentials -----------------------------------------------------------------------------------


def test_credentials_reach_no_file_and_no_output(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A tiny run that reports to a server which is not there; its folder, and all that was printed."""
    pytest.importorskip("mlflow", reason="MLflow is optional: pip install mlflow-skinny")
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_tree(steps=1, lr_warmup_iters=0, cls_warmup_iters=0)))
    out = tmp_path / "run"
    words = ["--config", str(file), "--data", str(shards), "--out", str(out), "--device", "cpu"]
    server = f"train.mlflow=http://me:{SECRET}@127.0.0.1:9"
    keys = [server, f"cluster.storage=s3://key:{SECRET}@bucket/x?secret_key={SECRET}"]
    assert train.main([*words, *keys]) == 0
    said = capfd.readouterr()
    assert "127.0.0.1:9" in said.err and SECRET not in said.out + said.err
    files = [p for p in out.rglob("*") if p.is_file()]
    assert {"config.yaml", "state.json"} <= {p.name for p in files}
    assert [p for p in files if SECRET.encode() in p.read_bytes()] == []

    assert stored_config(place(out)).train.mlflow == "http://***@127.0.0.1:9"
    resumed = ["--out", str(out), "--resume", "--quiet", "--device", "cpu"]
    assert train.main(resumed) == BAD_INPUT
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "credentials are not written down; give it again, train.mlflow=…" in err
    assert train.main([*resumed, "train.mlflow=null"]) == 0


# -- folders of any name ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a?b#c%20d", "a b:c;d{e}", "ä'\"&=[b]"])
def test_folders_of_any_name_serve(name: str, shards: Path, tmp_path: Path) -> None:
    out = folder_for(tmp_path / name)
    plan = plan_run(config.build(tiny_tree()), data=shards, out=out, resume=False)
    assert str(plan.out) == plan.out.public == str(out)
    for storage in ("journal", "sqlite:///study.db"):
        out.mkdir(exist_ok=True)
        assert open_storage(storage, out).get_all_studies() == []
    assert {"study.db"} <= set(os.listdir(out)) and os.listdir(tmp_path) == [name]


def test_what_is_no_place_is_one_line(tmp_path: Path) -> None:
    for where in ("x" * 300, f"{tmp_path}/{'y' * 5000}", "s3://[", "file:///a?b"):
        with pytest.raises(StorageError) as found:
            place(where).exists()
        assert str(found.value).isprintable()
