"""The marks of a report's plots: each is where its trial is drawn, and says that trial's values and folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image

from tests.story import SPACE, STEPS, Story, report
from tuning.report import drawing
from tuning.report import plots as plots_module
from tuning.report.read import Findings
from tuning.report.spots import answer, spots_of

PLOTS = ("history", "curves", "slices", "contour", "parallel", "cost")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Findings, str]:
    """A search whose trials have their folders, but for trial 3."""
    out = tmp_path_factory.mktemp("tune") / "told"
    story = Story(out)
    story.fill(16)
    story.add("FAIL", last=0, attrs={"error": "RuntimeError: no memory\nat line 7"})
    story.add("RUNNING", last=80)
    for number in range(18):
        if number != 3:
            (out / "trials" / f"{number:03d}").mkdir(parents=True)
    findings, _ = report(story)
    return out, findings, (out / "report.html").read_text()


def marks(page: str, plot: str) -> list[tuple[str, int, list[tuple[float, float]]]]:
    """Form, trial and pixels of each mark over a plot."""
    (svg,) = re.findall(rf'aria-label="{plot}">.*?(<svg.*?</svg>)', page, re.DOTALL)
    found = []
    for form, trial, rest in re.findall(r'<(circle|polyline|polygon) data-t="(\d+)" ([^>]*)/>', svg):
        points = re.findall(r"(-?[\d.]+),(-?[\d.]+)", rest) or [re.findall(r'c[xy]="([^"]+)"', rest)]
        found.append((form, int(trial), [(float(x), float(y)) for x, y in points]))
    assert len(found) == svg.count("data-t=")
    return found


def answers(page: str) -> dict[str, list[str]]:
    (text,) = re.findall(r"^const trials = (\{.*\});$", page, re.MULTILINE)
    return json.loads(text)


def test_each_mark_says_its_trials_values_and_where_its_runs_are(told: tuple[Path, Findings, str]) -> None:
    out, findings, page = told
    said = answers(page)
    assert set(said) == {str(k) for k in range(18)}
    for row in findings.rows:
        text, folder = said[str(row.number)]
        lines = text.splitlines()
        assert lines[0].startswith(f"trial {row.number}") and f": {row.state.lower()} at step {row.step}, " in lines[0]
        assert (", the best" in lines[0]) == (row is findings.best or row.number == findings.best.number)
        if row.value is not None:
            assert f"seg mIoU, %: {100 * row.value:.2f}" in lines
        for path, value in row.params.items():
            shown = next(line for line in lines if line.startswith(path.rpartition(".")[2] + ": "))
            assert float(shown.split(": ")[1]) == pytest.approx(value, rel=5e-3)
        assert folder == ("" if row.number == 3 else f"trials/{row.number:03d}/")
    assert said["16"][0].endswith(" line 7") and "\nRuntimeError: no memory" in said["16"][0]
    links = set(re.findall(r'<a href="(trials/\d+/)">\d+</a>', page))  # and in the table
    assert links == {folder for _, folder in said.values() if folder} and len(links) == 17


def test_marks_lie_on_what_is_drawn(told: tuple[Path, Findings, str]) -> None:
    out, findings, page = told
    for plot in PLOTS:
        found = marks(page, plot)
        with Image.open(out / "plots" / f"{plot}.png") as picture:
            pixels, size = picture.convert("RGB"), picture.size
        assert found and all(0 <= x <= size[0] and 0 <= y <= size[1] for _, _, at in found for x, y in at), plot
        if plot in ("history", "slices"):  # a dot has its colour within some pixels of its middle; others lie across
            for _, trial, ((x, y),) in found:
                row, best = findings.rows[trial], findings.best
                wanted = drawing.BEST if best is not None and trial == best.number else drawing.COLORS[row.state]
                near = pixels.crop((round(x) - 3, round(y) - 3, round(x) + 4, round(y) + 4))
                if row.state == "COMPLETE":  # others may be hollow
                    assert tuple(round(255 * v) for v in to_rgb(wanted)) in set(near.getdata()), (plot, trial)
    scored = {r.number: r.value for r in findings.rows if r.value is not None}
    history = {trial: at[0] for form, trial, at in marks(page, "history") if form == "circle"}
    assert set(history) == set(scored)
    by_x = sorted(history, key=lambda k: history[k][0])
    whole = [k for k in by_x if findings.rows[k].state == "COMPLETE"]
    assert by_x == sorted(history)
    assert sorted(whole, key=lambda k: history[k][1]) == sorted(whole, key=lambda k: -scored[k])


def test_lines_and_bars_are_marks_too(told: tuple[Path, Findings, str]) -> None:
    _, findings, page = told
    lines = [(trial, at) for form, trial, at in marks(page, "curves") if form == "polyline"]
    assert sorted(trial for trial, _ in lines) == [r.number for r in findings.rows if r.curve]
    assert {len(at) for trial, at in lines if findings.rows[trial].state == "COMPLETE"} == {STEPS // 40}
    bars = [trial for form, trial, _ in marks(page, "cost") if form == "polygon"]
    assert sorted(bars) == [r.number for r in findings.rows]
    assert {form for form, _, _ in marks(page, "parallel")} == {"polyline"}
    over = [trial for _, trial, _ in marks(page, "contour")]
    assert set(over) == {r.number for r in findings.rows if r.value is not None} and len(over) >= 3 * len(set(over))


def test_pictures_without_trials_have_no_marks_and_promise_none(told: tuple[Path, Findings, str]) -> None:
    _, _, page = told
    for plot in ("importance", "rungs"):
        figure = page.partition(f'aria-label="{plot}">')[2].partition("</figure>")[0]
        assert "<svg" not in figure and "Point at a trial" not in figure
    assert page.count("Point at a trial") == len(PLOTS)


def test_of_many_trials_a_sample_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "LINES", 6)
    monkeypatch.setattr(plots_module, "PLOTS", {"history": plots_module.history})
    story = Story(tmp_path)
    story.fill(30)
    findings, _ = report(story)
    said = answers((tmp_path / "report.html").read_text())
    assert 6 <= len(said) <= 8 and findings.best is not None and str(findings.best.number) in said


def test_a_mark_beyond_the_axes_is_none() -> None:
    fig, ax = plt.subplots()
    drawing.draw_dots(ax, [(0.5, 0.5), (9.0, 0.5), (float("nan"), 0.5)], [1, 2, 3])
    drawing.draw_dots(ax, [(0.2, 0.2)])
    ax.set(xlim=(0, 1), ylim=(0, 1))
    fig.canvas.draw()
    (spot,) = spots_of(fig)
    plt.close(fig)
    assert (spot.trial, spot.form) == (1, "circle")
    box = ax.get_position()
    assert spot.points[0] == pytest.approx(((box.x0 + box.x1) / 2, 1 - (box.y0 + box.y1) / 2))


def test_what_a_mark_says_is_bounded_and_has_no_credentials(tmp_path: Path) -> None:
    link = "postgresql://ann:pa55word@db/ugrl"
    story = Story(tmp_path, search=SPACE["search"] | {"model.weights": {"choice": [link, "w" * 3000]}}, first=[])
    for weights in (link, "w" * 3000):
        story.add(weights=weights, attrs={"note": f"{link}\n\x1b[31m</script><!--"})
    findings = story.findings()
    texts = [answer(row, findings) for row in findings.rows]
    assert all(len(text) < 1000 and text.replace("\n", "").isprintable() for text in texts)
    assert not any("pa55word" in text for text in texts)
    report(story)
    page = (tmp_path / "report.html").read_text()
    assert page.count("</script>") == 1 and "<!--" not in page
    assert answers(page) == {str(k): [text, ""] for k, text in enumerate(texts)}


# -- a browser --------------------------------------------------------------------------------

POINTER = """<body><iframe id=a width=1400 height=900 src="{}"></iframe><pre id=found></pre><script>
addEventListener("load", () => setTimeout(() => {{
  const frame = document.getElementById("a"), page = frame.contentDocument, told = [];
  const mark = page.querySelector('[aria-label="history"] [data-t="5"]'), tip = page.getElementById("tip");
  mark.scrollIntoView({{block: "center"}});
  const box = mark.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
  const point = (where, kind) => where.dispatchEvent(
    new frame.contentWindow.PointerEvent(kind, {{bubbles: true, clientX: x, clientY: y}}));
  const look = () => told.push([tip.hidden, tip.textContent, tip.querySelector("a")?.getAttribute("href"),
    page.querySelectorAll(".plot .on").length, page.elementFromPoint(x, y)?.dataset.t]);
  look(); point(mark, "pointerover"); look(); point(page.body, "pointerover"); look();
  point(mark, "click"); point(page.body, "pointerover"); look(); point(page.body, "click"); look();
  document.getElementById("found").textContent = JSON.stringify(told);
}}, 300));
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH: pointing is done in a real browser")
def test_a_pointer_is_answered_and_a_click_keeps_the_answer(told: tuple[Path, Findings, str], tmp_path: Path) -> None:
    out, _, page = told
    frame = tmp_path / "frame.html"
    frame.write_text(POINTER.format((out / "report.html").as_uri()))
    words = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    words += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,900"]
    words += ["--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    (text,) = re.findall(r'<pre id="found">([^<]+)</pre>', done.stdout)
    before, over, left, kept, closed = json.loads(text)
    said, folder = answers(page)["5"]
    same = sum(trial == 5 for plot in PLOTS for _, trial, _ in marks(page, plot))
    assert before[0] is True and left[0] is True and left[3] == 0 and closed[0] is True
    assert over[:4] == [False, said + folder, folder, same] and kept[:4] == over[:4]
    assert before[4] == "5"  # nothing lies above the mark
