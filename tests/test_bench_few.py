"""A devkit of a few photographs out of a larger one."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import few
from tests.test_bench_real import devkit_of
from ugrl.data.voc import CLASS_NAMES, VocSource


def test_a_devkit_of_a_few_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kit = devkit_of(tmp_path)
    given = ["--voc", str(kit), "--out", str(tmp_path / "few"), "--classes", "cat", "dog", "--each"]
    assert few.main([*given, "2"]) == 0 and "4 photographs to train on" in capsys.readouterr().out
    source, whole_kit = VocSource(tmp_path / "few"), VocSource(kit)
    ids = source.splits()
    shown = [{CLASS_NAMES[t - 1] for t in source.tags("train", id) or ()} for id in ids["train"]]
    assert len(shown) == 4 and all(tags <= {"cat", "dog"} for tags in shown)
    assert "cat" in shown[0] & shown[1] and "dog" in shown[2] & shown[3]
    both = {CLASS_NAMES.index(name) + 1 for name in ("cat", "dog")}
    assert ids["val"] == [id for id in whole_kit.splits()["val"] if set(whole_kit.tags("val", id) or ()) <= both]
    assert source.row("train", ids["train"][0]).mask is not None
    for more, message in (
        (["2"], "is there already"),
        (["9", "--out", str(tmp_path / "more")], "--each is 9: "),
        (["2", "--classes", "kat"], "no 'kat'; did you mean 'cat'?"),
    ):
        assert few.main([*given, *more]) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1 and message in errors[0], errors
