"""YAML in, YAML out: where a configuration is found, read, overridden and written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ugrl import foreign
from ugrl.config.keys import check_paths, override, paths, show, to_dict
from ugrl.config.tree import Config
from ugrl.config.values import build
from ugrl.errors import ConfigError
from ugrl.secrets import HIDDEN, masked, public_tree
from ugrl.text import line, nearest


def find_yaml(name: str | Path, package: str = "ugrl.configs") -> Path:
    """A YAML file by path, else by its name among those shipped in ``package``.

    ``configs/shapes.yaml``, ``shapes.yaml`` and ``shapes`` all find the shipped file when no such
    path exists.
    """
    path, folder = Path(name), resources.files(package)
    if _is(Path.is_file, path):
        return path
    stem = path.name.removesuffix(".yaml")
    have = sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))
    # A folder that is not there is no way to spell a shipped name: somebody's own file would be another one in silence.
    if stem in have and str(path.parent) in (".", package.rpartition(".")[2], package.replace(".", "/")):
        return Path(str(folder)) / f"{stem}.yaml"
    if _is(Path.exists, path):
        return path  # no regular file: whoever reads it says so
    raise ConfigError(f"no file '{line(name, 120)}', and no shipped one of that name{nearest(stem, have)}")


def _is(what: Callable[[Path], bool], path: Path) -> bool:
    try:
        return what(path)
    except (OSError, ValueError):  # a name too long, or with a NUL; a folder that may not be entered
        return False


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file; one clear line where it is not one."""
    return as_tree(foreign.read_text(path, "configuration", error=ConfigError), line(path))


def as_tree(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping from text.

    Raises:
        ConfigError: Not YAML, not a mapping, or empty: what is missing is not what is left at its defaults.
    """
    tree = foreign.parse_yaml(text, where)
    if tree is None:
        raise ConfigError(f"{where}: is empty; expected keys and values")
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected keys and values at the top level, found {show(tree)}")
    return tree


def load(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read, override and validate a configuration (see :func:`find_yaml` for how it is found).

    Raises:
        ConfigError: As :func:`ugrl.config.values.build`; each problem names the file.
    """
    path, values, known = find_yaml(name), dict(overrides or {}), paths()
    tree = read_yaml(path)
    problems: list[str] = []
    try:
        check_paths(values)
    except ConfigError as error:
        problems += error.problems
    try:
        cfg = build(override(tree, {key: value for key, value in values.items() if key in known}))
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems).of(line(path.name))
    return cfg


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """``["train.steps=100"]`` as ``{"train.steps": 100}``; values are read as YAML.

    Raises:
        ConfigError: Names every word that is no ``section.key=value``, or whose value is no YAML.
    """
    out: dict[str, Any] = {}
    problems: list[str] = []
    for word in words:
        path, eq, text = word.partition("=")
        shown = masked(line(word, 80))
        if not eq or not path.strip():
            problems.append(f"override '{shown}' is not section.key=value")
            continue
        try:
            out[path.strip()] = foreign.parse_yaml(text, f"override '{shown}'")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return out


class _Quoting(yaml.SafeDumper):
    """Quotes every text that some version of YAML reads as something else (``off``, ``010``, ``1e-3``, ``y``)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_BARE = re.compile(r"(?!(?:true|false|yes|no|on|off|null|none|y|n|inf|nan)$)[A-Za-z][\w./-]*", re.IGNORECASE | re.ASCII)


def _quoted(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if _BARE.fullmatch(value) else '"')


_Quoting.add_representer(str, _quoted)


def dump(tree: Any, **layout: Any) -> str:
    r"""YAML that versions 1.1 and 1.2 read alike: :func:`ugrl.foreign.parse_yaml` gives back the same tree.

    >>> dump({"amp": "off", "shards": "/data/010", "lr": 1e-05})
    'amp: "off"\nshards: "/data/010"\nlr: 1.0e-05\n'
    """
    return yaml.dump(tree, Dumper=_Quoting, sort_keys=False, allow_unicode=True, **{"width": 10**9, **layout})


def public_dict(cfg: Config) -> dict[str, Any]:
    """:func:`to_dict` as it may be written down or shown: credentials within it are hidden."""
    return public_tree(to_dict(cfg))


def check_revealed(cfg: Config, where: object) -> None:
    """Refuse a configuration that was read back from ``where`` without its credentials.

    Raises:
        ConfigError: Names the key to give again.
    """
    if cfg.train.mlflow is not None and HIDDEN in cfg.train.mlflow:
        raise ConfigError(
            f"{line(where)}: train.mlflow is {cfg.train.mlflow}: credentials are not written down; give it again, "
            "train.mlflow=…, or do without, train.mlflow=null"
        )
