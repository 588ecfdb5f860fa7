"""The script that counts how the code is built, against a small tree whose figures are known."""

from __future__ import annotations

from pathlib import Path

from bench import structure

FILES = {
    "ugrl/__init__.py": "",
    "ugrl/a.py": (
        '"""Text."""\n\nfrom ugrl.inner import b\n\n\n'
        'def f() -> None:\n    """More\n    text."""\n    # why\n    b.g()\n'
    ),
    "ugrl/inner/__init__.py": "",
    "ugrl/inner/b.py": "from typing import TYPE_CHECKING\nimport ugrl.inner.c\nif TYPE_CHECKING:\n    import ugrl.a\n",
    "ugrl/inner/c.py": "def late():\n    from ugrl.inner.b import g\n    return g\n",
    "tuning/a.py": "import os\nfrom ugrl.inner.b import g, h\n",
}


def tree(root: Path) -> Path:
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_small_tree_has_known_figures(tmp_path: Path) -> None:
    modules = structure.read(tree(tmp_path))
    assert sorted(modules) == ["tuning.a", "ugrl.a", "ugrl.inner.b", "ugrl.inner.c"]
    assert {name: sorted(m.imports) for name, m in modules.items()} == {
        "ugrl.a": ["ugrl.inner.b"],
        "ugrl.inner.b": ["ugrl.inner.c"],
        "ugrl.inner.c": ["ugrl.inner.b"],
        "tuning.a": ["ugrl.inner.b"],
    }
    whole, inner = structure.row("ugrl", modules), structure.row("ugrl.inner", modules)
    assert (whole.modules, whole.floors, whole.arrows) == (3, 2, 3)
    assert whole.cycles == inner.cycles == (("ugrl.inner.b", "ugrl.inner.c"),)
    assert (inner.modules, inner.floors, inner.arrows, inner.code) == (2, 1, 2, 7)
    assert modules["ugrl.a"].code == 3 and modules["ugrl.a"].functions == (structure.Function("ugrl.a.f", 3),)
    assert structure.row("", modules).arrows == 4


def test_the_tables_are_printed(tmp_path: Path, capsys) -> None:
    assert structure.main([str(tree(tmp_path))]) == 0
    out = capsys.readouterr().out
    assert "| ugrl | 3 | 2 | 3 | 1 |" in out and "cycle: ugrl.inner.b, ugrl.inner.c" in out
