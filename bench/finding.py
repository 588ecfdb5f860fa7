"""The tables of docs/finding.md, from stored results alone, with intervals over images and seeds.

    python -m bench.finding [--results DIR] [--out FILE.md] [--page docs/finding.md]

Results are those that ``make finding`` measures (``python -m bench.real --arms bench/finding.yaml``): one small file
for each arm and seed. Nothing is trained here, and it takes a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from bench.finding_stats import Result, read_all
from bench.finding_tables import (
    coverage_tables,
    gaps_table,
    over_time_tables,
    pixels_tables,
    power,
    scores_table,
    search_tables,
    tells_tables,
    transfer_table,
)
from bench.real_arms import variants_of
from ugrl.command import enter
from ugrl.errors import DataError
from ugrl.files import write_whole

STORED = Path(__file__).parent / "results" / "finding"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
# Smaller experiments, each with its file of arms.
BESIDE = ("one_at_a_time", "transfer", "few", "shapes", "over_time")
# Searches of ugrl-tune: name of the folder, and what its table is called.
SEARCHES = {"search": "A search", "corners": "Corners of the search space"}
# The arm that others change one part of.
WHOLE = "IV-decoder"


def read_arms(folder: Path, arms: str = "finding") -> dict[str, dict[int, Result]]:
    """The results in a folder, in the order of a file of arms.

    Raises:
        DataError: There is none, or one cannot be read.
    """
    return read_all(folder, list(variants_of(Path(__file__).with_name(f"{arms}.yaml"))))


def folder_of(name: str, main: Path) -> Path:
    """Where a smaller experiment has its results: as the main arms, with its name in the place of ``finding``.

    >>> folder_of("transfer", Path("runs/finding/results")).as_posix()
    'runs/transfer/results'
    """
    before, found, after = main.as_posix().rpartition("finding")
    return Path(f"{before}{name}{after}") if found else main / name


def beside(folder: Path, found: Mapping[str, Mapping[int, Result]]) -> dict[str, str]:
    """Titles and tables of the smaller experiments that have results."""
    known = {name: read_arms(where, name) for name in BESIDE if (where := folder_of(name, folder)).is_dir()}
    parts = {}
    if (one := known.get("one_at_a_time")) is not None:
        # Seeds that the part has not run of it are those of the main table: the same runs.
        same = {**found.get(WHOLE, {}), **one.get(WHOLE, {})}
        parts["One thing at a time"] = gaps_table({**one, WHOLE: same}, WHOLE)
    if (other := known.get("transfer")) is not None:
        parts["Transfer"] = transfer_table(other)
    if (few := known.get("few")) is not None:
        gaps = [gaps_table(few, base) for base in ("Base+few", "IV-doubts+few", "IV-decoder+few") if base in few]
        parts["With few photographs"] = "\n\n".join((scores_table(few), *gaps))
    if (shapes := known.get("shapes")) is not None:
        gaps = [gaps_table(shapes, "Base")] if "Base" in shapes else []
        parts["On shapes"] = "\n\n".join((scores_table(shapes), *gaps, tells_tables(shapes)))
    if (steps := known.get("over_time")) is not None:
        parts["Over training time"] = over_time_tables(steps)
    for name, title in SEARCHES.items():
        where = folder_of(name, folder)
        # A search has its files in its own folder, a benchmark in one below.
        file = next((file for file in (where / "trials.csv", where.parent / "trials.csv") if file.is_file()), None)
        if file is not None:
            parts[title] = search_tables(file, ends=name == "corners")
    return parts


def report(folder: Path) -> str:
    """All tables of the results in a folder, as Markdown.

    Raises:
        DataError: There is none, or one cannot be read.
    """
    alone = not folder.is_dir() and any(folder_of(name, folder).is_dir() for name in BESIDE)
    found = {} if alone else read_arms(folder)
    parts = {}
    if found:
        parts = {
            "Scores": scores_table(found),
            "Differences to Base": gaps_table(found, "Base") + "\n\n" + power(found),
            "Differences to IV": gaps_table(found, "IV") if "IV" in found else "",
            "Differences to IV-doubts": gaps_table(found, "IV-doubts") if "IV-doubts" in found else "",
            f"Differences to {WHOLE}": gaps_table(found, WHOLE) if WHOLE in found else "",
            "What tells bad pairs": tells_tables(found),
            "Risk and coverage": coverage_tables(found),
            "What tells wrong pixels": pixels_tables(found),
        }
    parts |= beside(folder, found)
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items() if text) + "\n"


def with_tables(page: str, text: str) -> str:
    """A page with other tables, between its two marks.

    Raises:
        DataError: It lacks a mark.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"the page has no '{BEGIN}' before '{END}': put both where the tables belong")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def main(words: list[str] | None = None) -> int:
    """0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench.finding", description=__doc__)
    parser.add_argument("--results", type=Path, default=STORED, metavar="DIR", help="default: those in the project")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="put the tables in the place of those of a page")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the tables there, too")

    def body(args: argparse.Namespace, console: Console) -> int:
        text = report(args.results)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(args.out, text)
        if args.page is not None:
            write_whole(args.page, with_tables(args.page.read_text(encoding="utf-8"), text))
        print(text)
        return 0

    words = sys.argv[1:] if words is None else words
    return enter(parser, words or ["--results", str(STORED)], body, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
