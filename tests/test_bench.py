"""The benchmark's framework: what a ratio means, what is counted, what is written. Never how long anything takes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import __main__ as program
from bench import measure
from bench.measure import (
    Context,
    Different,
    Entry,
    Growth,
    Skip,
    Skipped,
    compare,
    entry,
    exponent,
    growth,
    holds,
    matches,
    peak_bytes,
    same,
)
from bench.memory import LiveBytes
from bench.report import Report, plot

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"cpu", "cores", "memory_bytes", "gpu", "os"}
FIELDS = {"name", "unit", "ours", "baseline", "ratio", "spread", "memory_ratio", "gate", "memory_gate", "holds", "note"}


def context(tmp_path: Path, *, quick: bool = True, **more: Any) -> Context:
    return Context(quick=quick, device=torch.device("cpu"), threads=1, tmp=tmp_path, log=lambda _: None, **more)


# --- ratios, spread, gates ----------------------------------------------------------------------------------------


def test_a_time_is_better_when_it_is_smaller() -> None:
    made = entry("a/b", [1.0, 2.0, 1.0], [4.0, 6.0, 10.0])
    assert (made.ratio, made.spread) == (4.0, (3.0, 10.0))
    assert (made.ours, made.baseline, made.rounds) == (1.0, 6.0, 3)
    assert made.holds is None


def test_a_rate_is_better_when_it_is_larger() -> None:
    made = entry("a/b", [40.0, 60.0], [10.0, 10.0], unit="crops/s", gate=6.0)
    assert (made.ratio, made.spread, made.holds) == (5.0, (4.0, 6.0), False)


def test_the_ratio_is_of_rounds_not_of_medians() -> None:
    """A machine that slows down for a round slows both sides of it."""
    made = entry("a/b", [1.0, 10.0, 1.0, 10.0, 1.0], [3.0, 30.0, 3.0, 30.0, 3.0])
    assert made.ratio == 3.0 and made.spread == (3.0, 3.0)


@pytest.mark.parametrize(
    ("ratio", "gate", "memory", "memory_gate", "expected"),
    [
        (2.0, None, 9.0, None, None),
        (2.0, 2.0, None, None, True),
        (1.9, 2.0, None, None, False),
        (2.0, 2.0, 24.9, 25.0, False),
        (2.0, 2.0, 25.0, 25.0, True),
        (2.0, None, None, 25.0, False),
    ],
)
def test_gates(
    ratio: float, gate: float | None, memory: float | None, memory_gate: float | None, expected: bool | None
) -> None:
    assert holds(ratio, gate, memory, memory_gate) is expected


def test_a_limit_bounds_our_own_value() -> None:
    assert entry("a/b", [0.010], [0.100], gate=8.0, limit=0.015).holds is True
    assert entry("a/b", [0.020], [0.200], gate=8.0, limit=0.015).holds is False
    assert entry("a/b", [0.010], [0.020], gate=8.0, limit=0.015).holds is False
    assert entry("a/b", [900.0], [100.0], unit="images/s", limit=533.0).holds is True


# --- compare ------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when a side says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=self.read, process_time=self.read))

    def read(self) -> float:
        return self.now

    def side(self, name: str, seconds: float) -> Callable[[], str]:
        def run() -> str:
            self.calls.append(name)
            self.now += seconds
            return name

        return run


@pytest.mark.parametrize(("threads", "unit", "ours"), [(1, "s", 0.5), (2, "s", 0.5), (1, "images/s", 2.0)])
def test_compare_divides_by_what_a_call_makes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, threads: int, unit: str, ours: float
) -> None:
    clock = Clock(monkeypatch)
    ctx = Context(quick=False, device=torch.device("cpu"), threads=threads, tmp=tmp_path, log=lambda _: None)
    made = compare("a/b", clock.side("o", 2.0), clock.side("b", 6.0), ctx=ctx, per=4.0, unit=unit, memory=False)
    assert made.ours == pytest.approx(ours)
    assert made.ratio == pytest.approx(3.0) and made.spread == pytest.approx((3.0, 3.0))
    assert made.memory_ratio is None and made.rounds == 7


def test_rounds_are_interleaved_and_their_order_alternates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch)
    compare("a/b", clock.side("o", 1.0), clock.side("b", 1.0), ctx=context(tmp_path), rounds=4, memory=False)
    assert clock.calls[-8:] == ["o", "b", "b", "o", "o", "b", "b", "o"]
    assert clock.calls[:2] == ["o", "o"]  # warm-up


def test_short_calls_are_repeated_within_a_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch)
    made = compare("a/b", clock.side("o", 0.01), clock.side("b", 0.08), ctx=context(tmp_path), rounds=1, memory=False)
    assert made.ours == pytest.approx(0.01) and made.ratio == pytest.approx(8.0)
    assert clock.calls.count("o") == 2 + 5 and clock.calls.count("b") == 2 + 1


@pytest.mark.parametrize(
    ("quick", "seconds", "rounds", "warm"),
    [(True, 1.0, 4, 2), (True, 30.0, 1, 1), (False, 30.0, 2, 1), (False, 1.0, 4, 2)],
)
def test_a_long_side_gets_fewer_rounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick: bool, seconds: float, rounds: int, warm: int
) -> None:
    clock = Clock(monkeypatch)
    ctx = context(tmp_path, quick=quick)
    sides = clock.side("o", 0.5 * seconds), clock.side("b", 0.5 * seconds)
    made = compare("a/b", *sides, ctx=ctx, rounds=4, budget=8.0, memory=False)
    assert made.rounds == rounds
    # A call of 15 s is its own warm-up; a short one has another whose caches are filled.
    assert clock.calls.count("b") == rounds + warm


def test_what_is_left_of_a_module_bounds_an_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch)
    ctx = context(tmp_path, until=10.0)
    assert ctx.left == 10.0
    made = compare("a/b", clock.side("o", 1.0), clock.side("b", 1.0), ctx=ctx, budget=1000.0, memory=False)
    assert made.rounds == 3  # after four seconds of warm-up
    clock.now = 11.0
    assert ctx.left == 0.0


def test_results_are_checked_before_anything_is_reported(tmp_path: Path) -> None:
    x = torch.ones(3)

    def check(ours: Tensor, baseline: Tensor) -> None:
        same("a/b", ours, baseline, 1e-6)

    with pytest.raises(Different, match=r"a/b: the sides differ by 5\.00e-01"):
        compare("a/b", lambda: x * 3, lambda: x * 2, ctx=context(tmp_path), check=check)
    assert compare("a/b", lambda: x * 2, lambda: x + x, ctx=context(tmp_path), rounds=1, check=check).rounds == 1


def test_same_refuses_shapes_and_nan() -> None:
    one = torch.ones(2, 3)
    assert same("a", (one, one), (one, one + 1e-9), 1e-6) <= 1e-6
    with pytest.raises(Different, match="shapes"):
        same("a", one, one.T, 1.0)
    with pytest.raises(Different, match="nan"):
        same("a", one * math.nan, one, 1.0)


def test_memory_is_the_ratio_of_peaks(tmp_path: Path) -> None:
    x = torch.ones(1000)
    made = compare("a/b", lambda: x + 1, lambda: (x + 1) * 2, ctx=context(tmp_path), rounds=1, memory_gate=2.0)
    assert (made.ours_bytes, made.baseline_bytes) == (4000, 8000)
    assert made.memory_ratio == 2.0 and made.holds is True


# --- memory -------------------------------------------------------------------------------------------------------

N = 1000
SIZE = 4 * N


def test_live_bytes_counts_results_until_they_are_freed() -> None:
    x = torch.ones(N)
    with LiveBytes() as book:
        a = x + 1
        b = a * 2
        assert book.now == 2 * SIZE
        del a
        assert book.now == SIZE
        c = b - 1
        assert book.now == 2 * SIZE
    assert (book.peak, book.largest) == (2 * SIZE, SIZE)
    del b, c
    assert book.now == 0


def test_live_bytes_leaves_inputs_and_views_out() -> None:
    x = torch.ones(N, requires_grad=True)
    y = torch.ones(10, N // 10)
    with LiveBytes() as book, torch.no_grad():
        for z in (x.view(10, -1), x[::2], x.detach(), y.T, y.add_(1), y.expand(3, 10, N // 10)):
            assert z.numel()
    assert book.peak == 0


def test_live_bytes_sees_the_backward_pass() -> None:
    x = torch.ones(N, requires_grad=True)
    with LiveBytes() as book:
        y = x.exp()  # kept for the backward pass
        z = y.sum()  # 4 bytes
        assert book.now == SIZE + 4
        (grad,) = torch.autograd.grad(z, x)
        assert book.now == SIZE + SIZE + 4  # y and z by name, the gradient; its expanded ones were 4 bytes
        assert book.peak == 2 * SIZE + 4 + 4
    assert torch.equal(grad, y.detach())


class Twice(torch.autograd.Function):
    """Makes one temporary of its own in each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x + 1)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        temporary = grad * 1
        return temporary * 2 + 0 * kept.sum()


def test_live_bytes_sees_custom_functions_both_ways() -> None:
    x = torch.ones(N, requires_grad=True)
    with LiveBytes() as book:
        y = Twice.apply(x)
        assert book.now == 2 * SIZE  # what was kept, and the result
        book.peak = book.now
        y.backward(torch.ones_like(y))
        # The kept one, the result, the gradient given, the temporary, twice it, and the sum of both.
        assert book.peak == 6 * SIZE + 4
        assert torch.equal(x.grad, torch.full((N,), 2.0))
        del y
        assert book.now == SIZE  # x.grad
    x.grad = None
    assert book.now == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_live_bytes_takes_composites_apart(mode: Callable[[], Any]) -> None:
    """einsum of a transposed product makes copies inside, which inference mode would hide."""
    a, b = torch.ones(8, 16, 4), torch.ones(8, 16, 4)
    with mode(), LiveBytes() as book:
        out = torch.nn.functional.conv1d(a.transpose(1, 2), torch.ones(4, 4, 1), padding="same")
        assert out.shape == (8, 4, 16)
        peak = book.peak
        torch.einsum("bij,bkj->ik", a, b)
    assert peak >= out.untyped_storage().nbytes()
    assert book.peak > peak + 16 * 16 * 4  # copies of both operands beside the result


def test_peak_bytes_hands_on_what_the_call_returned(tmp_path: Path) -> None:
    x = torch.ones(N)
    peak, out = peak_bytes(lambda: (x + 1).sum(), context(tmp_path))
    assert peak == SIZE + 4 and float(out) == 2 * N


# --- growth -------------------------------------------------------------------------------------------------------


def test_exponents_are_least_squares_on_logarithms() -> None:
    assert exponent([(n, 5.0 * n**1.5) for n in (1, 2, 4, 8)]) == pytest.approx(1.5)
    assert exponent([(1, 1.0), (2, 4.0), (4, 4.0)]) == pytest.approx(1.0)
    assert exponent([(2, 1.0)]) is None and exponent([(2, 1.0), (2, 2.0)]) is None
    assert exponent([(1, 0.0), (2, 1.0)]) is None


def test_growth_measures_time_and_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch)

    def make(n: int) -> Callable[[], Tensor]:
        x = torch.ones(n)
        tick = clock.side("g", n**2 / 1e4)
        return lambda: (tick(), x + 1)[1]

    made = growth("growth/toy", "n", (10, 20, 40), make, ctx=context(tmp_path), budget=1e6)
    assert made.points == [(n, pytest.approx(n**2 / 1e4), 4 * n) for n in (10.0, 20.0, 40.0)]
    assert made.time_exponent == pytest.approx(2.0) and made.memory_exponent == pytest.approx(1.0)
    short = growth("growth/toy", "n", (10, 20, 40, 80, 160), make, ctx=context(tmp_path), budget=1.0)
    assert len(short.points) < 5 and "for time" in short.note


# --- the program --------------------------------------------------------------------------------------------------


def toy(items: list[Any], **names: Any) -> Any:
    def entries(ctx: Context) -> Iterator[Any]:
        for item in items:
            if isinstance(item, BaseException):
                raise item
            yield item

    return SimpleNamespace(entries=entries, **names)


GOOD = entry("step/a", [1.0], [4.0], gate=3.0)
BAD = entry("step/b", [1.0], [2.0], gate=3.0)
CURVE = Growth("growth/x", "n", [(1.0, 1.0, 4), (2.0, 2.0, 8)], 1.0, 1.0)


def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, modules: dict[str, Any], *words: str
) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(program, "plot", lambda report, folder: [])
    monkeypatch.setattr(program, "_load", lambda name: modules.get(name) or Skipped(name, "not there"))
    path = tmp_path / "out.json"
    code = program.main([*words, "--json", str(path), "--plots", str(tmp_path / "plots"), "--device", "cpu"])
    return code, json.loads(path.read_text()) if path.exists() else {}


def test_the_json_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modules = {"step": toy([GOOD, BAD, Skipped("step/cuda", "needs a GPU")]), "growth": toy([CURVE])}
    code, tree = run(monkeypatch, tmp_path, modules, "--quick")
    assert code == 0
    assert set(tree) == {
        *("machine", "versions", "commit", "quick", "threads", "device", "seconds", "modules"),
        *("entries", "growth", "skipped", "failed"),
    }
    assert set(tree["machine"]) == MACHINE and tree["machine"]["cores"] >= 1
    assert {"python", "torch", "timm", "numpy", "pyarrow", "rich"} <= set(tree["versions"])
    assert tree["quick"] is True and tree["threads"] == 1
    assert all(FIELDS <= set(e) for e in tree["entries"])
    assert [(e["name"], e["ratio"], e["holds"]) for e in tree["entries"]] == [("step/a", 4, True), ("step/b", 2, False)]
    assert tree["growth"][0]["points"] == [[1.0, 1.0, 4], [2.0, 2.0, 8]]
    assert {"name": "step/cuda", "why": "needs a GPU"} in tree["skipped"]
    assert {"name": "loader", "why": "not there"} in tree["skipped"]
    assert set(tree["modules"]) == set(program.MODULES)
    shown = capsys.readouterr().out
    assert "step/b" in shown and "skipped step/cuda: needs a GPU" in shown


def test_the_markdown_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "out.md"
    run(monkeypatch, tmp_path, {"step": toy([GOOD, BAD]), "growth": toy([CURVE])}, "--markdown", str(path))
    lines = path.read_text().splitlines()
    assert "| step/a | 1 s | 4 s | 4.00× |  | 3x | yes |" in lines
    assert "| step/b | 1 s | 2 s | 2.00× |  | 3x | **no** |" in lines
    assert "| growth/x | n | 1 s at 1 | 2 s at 2 | 1.00 | 1.00 |" in lines


def test_check_makes_a_missed_gate_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path, {"step": toy([GOOD, BAD])}, "--only", "step", "--check")[0] == 1
    assert run(monkeypatch, tmp_path, {"step": toy([GOOD])}, "--only", "step", "--check")[0] == 0


def test_a_module_that_cannot_run_is_skipped_and_one_that_fails_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    modules = {
        "step": toy([GOOD, Skip("no photographs here")]),
        "par": toy([ImportError("No module named 'cv2'")]),
        "loader": toy([entry("loader/a", [1.0], [1.0]), Different("loader/b: the sides differ")]),
        "growth": toy([CURVE]),
    }
    code, tree = run(monkeypatch, tmp_path, modules)
    assert code == 1
    assert {"name": "step", "why": "no photographs here"} in tree["skipped"]
    assert any(s["name"] == "par" and "cv2" in s["why"] for s in tree["skipped"])
    failed = tree["failed"]
    assert failed == [{"name": "loader", "after": "loader/a", "error": "Different: loader/b: the sides differ"}]
    assert [e["name"] for e in tree["entries"]] == ["step/a", "loader/a"] and len(tree["growth"]) == 1


def test_an_interrupted_run_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []

    def entries(ctx: Context) -> Iterator[Entry]:
        yield GOOD
        seen.append(len(json.loads((tmp_path / "out.json").read_text())["entries"]))
        raise KeyboardInterrupt

    code, tree = run(monkeypatch, tmp_path, {"step": SimpleNamespace(entries=entries)})
    assert seen == [1] and code == 130 and [e["name"] for e in tree["entries"]] == ["step/a"]


def test_only_chooses_modules_and_entries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    modules = {"step": toy([GOOD, BAD], NAMES=("step/a", "step/b")), "growth": toy([CURVE])}
    assert [e["name"] for e in run(monkeypatch, tmp_path, modules, "--only", "step/b")[1]["entries"]] == ["step/b"]
    tree = run(monkeypatch, tmp_path, modules, "--only", "growth", "step/a")[1]
    assert [e["name"] for e in tree["entries"]] == ["step/a"] and len(tree["growth"]) == 1
    assert set(tree["modules"]) == {"step", "growth"}
    assert matches("step/512-base", "step/512") and not matches("step/512", "step/512-base")


@pytest.mark.parametrize(
    ("word", "listed"), [("affinty", "affinity"), ("step/c", "step/b"), ("growth/unknown", "growth")]
)
def test_an_unknown_name_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, listed: str
) -> None:
    modules = {"step": toy([GOOD, BAD], NAMES=("step/a", "step/b")), "growth": toy([CURVE])}
    assert run(monkeypatch, tmp_path, modules, "--only", word)[0] == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert word in last and listed in last


def test_the_time_of_a_quick_run_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in program.MODULES:
        monkeypatch.setitem(program.QUICK_SECONDS, name, 1000 if name == "growth" else 0)
    modules = {"step": toy([GOOD, BAD], NAMES=("step/a", "step/b")), "growth": toy([CURVE])}
    tree = run(monkeypatch, tmp_path, modules, "--quick")[1]
    assert [e["name"] for e in tree["entries"]] == ["step/a"] and len(tree["growth"]) == 1
    assert {"name": "step/b", "why": "no time left with --quick"} in tree["skipped"]
    assert [e["name"] for e in run(monkeypatch, tmp_path, modules)[1]["entries"]] == ["step/a", "step/b"]


def test_every_module_has_its_share_of_ten_minutes() -> None:
    assert set(program.QUICK_SECONDS) == set(program.MODULES)
    assert sum(program.QUICK_SECONDS.values()) <= 600


def test_no_number_of_the_file_is_infinite(tmp_path: Path) -> None:
    report = Report(quick=True, threads=1, device="cpu")
    report.add(entry("a/b", [1.0], [math.inf]))
    report.write(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)["entries"][0]["ratio"] is None


def test_plots_need_matplotlib_and_are_left_out_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = Report(quick=True, threads=1, device="cpu", entries=[GOOD, BAD], growth=[CURVE])
    with monkeypatch.context() as m:
        m.setattr("bench.report.find_spec", lambda name: None)
        assert plot(report, tmp_path / "none") == [] and not (tmp_path / "none").exists()
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    made = plot(report, tmp_path / "some")
    assert [p.name for p in made] == ["ratios.png", "growth.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in made)


def test_the_command_runs(tmp_path: Path) -> None:
    path = tmp_path / "affinity.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench", "--only", "affinity", "--quick", "--device", "cpu"),
            *("--json", str(path), "--plots", str(tmp_path / "plots")),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    tree = json.loads(path.read_text())
    assert {e["name"] for e in tree["entries"]} >= {"affinity/full", "affinity/pool", "affinity/apply", "affinity/mlp"}
    for e in tree["entries"]:
        assert FIELDS <= set(e) and e["unit"] == "s"
        assert e["ours"] > 0 and e["baseline"] > 0 and e["spread"][0] <= e["ratio"] <= e["spread"][1]
        assert (e["holds"] is None) == (e["gate"] is None and e["memory_gate"] is None)
    assert "affinity/full" in done.stdout and not tree["failed"]
