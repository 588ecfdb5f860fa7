"""Dotted paths of the tree (``method.contrast.tau``): what stands there, and the text of its key."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from ugrl.config.tree import Config
from ugrl.errors import ConfigError
from ugrl.secrets import masked
from ugrl.text import brief, line, nearest


def paths(cls: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted path of the tree with its default value.

    >>> paths()["method.contrast.keep"]
    0.35
    """
    hints = get_type_hints(cls)
    out: dict[str, Any] = {}
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            out.update(paths(hints[f.name], f"{prefix}{f.name}."))
        else:
            out[prefix + f.name] = f.default if f.default is not MISSING else None
    return out


@cache
def field_texts(cls: type) -> dict[str, str]:
    """The text of each field of a section: the string below it, or the first line of the section that it holds.

    >>> from ugrl.config import LossConfig
    >>> field_texts(LossConfig)["lambda1"]
    'Weight λ1 of the segmentation loss L_seg; the classification loss has weight 1 (Eq. 13).'
    """
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    hints = get_type_hints(cls)
    texts = {name: inspect.getdoc(hint) or "" for name, hint in hints.items() if is_dataclass(hint)}
    for above, node in zip(body.body, body.body[1:], strict=False):
        if isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name) and isinstance(node, ast.Expr):
            texts[above.target.id] = " ".join(str(ast.literal_eval(node.value)).split())
    return {f.name: texts.get(f.name, "").partition("\n")[0] for f in fields(cls)}


def get(cfg: Config, path: str) -> Any:
    """The value at a dotted path."""
    node: Any = cfg
    for part in path.split("."):
        node = getattr(node, part)
    return node


def elsewhere(key: str) -> str:
    """A hint where a key exists, but in another section."""
    places = [p for p in paths() if p.rsplit(".", 1)[-1] == key]
    return f"; did you mean '{places[0]}'?" if places else ""


def check_path(path: str) -> None:
    """Refuse a dotted path that names no value of the tree, naming the nearest one.

    >>> check_path("method.contrast.tua")
    Traceback (most recent call last):
    ugrl.errors.ConfigError: unknown config key 'method.contrast.tua'; did you mean 'method.contrast.tau'?
    """
    check_paths([path])


def check_paths(names: Iterable[str]) -> None:
    """:func:`check_path` of several; the error names all that are unknown."""
    known = paths()
    unknown = [line(path, 120) for path in names if path not in known]
    if unknown:
        hints = [elsewhere(path.rsplit(".", 1)[-1]) or nearest(path, known) for path in unknown]
        raise ConfigError(*(f"unknown config key '{path}'{hint}" for path, hint in zip(unknown, hints, strict=True)))


def override(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested dict with the values at dotted paths replaced (paths are checked)."""
    check_paths(values)
    out = dict(tree)
    for path, value in values.items():
        node = out
        *sections, leaf = path.split(".")
        for i, part in enumerate(sections):
            inner = node.get(part, {})
            if not isinstance(inner, Mapping):
                raise ConfigError(no_section(".".join(sections[: i + 1]), inner))
            node[part] = dict(inner)
            node = node[part]
        node[leaf] = value
    return out


def no_section(prefix: str, found: Any) -> str:
    """The message about a value where a section belongs."""
    name = f"config section '{prefix.rstrip('.')}'" if prefix else "the configuration"
    return f"{name} is {show(found)}; expected keys and values"


def show(value: Any) -> str:
    """A value as the file says it, bounded and without credentials."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return masked(brief(value))


def to_dict(cfg: Any) -> dict[str, Any]:
    """The tree as plain dicts, lists and scalars, ready for YAML or JSON."""
    out: dict[str, Any] = {}
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        out[f.name] = to_dict(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value
    return out
