"""How the code is built: modules, imports between them, cycles, lines and the longest functions of each package.

``python -m bench.structure [PATH]`` prints the tables of any checkout. Nothing is imported, so that old and new
checkouts can be compared from one place.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TOPS = ("ugrl", "cluster", "tuning", "bench")
Graph = Mapping[str, set[str]]


@dataclass(frozen=True, slots=True)
class Function:
    """A function and the lines that it spans, its docstring left out."""

    name: str
    lines: int


@dataclass(frozen=True, slots=True)
class Module:
    """One file.

    ``imports`` are the modules of the checkout that it imports, also within functions, but not for type checkers alone.
    ``code`` counts lines without blank ones, comments and docstrings.
    """

    name: str
    imports: frozenset[str]
    lines: int
    code: int
    functions: tuple[Function, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One package, with the packages inside it: arrows are imports between its modules, floors their longest chain."""

    package: str
    modules: int
    floors: int
    arrows: int
    cycles: tuple[tuple[str, ...], ...]
    lines: int
    code: int
    longest: Function | None


def read(root: Path) -> dict[str, Module]:
    """The modules of a checkout by dotted name; an empty ``__init__.py`` is none."""
    files = {_name(p, root): p for top in TOPS for p in sorted((root / top).rglob("*.py")) if p.stat().st_size}
    return {name: _module(name, path, files) for name, path in files.items()}


def _name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _module(name: str, path: Path, known: Mapping[str, Path]) -> Module:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return Module(
        name,
        frozenset(_imports(tree, known)) - {name},
        len(text.splitlines()),
        _code_lines(text, tree),
        tuple(Function(f"{name}.{f.name}", _span(f) - _span(_docstring(f))) for f in functions),
    )


def _imports(node: ast.AST, known: Mapping[str, Path]) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (a.name for a in child.names if a.name in known)
        elif isinstance(child, ast.ImportFrom) and child.module:
            inner = [f"{child.module}.{a.name}" for a in child.names]
            yield from (name for name in inner if name in known)
            if child.module in known and not all(name in known for name in inner):
                yield child.module
        else:
            yield from _imports(child, known)


def _docstring(node: ast.AST) -> ast.Expr | None:
    body = getattr(node, "body", None)
    first = body[0] if isinstance(body, list) and body else None
    told = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return first if told else None


def _span(node: ast.stmt | None) -> int:
    return 0 if node is None else (node.end_lineno or node.lineno) - node.lineno + 1


def _code_lines(text: str, tree: ast.Module) -> int:
    told: set[int] = set()
    for found in map(_docstring, ast.walk(tree)):
        if found is not None:
            told |= set(range(found.lineno, found.lineno + _span(found)))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for k, line in lines if k not in told and line.strip() and not line.lstrip().startswith("#"))


def components(graph: Graph) -> list[tuple[str, ...]]:
    """Sets of modules that reach each other, each after those that it imports (Tarjan's algorithm).

    >>> components({"a": {"b"}, "b": {"c"}, "c": {"b"}})
    [('b', 'c'), ('a',)]
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[tuple[str, ...]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            found.append(tuple(sorted(stack[at:])))
            del stack[at:]

    for name in graph:
        if name not in index:
            visit(name)
    return found


def floors(graph: Graph) -> int:
    """Modules on the longest chain of imports; a cycle counts as one.

    >>> floors({"a": {"b"}, "b": {"c"}, "c": set(), "d": set()})
    3
    """
    height: dict[str, int] = {}
    for group in components(graph):
        below = [height[other] for name in group for other in graph[name] if other not in group]
        height.update(dict.fromkeys(group, 1 + max(below, default=0)))
    return max(height.values(), default=0)


def row(package: str, modules: Mapping[str, Module]) -> Row:
    """The figures of one package; of everything where ``package`` is empty."""
    inside = {n: m for n, m in modules.items() if not package or n == package or n.startswith(package + ".")}
    graph = {name: {other for other in m.imports if other in inside} for name, m in inside.items()}
    functions = [f for m in inside.values() for f in m.functions]
    return Row(
        package or "all",
        len(inside),
        floors(graph),
        sum(map(len, graph.values())),
        tuple(group for group in components(graph) if len(group) > 1),
        sum(m.lines for m in inside.values()),
        sum(m.code for m in inside.values()),
        max(functions, key=lambda f: f.lines, default=None),
    )


def packages(modules: Mapping[str, Module]) -> list[str]:
    """The folders that hold modules, those inside others after them."""
    return sorted({name.rpartition(".")[0] for name in modules if "." in name})


def basenames(modules: Mapping[str, Module], top: str) -> dict[str, int]:
    """Names that several modules below a folder share, and how many do."""
    names = [n.rpartition(".")[2] for n in modules if n.startswith(top + ".")]
    return {name: names.count(name) for name in sorted(set(names)) if names.count(name) > 1}


def report(root: Path, longest: int = 12) -> Iterator[str]:
    """The tables as lines of Markdown."""
    modules = read(root)
    yield "| package | modules | floors | arrows | cycles | lines | code | longest function |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    rows: Sequence[Row] = [row(name, modules) for name in [*packages(modules), ""]]
    for r in rows:
        top = f"{r.longest.name.rpartition('.')[2]} {r.longest.lines}" if r.longest else ""
        figures = " | ".join(map(str, (r.modules, r.floors, r.arrows, len(r.cycles), r.lines, r.code)))
        yield f"| {r.package} | {figures} | {top} |"
    yield ""
    for cycle in rows[-1].cycles:
        yield f"cycle: {', '.join(cycle)}"
    for name in TOPS:
        if shared := basenames(modules, name):
            yield f"shared names in {name}: {', '.join(f'{k} x{v}' for k, v in shared.items())}"
    functions = sorted((f for m in modules.values() for f in m.functions), key=lambda f: -f.lines)
    yield f"functions of more than 60 lines: {sum(f.lines > 60 for f in functions)}"
    yield "longest functions: " + ", ".join(f"{f.name} {f.lines}" for f in functions[:longest])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.structure", description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=Path(), help="a checkout (default: here)")
    for line in report(parser.parse_args(argv).path):
        print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
