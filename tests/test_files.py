"""A file is the old one or the new one, whatever happens in between."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ugrl.files import DRAFT, replacing, write_whole

ROOT = Path(__file__).parents[1]


def test_a_file_is_replaced_in_one_go(tmp_path: Path) -> None:
    file = tmp_path / "note.json"
    write_whole(file, "old")
    with replacing(file) as draft:
        draft.write_text("new")
        assert file.read_text() == "old" and draft.name.endswith(DRAFT) and draft.parent == tmp_path
    assert file.read_text() == "new"
    write_whole(file, "ü".encode())
    assert file.read_text(encoding="utf-8") == "ü"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    file = tmp_path / "note.json"
    write_whole(file, "old")
    for kind in ("file", "folder"):
        with pytest.raises(OSError, match="no room"), replacing(file) as draft:
            draft.write_text("half") if kind == "file" else (draft.mkdir(), (draft / "x").write_text("half"))
            raise OSError("no room")
        assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_without_a_draft_nothing_changes(tmp_path: Path) -> None:
    with replacing(tmp_path / "note.json"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_nobody_else_in_ugrl_replaces_files() -> None:
    """Folders are another matter: checkpoints, prepared data sets and exports have rules of their own."""
    found = {
        str(path.relative_to(ROOT)): re.findall(r"os\.replace|os\.rename|\.rename\(|os\.fsync", path.read_text())
        for path in sorted((ROOT / "ugrl").rglob("*.py"))
    }
    allowed = {"ugrl/files.py", "ugrl/train/checkpoint.py", "ugrl/data/prepare.py", "ugrl/export/folder.py"}
    assert {name for name, hits in found.items() if hits} == allowed
