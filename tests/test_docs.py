"""The documentation says what is: commands are parsed by the real parsers, blocks run or load, links lead somewhere."""

from __future__ import annotations

import argparse
import ast
import fnmatch
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import yaml

from cluster import cli as train_cli
from tuning import cli as tune_cli
from tuning.space.space_file import build_space
from ugrl import cli, command, config
from ugrl.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "cluster" / "deploy" / "README.md",
    ]
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
MAKEFILE = (ROOT / "Makefile").read_text()
# Programs of others: what they take is not ours to check.
FOREIGN = {"pip", "optuna-dashboard", "export", "umask", "ulimit", ".", "sbatch", "kubectl", "ssh", "nvidia-smi", "cd"}
FOREIGN_RAY = {"get-auth-token"}  # a part of Ray that is no click command


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """Code within the text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def commands(page: Path) -> Iterator[list[str]]:
    """Every command of the shell blocks, as words."""
    for block in blocks(page, "sh"):
        for text in block.replace("\\\n", " ").splitlines():
            reader = shlex.shlex(text, posix=True, punctuation_chars="();&|>")
            reader.whitespace_split = True
            words: list[str] = []
            skip = False
            for word in [*reader, ";"]:
                if word == ">":  # and the file that follows
                    skip = True
                elif set(word) <= set("();&|"):
                    if words:
                        yield words
                    words = []
                elif skip:
                    skip = False
                else:
                    words.append(word)


def check(words: list[str]) -> None:
    """Refuse a command that its program would refuse.

    Raises:
        AssertionError, ConfigError, SystemExit: What the program says.
    """
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, *rest = words
    checks = {"ugrl": ugrl, "ugrl-train": train, "ugrl-tune": tune, "make": make, "python": python, "ray": ray}
    if program in checks:
        checks[program](rest)
    else:
        assert program in FOREIGN, f"{program}: neither of this project nor known"
        own = [i for i, word in enumerate(rest) if word in checks]
        if own and program == "sbatch":
            check(rest[own[0] :])


def options(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a parser and of its commands."""
    found = {name for action in parser._actions for name in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {name for inner in action.choices.values() for name in options(inner)}
    return found


def check_words(words: list[str], parser: argparse.ArgumentParser) -> None:
    """Options are written out: argparse would take their beginnings."""
    command.check_words(words)
    assert {w for w in words if w.startswith("--")} <= options(parser), words


def ugrl(words: list[str]) -> None:
    check_words(words, cli.build_parser())
    cli.build_parser().parse_args(words)


def configuration(name: str | None, words: list[str]) -> None:
    """The configuration of a command; a file that does not exist yet stands for the defaults."""
    values = config.parse_overrides(words)
    if name is None or name in command.shipped("ugrl.configs"):
        config.load(name or "shapes", values)
    else:
        assert name.endswith(".yaml") and not name.startswith("configs/"), f"{name}: neither shipped nor a file"
        config.build(config.override({}, values))


def train(words: list[str]) -> None:
    check_words(words, train_cli.build_parser())
    args = train_cli.build_parser().parse_intermixed_args(words)
    configuration(args.config, args.overrides)
    if args.cluster is not None:
        train_cli.load_place(args.cluster)


def tune(words: list[str]) -> None:
    check_words(words, tune_cli.build_parser())
    if words[0] == "report":
        tune_cli.build_report_parser().parse_args(words[1:])
        return
    args = tune_cli.build_parser().parse_intermixed_args(words)
    if args.space is not None or not args.resume:
        tune_cli.read_space(args)


def make(words: list[str]) -> None:
    for word in words:
        name, eq, _ = word.partition("=")
        known = rf"^{name} \?=|\$\({name}\)" if eq else rf"^{name}:"
        assert re.search(known, MAKEFILE, re.MULTILINE), f"make {word}"


class Parsed(BaseException):  # noqa: N818
    """A program has read its words; no program catches it."""


def python(words: list[str]) -> None:
    """Programs that are run as ``python -m MODULE`` or ``python FILE``."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file(), words[0]
        return
    module, rest = words[1], words[2:]
    if module in ("http.server", "venv"):
        return
    if module == "pytest":
        for word in rest:
            assert not word.startswith("tests/") or (ROOT / word).is_file(), word
        return
    found = importlib.import_module("bench.__main__" if module == "bench" else module)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed):
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(name))
        patch.setattr(sys, "argv", [module, *rest])
        found.main()


def stopping(name: str) -> Callable[..., Any]:
    """A method of the parser that ends the program once it has read its words."""
    real = getattr(argparse.ArgumentParser, name)

    def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        real(self, args, namespace)
        raise Parsed

    return parse


def ray(words: list[str]) -> None:
    """Ray's own parser, and ours for what a job runs."""
    from ray.scripts.scripts import cli as tree

    if words[0] in FOREIGN_RAY:
        return
    own = words[words.index("--") + 1 :] if "--" in words else []
    words = words[: words.index("--")] if own else words
    node: click.Command = tree
    while isinstance(node, click.Group):
        name, *words = words
        found = node.get_command(click.Context(node), name)
        assert found is not None, f"ray {name}"
        node = found
    node.make_context(name, [*words, "--", *own] if own else [*words])
    for word in words:
        assert not word.startswith("cluster/deploy/") or (ROOT / word).is_file(), word
    if own:
        check(own)


@each_page
def test_programs_take_the_commands_of_shell_blocks(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        try:
            check(words)
        except (ConfigError, SystemExit) as error:
            pytest.fail(f"{shlex.join(words)}: {error}")


@pytest.mark.parametrize(
    "words",
    [
        "ugrl predict run a.jpg --out masks --bset",
        "ugrl-train --config shapes train.stpes=3",
        "ugrl-train --config shapse",
        "ugrl-train --config configs/mine.yaml",
        "ugrl-train --config voc --cluster gpsu",
        "ugrl-tune --space voc --dry",
        "ugrl-tune --space voc train.steps=1",
        "make tset",
        "make test SEDE=1",
        "python -m bench --onyl step",
        "python -m pytest tests/test_none.py",
        "ray job submit --adress x -- true",
        "ray job submit --address x -- ugrl-train --ressume",
        "ugl-train",
    ],
)
def test_a_wrong_command_is_seen(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, AssertionError, SystemExit, click.ClickException)):
        check(words.split())


@each_page
def test_options_and_keys_within_the_text_exist(page: Path) -> None:
    ours = options(cli.build_parser()) | options(train_cli.build_parser()) | options(tune_cli.build_parser())
    paths = config.paths()
    for span in spans(page):
        words = span.split()
        if words[0] in ("ugrl", "ugrl-train", "ugrl-tune"):
            assert {w for w in words if w.startswith("--")} <= ours, span
        if words[0] == "make" and re.fullmatch(r"[\w =.-]+", span):
            make(words[1:])
        if re.fullmatch(r"(data|model|method|train|eval|cluster)\.[\w.*]+(=\S+)?", span):
            key, eq, _ = span.partition("=")
            known = [p for p in paths if fnmatch.fnmatch(p, key) or p.startswith(key + ".")]
            assert known, f"{span}: no such key"
            if eq:
                tree: dict[str, Any] = {"train": {"steps": 10**5}}
                if "aux" in span:  # of plain ViTs alone
                    tree["model"] = {"backbone": "timm/vit_small_patch16_224", "aux_classifier": 2}
                config.build(config.override(tree, config.parse_overrides([span])))


def test_every_key_is_in_the_documentation() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert [path for path in config.paths() if f"`{path}`" not in text] == []


@each_page
def test_files_and_names_of_the_code_are_there(page: Path) -> None:
    text = page.read_text()
    for span in spans(page):
        if re.fullmatch(r"(ugrl|cluster|tuning|tests|bench|docs)/[\w./-]+", span):
            assert (ROOT / span).exists(), f"{span}: no such file"
    for names, file in re.findall(
        r"((?:`[\w.]+`(?:, | and )?)+) in `((?:ugrl|cluster|tuning|tests|bench)/[\w/]+\.py)`", text
    ):
        code = (ROOT / file).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            last = name.rpartition(".")[2]
            assert re.search(rf"^\s*(?:def|class) {last}\b|^\s*{last}\b.*[=:]", code, re.MULTILINE), f"{name} in {file}"


@each_page
def test_yaml_blocks_are_loaded(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        tree = yaml.safe_load(block)
        if "search" in tree:
            build_space(tree)
        elif set(tree) <= {"name", "seed", "data", "model", "method", "train", "eval", "cluster"}:
            config.build(tree)
        else:
            (tmp_path / "place.yaml").write_text(block)
            config.build(config.override({}, train_cli.load_place(str(tmp_path / "place.yaml"))))


@each_page
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks(page, "python")
    tests = [block for block in found if "class Test" in block]
    for block in found:
        exec(compile(block, str(page), "exec"), {"__name__": page.stem})
    if tests:  # which are run as tests
        (tmp_path / "test_blocks.py").write_text("\n".join(tests))
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
        run = subprocess.run(
            [sys.executable, *words, "--rootdir", str(ROOT), str(tmp_path / "test_blocks.py")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=500,
        )
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


@cache
def anchors(page: Path) -> set[str]:
    """What a link may point to within a page, as GitHub and MkDocs name it."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http:", "https:")):
            file, _, anchor = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            assert there.is_file(), f"{target}: no such file"
            assert not anchor or anchor in anchors(there), f"{target}: no such heading"


def test_the_site_has_every_page() -> None:
    nav = re.findall(r"\w+\.md", yaml.dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_readme_is_short_and_has_a_picture() -> None:
    readme = (ROOT / "README.md").read_bytes()
    assert 6_000 <= len(readme) <= 10_000
    assert b"docs/img/walk.png" in readme
    assert (ROOT / "docs" / "img" / "walk.png").stat().st_size < 300_000


# -- the configuration reference ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_reference_is_current(reference: ModuleType) -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference.page(), "run: make docs"


def test_every_key_of_a_space_file_says_what_it_is(reference: ModuleType) -> None:
    rows = list(reference.space_rows())
    assert [row[0] for row in rows if not row[4]] == []
    assert {row[0].strip("`").split(".")[0] for row in rows} >= {"config", "search", "objective", "budget", "first"}


def test_every_key_of_a_run_says_what_it_is(reference: ModuleType) -> None:
    rows = [line for part in reference.tree(config.Config) for line in part.splitlines() if line.startswith("| `")]
    assert len(rows) == len(config.paths())
    assert [row for row in rows if row.endswith("| |")] == []


def test_a_text_under_a_field_is_read(reference: ModuleType) -> None:
    from tuning.space.axis import Axis
    from tuning.space.options import Repeats

    assert reference.field_texts(Repeats)["seeds"] == "Seeds of each configuration; their mean counts."
    assert reference.field_texts(Axis)["high"] == "Upper end of a range, included."


def test_the_limits_of_a_space_file_are_those_of_its_checks(reference: ModuleType) -> None:
    smallest: dict[str, Any] = {"config": "shapes", "search": {"method.contrast.keep": {"uniform": [0.1, 0.5]}}}

    def with_value(key: str, value: float) -> dict[str, Any]:
        section, _, name = key.rpartition(".")
        more = {"name": "none"} if section == "scheduler" else {}
        return {**smallest, section or key: {**more, name: value} if section else value}

    for key, limit in reference.SPACE_LIMITS.items():
        sign, least = limit.split()
        good, bad = (float(least) + 1, float(least)) if sign == ">" else (float(least), float(least) - 1)
        build_space(with_value(key, int(good)))
        with pytest.raises(ConfigError):
            build_space(with_value(key, int(bad)))


# -- what the program says ----------------------------------------------------------------------------


@cache
def sayings() -> list[str]:
    """Every text in the code; what is filled in is a NUL."""
    found = [MAKEFILE]
    for file in (f for top in ("ugrl", "cluster", "tuning") for f in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def said(message: str) -> bool:
    """Whether a text of the code has the words of a message in its order; ``…`` stands for anything."""
    wanted = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.DOTALL)
    return any(wanted.search(text) for text in sayings())


def test_errors_of_the_troubleshooting_page_are_ones_that_the_program_says() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = [m.strip("` ") for m in re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE)]
    assert len(messages) > 40 and not said("words that nobody says …")
    assert [m for m in messages if not said(m)] == []


def test_the_exit_statuses_are_those_of_the_programs() -> None:
    table = (ROOT / "docs" / "cluster.md").read_text().partition("## Exit statuses")[2].partition("\n## ")[0]
    told = set(re.findall(r"^\| (\d+) \|", table, re.MULTILINE))
    assert told == set(re.findall(r"(?:^|  )(\d+) (?=\w)", command.EXITS.replace("(after 3, 4, 130 and 143", ""), re.M))
