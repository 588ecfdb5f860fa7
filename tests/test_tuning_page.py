"""What a reader of a report sees: pictures, tables, phones; and what names from outside cannot do to it."""

from __future__ import annotations

import csv
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure

from tests.story import SPACE, Story, csv_rows, report
from tuning.report import drawing, plots
from tuning.report.files import write_best
from tuning.report.read import Findings
from tuning.report.sentences import collapse, verdict, weak_rung
from ugrl import config as configs
from ugrl.errors import UgrlError


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Findings, str]:
    """The report of a search of which two trials collapsed, and whose first rung lay where all do."""
    out = tmp_path_factory.mktemp("tune") / "told"
    story = Story(out, final={"best": 2, "seeds": 2})
    story.nothing = 0.12
    for k in range(14):
        story.add("PRUNED", last=80) if k % 3 == 2 else story.add(flat=k in (4, 10))
    first, second = sorted((r for r in story.findings().rows if r.state == "COMPLETE"), key=lambda r: -(r.value or 0))[
        :2
    ]
    for row in (first, second):
        story.rerun(row.number, 2)
    return (out, *report(story, 200))


@pytest.fixture
def figures() -> Iterator[None]:
    with plt.rc_context(drawing.STYLE):
        yield
    plt.close("all")


# -- what learning nothing gives --------------------------------------------------------------


def test_scores_stand_beside_what_learning_nothing_gives(told: tuple[Path, Findings, str]) -> None:
    out, findings, shown = told
    page, table = (out / "report.html").read_text(), csv_rows(out)
    words = "Without learning anything (background everywhere) seg mIoU is 12.00 % on split 'tune_val' and 13.00 % on "
    words += "split 'val'."
    assert words in verdict(findings) and words in shown
    assert "<dd>12.00 %</dd><dt>seg mIoU on tune_val without learning anything</dt>" in page
    assert table[0]["seg_background_miou"] == "0.12" and table[0]["tag_prevalence"] == "0.25"


def test_collapsed_runs_are_called_so(told: tuple[Path, Findings, str]) -> None:
    out, findings, shown = told
    # Trials that were stopped at the same score have not collapsed: they were early.
    assert collapse(findings) == (
        "† marks collapsed runs, whose score is no better than without learning anything: trials 4, 10."
    )
    page = (out / "report.html").read_text()
    assert page.count("12.00 †</td>") == 2 and page.count(">collapsed</td>") == 2 and shown.count("12.0 †") == 2
    assert collapse(findings) in shown
    rows = tuple(r for r in findings.rows if r.number in (4, 10))
    alone = Findings(findings.search, findings.study, rows)
    assert collapse(alone).endswith("The best trial, 4, is one: this search has found nothing yet.")


def test_a_first_rung_that_compared_nothing_is_warned_of(told: tuple[Path, Findings, str], tmp_path: Path) -> None:
    _, findings, _ = told
    assert weak_rung(findings) in verdict(findings)
    assert weak_rung(findings).startswith(
        "At the first rung, step 80, 14 of 14 trials were within 0.50 points of what is had without learning anything "
        "(12.00 %)"
    )
    later = Story(tmp_path, scheduler={"name": "asha", "grace_steps": 120, "reduction_factor": 2})
    later.nothing = 0.12
    later.fill(4)
    assert weak_rung(later.findings()) == ""
    # Runs of a time when this was not noted are judged by the rule for spaces.
    older = Story(tmp_path)
    older.fill(4)
    assert weak_rung(older.findings()).startswith("The first rung, at step 80, is 50 steps after the warm-ups")
    assert collapse(older.findings()) == "" and "Without learning" not in " ".join(verdict(older.findings()))


def test_a_star_on_rank_2_is_explained_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "PLOTS", {})  # what they show of it stands in their legends, which are tested below
    story = Story(tmp_path, final={"best": 2, "seeds": 1})
    for alpha in (8.0, 30.0, 7.0):
        story.add(alpha=alpha, keep=0.45, tau=0.15, d_cls=512, d_seg=512)
    rows = sorted(story.findings().rows, key=lambda r: -(r.value or 0))
    story.rerun(rows[1].number, 1)
    findings, shown = report(story)
    first, second = rows[0].number, rows[1].number
    words = f"★ marks trial {second}, which has rank 2 in the search and is the first of 1 finalist with fresh seeds"
    assert words in shown and f"Rank 1 in the search is trial {first}." in shown
    page = (tmp_path / "report.html").read_text()
    before, after = page.split("<h2", 1)[1].split("All trials</h2>")
    assert words in after and "2 ★</td>" in after
    assert f"★ {second} " in shown


# -- pictures ---------------------------------------------------------------------------------


def _contrast(colors: np.ndarray) -> np.ndarray:
    """Against white, by WCAG 2.1."""
    rgb = colors[:, :3] * colors[:, 3:] + 1 - colors[:, 3:]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05)


def _strokes(figure: Figure) -> np.ndarray:
    """Colours of all lines and marks of a figure, but for those of the grid."""
    found = []
    for ax in figure.axes:
        for drawn in ax.lines:
            found.append(to_rgba_array(drawn.get_color(), drawn.get_alpha()))
        for marks in ax.collections:
            if isinstance(marks, PathCollection):
                found.append(to_rgba_array(marks.get_edgecolor(), marks.get_alpha()))
    return np.concatenate(found)


@pytest.mark.parametrize("plot", [plots.history, plots.curves, plots.slices, plots.parallel, plots.cost])
def test_every_line_and_mark_is_seen_on_white(plot: object, told: tuple[Path, Findings, str], figures: None) -> None:
    drawn = plot(told[1])  # type: ignore[operator]
    assert isinstance(drawn, Figure)
    assert _contrast(_strokes(drawn)).min() >= 3.0


def test_early_scores_do_not_squeeze_the_others(told: tuple[Path, Findings, str], figures: None) -> None:
    _, findings, _ = told
    done = [100 * (r.value or 0) for r in findings.rows if r.state == "COMPLETE" and r.number not in (4, 10)]
    low, high = min(done), max(done)
    for drawn in (plots.slices(findings), plots.history(findings)):
        assert isinstance(drawn, Figure)
        for ax in [a for a in drawn.axes if a.get_visible()]:
            bottom, top = ax.get_ylim()
            assert low - 0.15 * (high - low) < bottom < low and high < top < high + 0.15 * (high - low)
            names = ax.get_legend_handles_labels()[1]
            assert "pruned, beyond the axis" in names and "complete, beyond the axis" in names
            marks = {m.get_label(): m for m in ax.collections}
            edge = marks["pruned, beyond the axis"].get_offsets()
            assert len(edge) == 4 and (edge[:, 1] > bottom).all() and (edge[:, 1] < low).all()
            assert not len(marks["pruned, beyond the axis"].get_facecolor())
    drawn = plots.parallel(findings)
    assert isinstance(drawn, Figure)
    best = next(line for line in drawn.axes[0].lines if str(line.get_label()).startswith("best with fresh seeds"))
    lows = [line for line in drawn.axes[0].lines if line.get_linestyle() == "--"]
    assert len(lows) == 4 and all(line.get_ydata()[-1] == 0.0 for line in lows) and best.get_ydata()[-1] > 0.9


def test_values_with_dollar_signs_and_long_ones_are_drawn(tmp_path: Path, figures: None) -> None:
    names = ["$\\frac{", "x^$_$", "w" * 3000, LINK]
    story = Story(tmp_path, search=SPACE["search"] | {"model.weights": {"choice": names}}, first=[])
    for name in names:
        story.add(weights=name)
    drawn = plots.slices(story.findings())
    assert isinstance(drawn, Figure)
    shown = [t.get_text() for t in drawn.axes[5].get_xticklabels()]
    assert shown[:2] == names[:2] and shown[2].startswith("www") and len(shown[2]) < 30
    assert shown[3].startswith("postgresql") and "ann" not in shown[3]
    drawn.canvas.draw()


# -- text from outside ------------------------------------------------------------------------

TAG = "<script>alert(1)<!--"
CELL = '=HYPERLINK("http://x","y")'
LINK = "postgresql://ann:pa55word@db/ugrl?token=s3cret"
MARKS = "``` [/b] | [x](javascript:y)"
BREAK = f"a\n# b\n```\n\x1b[31m {MARKS}"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A search in which every text that comes from outside is one that a medium could take for its own."""
    out = tmp_path_factory.mktemp("tune") / f"@BODY@ {TAG.replace('/', '')} [b]\nname: stolen"
    axes = {"model.weights": {"choice": [TAG, CELL, MARKS, LINK]}, "method.contrast.keep": {"uniform": [0.05, 0.8]}}
    overrides = SPACE["overrides"] | {"name": f"``` {TAG}", "train.mlflow": "https://ann:pa55word@mlflow.local/x"}
    story = Story(out, search=axes, overrides=overrides, first=[], storage=LINK)
    for value, text in zip((TAG, CELL, MARKS, LINK), (TAG, CELL, BREAK, LINK), strict=True):
        story.add(weights=value, attrs={"host": text, "commit": text, "note": text}, origin=text)
        story.add("FAIL", last=0, weights=value, attrs={"error": text, "host": text})
    return out, report(story)[1]


def test_no_name_becomes_markup(hostile: tuple[Path, str]) -> None:
    out, shown = hostile
    page = (out / "report.html").read_text()
    found = _Tags()
    found.feed(page)
    assert found.tags.count("script") == 1 and page.count("<!--") == 0
    known = {"html", "head", "meta", "link", "title", "style", "body", "header", "h1", "h2", "nav", "a", "main"}
    known |= {"section", "p", "dl", "div", "dd", "dt", "table", "thead", "tbody", "tr", "th", "td", "button"}
    known |= {"figure", "img", "figcaption", "details", "summary", "pre", "script"}
    known |= {"svg", "circle", "polyline", "polygon"}
    assert set(found.tags) <= known
    assert any(TAG in text for text in found.text) and any("@BODY@" in text for text in found.text)
    text = (out / "report.md").read_text()
    outside = re.sub(r"(?ms)^(`{3,})\w+\n.*?\n\1$", "", text)
    assert TAG not in outside and "&lt;script" in outside and "[x](" not in outside
    assert re.findall(r"(?m)^# ", text) == ["# "]
    assert "\x1b" not in shown + page + text and "[/b]" in shown


def test_no_fence_is_left_by_what_it_holds(hostile: tuple[Path, str]) -> None:
    text = (hostile[0] / "report.md").read_text()
    fences = re.findall(r"(?m)^(`{3,})\w*$", text)
    assert len(fences) % 2 == 0 and fences[::2] == fences[1::2]
    for fence, body in re.findall(r"(?ms)^(`{3,})\w+\n(.*?)\n\1$", text):
        assert fence not in body


def test_no_cell_is_a_formula(hostile: tuple[Path, str]) -> None:
    with (hostile[0] / "trials.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 9 and {len(r) for r in rows} == {len(rows[0])}
    assert not [c for r in rows for c in r if re.match(r"[=@\t\r]|[+-](?![\d.])", c)]
    assert any(c == "'" + CELL for r in rows for c in r)


def test_no_credential_is_written_anywhere(hostile: tuple[Path, str]) -> None:
    out, shown = hostile
    written = [p for p in out.rglob("*") if p.is_file() and p.suffix != ".png"]
    assert {p.name for p in written} >= {"report.html", "report.md", "trials.csv", "best.yaml"}
    for path in written:
        text = path.read_text()
        assert "pa55word" not in text and "s3cret" not in text, path.name
    assert "pa55word" not in shown and "postgresql://***@db/ugrl" in shown


def test_the_best_configuration_is_that_of_the_trial_and_no_more(hostile: tuple[Path, str]) -> None:
    cfg = configs.load(hostile[0] / "best.yaml")
    assert cfg.name == f"``` {TAG}-best" and cfg.train.mlflow == "https://***@mlflow.local/x"


@pytest.mark.parametrize("name", ["1e3", "010", "off", "2026-01-01", "~", "a: b # c", "‽\\"])
def test_a_text_that_yaml_takes_for_something_else_is_read_back(name: str, tmp_path: Path) -> None:
    story = Story(tmp_path, search={"model.weights": {"choice": [name, "x"]}}, first=[])
    story.add(weights=name)
    path = write_best(story.findings())
    assert path is not None and configs.load(path).model.weights == name


# -- files ------------------------------------------------------------------------------------


def test_a_disk_that_takes_no_more_leaves_the_old_file_and_says_so(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.add()
    findings = story.findings()
    path = write_best(findings)
    assert path is not None
    before = path.read_bytes()
    story.add(keep=0.45, alpha=8.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(UgrlError) as error:
            write_best(story.findings())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert path.read_bytes() == before and "\n" not in str(error.value) and str(path) in str(error.value)
    assert write_best(story.findings()) == path and path.read_bytes() != before


@pytest.mark.parametrize("name", ["trials.csv", "plots"])
def test_a_file_that_cannot_be_written_is_one_line(name: str, tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.add("RUNNING", last=40)
    (tmp_path / name).mkdir() if name.endswith("csv") else (tmp_path / name).touch()
    with pytest.raises(UgrlError) as error:
        report(story)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


# -- a browser --------------------------------------------------------------------------------

FRAMES = """<body><iframe id=a width=390 height=800 src="{0}"></iframe><iframe id=b width=1400 height=800 src="{0}">
</iframe><pre id=found></pre><script>
addEventListener("load", () => setTimeout(() => {{
  const told = [];
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, small = [...page.querySelectorAll("p, td, th, dt, summary")];
    told.push([frame.width, page.documentElement.scrollWidth, page.querySelectorAll(".wide.more").length,
      page.querySelectorAll(".hint:not([hidden])").length,
      Math.min(...small.map((e) => parseFloat(frame.contentWindow.getComputedStyle(e).fontSize))),
      Math.min(...[...page.images].map((e) => e.naturalWidth && e.clientWidth / e.naturalWidth))].join(" "));
  }}
  document.getElementById("found").textContent = told.join(";");
}}, 300));
</script>"""


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium on PATH: the page is looked at in a real browser"
)
def test_a_browser_shows_the_page_on_a_phone_and_on_a_desk(told: tuple[Path, Findings, str], tmp_path: Path) -> None:
    frames = tmp_path / "frames.html"
    frames.write_text(FRAMES.format((told[0] / "report.html").as_uri()))
    words = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    words += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,900"]
    words += ["--virtual-time-budget=5000", "--dump-dom", frames.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr
    found = re.search(r'<pre id="found">([^<]+)</pre>', done.stdout)
    assert found is not None
    phone, desk = (list(map(float, part.split())) for part in found[1].split(";"))
    for width, content, more, hints, font, _ in (phone, desk):
        assert content <= width and more == hints and font >= 13  # nothing but tables and pictures moves sideways
    assert phone[2] >= 5 and phone[5] > 0.64  # a picture keeps a size at which its words can be read
