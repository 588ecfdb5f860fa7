"""Writes docs/configuration.md from the classes that hold the configuration and the options of a search.

python docs/reference.py            writes the page
python docs/reference.py --check    exit status 1 where the page is not what would be written
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tuning.space import axis, options, space
from ugrl import config

PAGE = Path(__file__).parent / "configuration.md"
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
TYPES = {int: "integer", float: "number", bool: "true or false", str: "text"}

# Keys of a space file that are a section of their own: the class, and how the section is called.
SECTIONS = ("budget", "sampler", "scheduler", "repeats", "final", "resources")
# What the checks of a space file allow, where the type does not say it. tests/test_docs.py tries each of them.
SPACE_LIMITS = {
    "trials": "≥ 1",
    "concurrent": "≥ 0",
    "workers": "≥ 1",
    "seed": "≥ 0",
    "max_failures": "≥ 0",
    "budget.trials": "≥ 1",
    "budget.hours": "≥ 0",
    "budget.gpu_hours": "≥ 0",
    "budget.cpu_hours": "≥ 0",
    "sampler.startup": "≥ 0",
    "scheduler.grace_steps": "≥ 0",
    "scheduler.reduction_factor": "≥ 2",
    "repeats.seeds": "≥ 1",
    "final.best": "≥ 0",
    "final.seeds": "≥ 1",
    "resources.gpus_per_trial": "≥ 0",
    "resources.cpus_per_trial": "> 0",
}
SPACE_CHOICES = {
    "sampler.name": options.SAMPLERS,
    "scheduler.name": options.SCHEDULERS,
    "paper": options.PAPERS,
    "objective": ("auto", *options.METRICS, *options.COSTS),
}
# Types and defaults of a space file, where the class that it becomes has others.
SPACE_TYPES = {
    "config": "text",
    "search": "paths and ranges",
    "overrides": "paths and values",
    "objective": "text, or a list",
    "constraints": "costs and limits",
    "first": "a list of points",
    "scheduler.grace_steps": "number",
    "scheduler.reduction_factor": "integer",
}
SPACE_DEFAULTS = {"objective": "auto"}
NO_DEFAULT = ("overrides", "constraints", "first", "paper")


def field_texts(cls: type) -> dict[str, str]:
    """What each field of a dataclass is for: the text under the field, else its line under ``Attributes:``."""
    found: dict[str, str] = {}
    for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", _attributes(cls), re.MULTILINE):
        found[name] = text
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
            if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                found[node.target.id] = after.value.value
    return {name: _plain(text) for name, text in found.items()}


def _attributes(cls: type) -> str:
    _, _, below = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    return re.split(r"^\S", below, maxsplit=1, flags=re.MULTILINE)[0]


def _plain(text: str) -> str:
    """One line, with Markdown for what reStructuredText marks."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split())).replace("``", "`")
    return text.replace("|", "\\|")


def type_name(hint: Any) -> str:
    """A type as the table says it."""
    if hint == config.Steps:
        return "steps, or a share"
    if get_origin(hint) is Literal:
        return "word"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else type_name(a) for a in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {type_name(get_args(hint)[0])}s"
    return TYPES.get(hint, "keys and values")


def value_text(value: Any) -> str:
    """A default as YAML says it."""
    if value is MISSING or value is None:
        return "" if value is MISSING else "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value != "" else ""


def limits(field: Any, hint: Any) -> str:
    """The values that a field may have."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{a}`" for a in get_args(hint))
    return ", ".join(f"{SIGNS[k]} {b:g}" for k, b in field.metadata.get("bounds", {}).items())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown."""
    head = ["| key | type | default | allowed | meaning |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |".replace("  ", " ") for row in rows)])


def tree(cls: type, prefix: str = "") -> Iterator[str]:
    """The sections of the configuration, each with its own keys before those of its sections."""
    hints, texts = get_type_hints(cls), field_texts(cls)
    leaves = [f for f in fields(cls) if not is_dataclass(hints[f.name])]
    yield f"### `{prefix.rstrip('.')}`" if prefix else "### At the top"
    yield _plain((inspect.getdoc(cls) or "").partition("\n\n")[0])
    yield table(
        [
            (
                f"`{prefix}{f.name}`",
                type_name(hints[f.name]),
                value_text(f.default),
                limits(f, hints[f.name]),
                texts.get(f.name, ""),
            )
            for f in leaves
        ]
    )
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            yield from tree(hints[f.name], f"{prefix}{f.name}.")


def space_rows() -> Iterator[tuple[str, ...]]:
    """The keys of a space file."""
    hints, texts = get_type_hints(space.SearchSpace), field_texts(space.SearchSpace)
    for f in fields(space.SearchSpace):
        key = "objective" if f.name == "objectives" else f.name
        if f.name in SECTIONS:
            if f.name == "budget":
                yield space_row("trials", int, options.Budget.trials, "The same as `budget.trials`.")
            inner, lines = get_type_hints(hints[f.name]), field_texts(hints[f.name])
            for g in fields(hints[f.name]):
                yield space_row(f"{f.name}.{g.name}", inner[g.name], g.default, lines.get(g.name, ""))
        else:
            yield space_row(key, hints[f.name], f.default, texts.get(f.name, ""))


def space_row(key: str, hint: Any, default: Any, text: str) -> tuple[str, ...]:
    """One key of a space file."""
    allowed = ", ".join(f"`{c}`" for c in SPACE_CHOICES.get(key, ())) or SPACE_LIMITS.get(key, "")
    if key.startswith("resources."):
        default = "auto"
    shown = "" if key in NO_DEFAULT else value_text(SPACE_DEFAULTS.get(key, default))
    return f"`{key}`", SPACE_TYPES.get(key) or type_name(hint), shown, allowed, text


def page() -> str:
    """The whole page."""
    kinds = [f"| `{name}` | {text} |" for name, text in axis.KINDS.items()]
    fixed = [f"| `{path}` | {why} |" for path, why in axis.FIXED.items()]
    costs = [f"| `{name}` | {text} |" for name, text in options.COSTS.items()]
    parts = [
        "# Configuration",
        "<!-- Written by docs/reference.py from the classes of the configuration. `make docs` writes it anew. -->",
        "A key is written as `section.key=value` on the command line, and as nested keys in a YAML file. The same "
        "paths name the axes of a search. [Training](training.md) and [search](search.md) explain how they are used.",
        "*Steps, or a share*: a number of steps from 1 on, or below 1 a share of `train.steps`.",
        "## A run",
        *tree(config.Config),
        "## The space file",
        "What `ugrl-tune --space` reads. `config` and `search` are needed. `sampler` and `scheduler` may also be the "
        "name alone, as in `sampler: tpe`.",
        table(list(space_rows())),
        "### Ranges",
        "Under `search`, each path of the configuration has one of these. `step` gives a range a grid, `when` makes it "
        "count only where another choice has a value.",
        "\n".join(["| kind | values |", "| --- | --- |", *kinds]),
        "These paths, and all of `cluster`, cannot be searched:",
        "\n".join(["| path | because it |", "| --- | --- |", *fixed]),
        "### Costs",
        "Under `constraints` each has an upper limit. In a list under `objective` they are minimised.",
        "\n".join(["| cost | what it is |", "| --- | --- |", *costs]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main(words: list[str]) -> int:
    """Write the page, or look whether it is current."""
    if words == ["--check"]:
        current = PAGE.is_file() and PAGE.read_text() == page()
        if not current:
            print(f"{PAGE} is not current; run: python docs/reference.py", file=sys.stderr)
        return 0 if current else 1
    if words:
        print(__doc__, file=sys.stderr)
        return 2
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
