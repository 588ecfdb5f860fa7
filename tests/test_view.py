"""The page and the figures: what they show is what the run does, for every kind of data, in a real browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import tiny_tree
from ugrl.cli import main
from ugrl.config import build
from ugrl.data.folder import FolderSource
from ugrl.data.prepare import prepare
from ugrl.data.reader import ShardReader
from ugrl.data.shapes import ShapesSource, ShapesSpec
from ugrl.errors import CheckpointError
from ugrl.eval import PALETTES
from ugrl.eval.metrics import auroc
from ugrl.eval.palettes import palette, u_share
from ugrl.train.loop import Trainer
from ugrl.view import figures, page, pictures
from ugrl.view.collect import Run, check_classes, looks, marks_of, open_run
from ugrl.view.serve import Server

CPU = torch.device("cpu")


def train(shards: Path, out: Path, **more: Any) -> Path:
    tree = tiny_tree(steps=3, cls_warmup_iters=1, lr_warmup_iters=1, checkpoint_every=3, eval_every=3, **more)
    Trainer(build(tree), shards=shards, out=out, quiet=True, device="cpu").fit()
    return out


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(shards, tmp_path_factory.mktemp("view") / "run")


@pytest.fixture(scope="module")
def other(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(shards, tmp_path_factory.mktemp("view") / "other", lr=2e-3)


@pytest.fixture(scope="module")
def run(trained: Path) -> Run:
    return open_run(trained, best=False, device=CPU)


@pytest.fixture(scope="module")
def shown(trained: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of one run."""
    out = tmp_path_factory.mktemp("page") / "one.html"
    assert main(["view", str(trained), "--data", str(shards), "--out", str(out), "--device", "cpu"]) == 0
    return out


@pytest.fixture(scope="module")
def both(trained: Path, other: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two runs."""
    out = tmp_path_factory.mktemp("page") / "two.html"
    words = ["view", str(trained), str(other), "--data", str(shards), "--out", str(out), "--device", "cpu"]
    assert main(words) == 0
    return out


def facts(text: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    tree: dict[str, Any] = json.loads(found[1])
    return tree


def sources(text: str, names: list[str]) -> list[dict[str, str]]:
    """The pictures of each photograph, by name."""
    blocks = re.findall(r'<script id="p\d+" type="text/plain">(.*?)</script>', text, re.DOTALL)
    return [dict(zip(names, block.split("\n"), strict=True)) for block in blocks]


def opened(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))


@pytest.fixture(scope="module")
def apart(trained: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of one run with its pictures beside it."""
    out = tmp_path_factory.mktemp("page") / "a b#.html"
    words = ["view", str(trained), "--data", str(shards), "--out", str(out), "--embed", "0", "--device", "cpu"]
    assert main(words) == 0
    return out


# -- what is collected ------------------------------------------------------------------------


def test_the_scores_are_those_of_a_validation(
    trained: Path, shards: Path, shown: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(trained), "--data", str(shards), "--device", "cpu", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["metrics"]
    assert facts(shown.read_text())["runs"][0]["miou"] == pytest.approx(measured["seg_miou"], abs=1e-4)
    found = figures.collect([run], ShardReader(shards, "val"), range(16), images=2)
    u, p, iou = (torch.tensor([getattr(pair, name) for pair in found.pairs]) for name in ("u", "p", "iou"))
    bad = iou < np.median(iou.double().numpy())
    assert auroc(u, bad) == pytest.approx(measured["u_auroc"])
    assert auroc(1 - p, bad) == pytest.approx(measured["p_auroc"])


def test_a_pixel_has_the_uncertainty_of_its_pseudo_label(run: Run, shards: Path) -> None:
    for look in (look for batch in looks(run, ShardReader(shards, "val"), range(16)) for look in batch):
        assert set(look.u) <= {0, *look.tags} and set(np.unique(look.pseudo_HW)) <= {0, *look.tags, 255}
        for c in np.unique(look.pseudo_HW):
            wanted = np.float32(look.u.get(int(c), np.nan))
            assert np.array_equal(np.unique(look.u_HW[look.pseudo_HW == c]), [wanted], equal_nan=True)
        assert look.cam_HW.shape == look.predicted_HW.shape == look.image_HW3.shape[:2] == (48, 48)


def test_an_error_is_of_the_mask_or_else_of_the_classifier(run: Run, shards: Path) -> None:
    look = next(looks(run, ShardReader(shards, "val"), [0]))[0]
    assert look.truth_HW is not None
    perfect = replace(look, predicted_HW=np.where(look.truth_HW == 255, 0, look.truth_HW).astype(np.uint8))
    assert marks_of(perfect).miou == 1 and marks_of(perfect).error == 0
    probs_F = np.zeros(len(look.probs_F), np.float32)
    probs_F[look.tags[0] - 1] = 0.75
    blind = replace(look, truth_HW=None, probs_F=probs_F, tags=look.tags[:1], u={0: 0.9, look.tags[0]: 0.5})
    assert marks_of(blind).error == 0.25 and np.isnan(marks_of(blind).miou) and marks_of(blind).u == 0.5


def test_some_photographs_have_a_mask_and_some_no_tag(run: Run, shards: Path, tmp_path: Path) -> None:
    """Of any size; a small one is shown without what it was padded with."""
    names = run.got.class_names
    root = tmp_path / "photos"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "classes.txt").write_text("\n".join(names))
    rng = np.random.default_rng(0)
    for name, (w, h) in {"a": (40, 60), "b": (40, 60), "c": (70, 50), "d": (9, 7), "e": (40, 40)}.items():
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(root / "images" / f"{name}.png")
    labels = np.zeros((60, 40), np.uint8)
    labels[:20] = 1
    Image.fromarray(labels).save(root / "masks" / "b.png")
    rows = ["file,split,tags", f"a.png,val,{names[0]}", f"b.png,val,{names[0]}", "c.png,val,", f"d.png,val,{names[1]}"]
    (root / "tags.csv").write_text("\n".join([*rows, f"e.png,train,{names[2]}"]))
    prepare(FolderSource(root), tmp_path / "out", tune_val=0, progress=False)
    reader = ShardReader(tmp_path / "out", "val")
    found = {look.id: look for batch in looks(run, reader, range(len(reader))) for look in batch}
    assert [found[id].truth_HW is not None for id in "abcd"] == [False, True, False, False]
    assert np.array_equal(found["b"].truth_HW, labels)
    assert found["d"].image_HW3.shape == (7, 9, 3) and found["d"].cam_HW.shape == (7, 9)
    assert found["c"].tags == () and not found["c"].cam_HW.any() and not found["c"].pseudo_HW.any()
    made = page.build(page.gather([run], reader, range(4), size=64), "view.html", embed=10**6)
    told = facts(made.files["view.html"].decode())["photographs"]
    assert [photo["runs"][0]["miou"] is None for photo in told] == [True, False, True, True]
    assert all(photo["runs"][0]["error"] is not None for photo in told)


# -- the page ---------------------------------------------------------------------------------


def test_one_file_holds_everything(shown: Path) -> None:
    text = shown.read_text()
    assert [p.name for p in shown.parent.iterdir()] == ["one.html"]
    assert "http:" not in text and "https:" not in text and "default-src 'none'" in text
    assert not re.search(r"<(link|script|img)[^>]+(src|href)=\"(?!data:)", text)
    told = facts(text)
    assert len(told["photographs"]) == 16 and told["pictures"][:2] == ["photo", "truth"]
    for photo, files in zip(told["photographs"], sources(text, told["pictures"]), strict=True):
        assert all(opened(source).size == (photo["w"], photo["h"]) for source in files.values())


def test_colours_of_labels_are_those_of_the_legend(shown: Path, run: Run, shards: Path) -> None:
    text = shown.read_text()
    told = facts(text)
    files = sources(text, told["pictures"])
    for look in (look for batch in looks(run, ShardReader(shards, "val"), range(16)) for look in batch):
        rgba = np.asarray(opened(files[look.index]["truth"]).convert("RGBA"))
        assert look.truth_HW is not None
        assert np.array_equal(rgba[..., 3] == 0, look.truth_HW == 0)
        for c in set(np.unique(look.truth_HW).tolist()) - {0, 255}:
            assert {"#" + bytes(v).hex() for v in rgba[look.truth_HW == c][:, :3]} == {told["colours"][c]}
        assert set(told["photographs"][look.index]["truth"]) == set(np.unique(look.truth_HW).tolist()) - {0, 255}


def test_ignored_pixels_have_a_colour_of_their_own() -> None:
    labels = np.array([[0, 3], [255, 3]], np.uint8)
    for name in PALETTES:
        colours = palette(name)
        rgba = np.asarray(Image.open(io.BytesIO(pictures.labels(labels, (2, 2), colours))).convert("RGBA"))
        assert rgba[1, 0].tolist() == [224, 224, 192, 150] and rgba[0, 0, 3] == 0
        assert rgba[0, 1].tolist() == [*colours[3].tolist(), 255]


def test_heat_becomes_lighter_with_the_value() -> None:
    grey = pictures.heat(np.linspace(0, 1, 40)).astype(float) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(grey) > 0).all()
    some = np.array([[np.nan, 0.0], [0.5, 7.0]])
    rgba = np.asarray(Image.open(io.BytesIO(pictures.levels(some, (2, 2)))).convert("RGBA"))
    assert rgba[0, 0, 3] == 0 and rgba[1, 1, :3].tolist() == list(pictures.HEAT[-1])


def test_colours_of_u_follow_its_kind(run: Run, shards: Path) -> None:
    """The pictures, and what the legend says of each run."""
    cfg = run.got.cfg
    method = replace(cfg.method, uncertainty=replace(cfg.method.uncertainty, kind="margin"))
    margin = replace(run, got=replace(run.got, cfg=replace(cfg, method=method)))
    reader = ShardReader(shards, "val", cfg.data)
    album = page.gather([run, margin], reader, [0], size=64)
    (look,) = next(iter(looks(run, reader, [0])))
    assert np.isfinite(look.u_HW).any()
    at = pictures.fitted(look.u_HW.shape, 64)
    for k, kind in enumerate(("distance", "margin")):
        assert album.photographs[0].files[f"u{k}"] == pictures.levels(u_share(look.u_HW, kind), at)
    assert [r["u_colours"] for r in page._facts(album)["runs"]] == [(0.0, 1.0), (0.6, 1.4)]


def test_a_large_page_keeps_its_pictures_in_a_folder(
    trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["view", str(trained), "--data", str(shards), "--out", str(tmp_path / "big.html"), "--device", "cpu"]
    assert main([*words, "--embed", "0", "--limit", "5"]) == 0
    assert "big.html: 5 photographs, " in (said := capsys.readouterr()).out and "with 30 pictures in " in said.out
    assert "the first 5 of 16 images (--limit)" in said.err
    text = (tmp_path / "big.html").read_text()
    named = {unquote(p) for files in sources(text, facts(text)["pictures"]) for p in files.values()}
    assert named == {str(p.relative_to(tmp_path)) for p in (tmp_path / "big_files").iterdir()} and len(named) == 30
    (tmp_path / "big_files" / "note.txt").write_text("mine")
    assert main([*words, "--embed", "0", "--limit", "2", "--size", "32"]) == 0  # its own page is written anew
    assert len(list((tmp_path / "big_files").iterdir())) == 13
    assert Image.open(tmp_path / "big_files" / "000000-photo.webp").size == (32, 32)


def test_names_from_outside_are_text(run: Run, shards: Path) -> None:
    bad = "</script><script>alert(1)</script>"
    reader = ShardReader(shards, "val")
    names = (bad, *run.got.class_names[1:])
    reader.manifest = replace(reader.manifest, class_names=names)
    album = page.gather([replace(run, name=bad + "\x1b[31m")], reader, [0], size=32)
    album.photographs[0].facts["id"] = bad
    text = page.build(album, "view.html", embed=10**6).files["view.html"].decode()
    assert bad not in text and "\x1b" not in text and text.count("</script>") == 3
    assert facts(text)["photographs"][0]["id"] == bad and facts(text)["classes"][1].startswith("</script>")


# -- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("view {tmp}/none --data {shards} --out {tmp}/v.html", "no checkpoint there"),
        ("view {run} {tmp}/none --data {shards} --out {tmp}/v.html", "no checkpoint there"),
        ("view {run} --data {tmp}/none --out {tmp}/v.html", "manifest"),
        ("view {run} --data {shards} --split vall --out {tmp}/v.html", "did you mean 'val'"),
        ("view {run} --data {shards} --split test --out {tmp}/v.html", "split"),
        ("view {run} --data {few} --out {tmp}/v.html", "run: trained on 6 classes ("),
        ("view {run} --data {shards} --out {tmp}/v.txt", "expected the name of a page, such as v.txt.html"),
        ("view {run} --data {shards} --out {tmp}/mine.html", "ugrl view has not written it"),
        ("view {run} --data {shards} --out {tmp}/dir.html", "is a folder; expected the name of a page"),
        ("view {run} --data {shards} --out {tmp}/mine.html/v.html", "--out "),
        ("view {run} --data {shards} --out {tmp}/v.html --port 80", "--port is of --serve"),
        ("view {run} --data {shards} --out {tmp}/v.html --device gpu", "--device 'gpu' is unknown"),
        ("figures {tmp}/none --data {shards} --out {tmp}/f", "no checkpoint there"),
        ("figures {run} --data {few} --out {tmp}/f", "trained on 6 classes"),
        ("figures {run} --data {shards} --out {tmp}/mine.html", "is a file; expected a folder"),
    ],
)
def test_bad_input_is_one_line_and_a_status(
    argv: str, message: str, trained: Path, shards: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.html").write_text("<p>mine")
    (tmp_path / "dir.html").mkdir()
    assert main([w.format(run=trained, tmp=tmp_path, shards=shards, few=few) for w in argv.split(" ")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "v.html").exists() and not (tmp_path / "f").exists()


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two classes of other names."""
    root = tmp_path_factory.mktemp("few") / "photos"
    (root / "images").mkdir(parents=True)
    for name in "abcd":
        Image.new("RGB", (40, 40), (90, 120, 30)).save(root / "images" / f"{name}.png")
    (root / "tags.csv").write_text("file,split,tags\na.png,train,car\nb.png,train,bus\nc.png,val,car\nd.png,val,bus\n")
    prepare(FolderSource(root), root.parent / "out", tune_val=0, progress=False)
    return root.parent / "out"


@pytest.mark.parametrize("words", [["--limit", "0"], ["--size", "x"], ["--port", "70000"], ["--palette", "red"]])
def test_wrong_words_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["view", "run", "--data", "s", *words])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_two_runs_of_different_classes_are_named(run: Run, shards: Path) -> None:
    stranger = replace(run, name="stranger", got=replace(run.got, class_names=("car", "bus")))
    words = r"stranger was trained on 2 classes \(car, bus\), run on 6 classes"
    with pytest.raises(CheckpointError, match=words):
        check_classes([run, stranger], ShardReader(shards, "val").manifest)


def test_a_split_without_images_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(ShapesSource(ShapesSpec(train=2, val=1, size=48)), tmp_path / "s", tune_val=0, progress=False)
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    manifest["splits"]["val"].update(rows=0, with_masks=0, shards=[])
    (tmp_path / "s/manifest.json").write_text(json.dumps(manifest))
    assert main(["view", str(trained), "--data", str(tmp_path / "s"), "--out", str(tmp_path / "v.html")]) == 2
    assert "split 'val' has no images; choose another --split" in capsys.readouterr().err


# -- the server -------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(page.Page({"view.html": b"<p>page", "view_files/0.png": b"picture"})) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "host", "status", "body"),
    [
        ("/", "127.0.0.1", 200, b"<p>page"),
        ("/view.html?x=1", "localhost", 200, b"<p>page"),
        ("/view_files/0.png", "127.0.0.1", 200, b"picture"),
        ("/view_files/", "127.0.0.1", 404, None),
        ("/../../etc/passwd", "127.0.0.1", 404, None),
        ("/", "evil.example", 404, None),
    ],
)
def test_it_answers_this_machine_with_the_page_and_nothing_else(
    server: Server, path: str, host: str, status: int, body: bytes | None
) -> None:
    assert server.server_address[0] == "127.0.0.1"
    link = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    link.request("GET", path, headers={"Host": f"{host}:{server.server_port}"})
    answer = link.getresponse()
    assert answer.status == status and (body is None or answer.read() == body)
    link.close()


def test_a_port_that_is_taken_is_one_line(server: Server) -> None:
    with pytest.raises(Exception, match=f"--port {server.server_port}: is taken; choose another"):
        Server(page.Page({"view.html": b""}), server.server_port)


def test_serving_ends_with_ctrl_c_and_leaves_nothing(trained: Path, shards: Path, tmp_path: Path) -> None:
    words = ["view", str(trained), "--data", str(shards), "--limit", "2", "--serve", "--device", "cpu"]
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from ugrl.cli import main; "
    done = subprocess.Popen(
        [sys.executable, "-c", f"{code}raise SystemExit(main({words!r}))"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.stdout is not None
    said = done.stdout.readline()
    found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)\n", said)
    assert found is not None, said + done.communicate()[1]
    link = HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
    link.request("GET", "/")
    assert b"<title>run</title>" in link.getresponse().read()
    link.close()
    done.send_signal(signal.SIGINT)
    assert done.wait(60) == 0 and list(tmp_path.iterdir()) == []
    done.communicate()


# -- a browser --------------------------------------------------------------------------------

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH: the page is looked at in a real browser")


def dom(url: str, tmp_path: Path) -> str:
    """The page as a browser has made it; nothing may stand in its console."""
    words = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    words += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,900"]
    done = subprocess.run(
        [*words, "--virtual-time-budget=4000", "--dump-dom", url], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr, [s for s in done.stderr.splitlines() if "CONSOLE" in s]
    return done.stdout


def listed(text: str) -> list[str]:
    return re.findall(r'<article class="card"[^>]*aria-label="([^"]+)"', text)


@browser
def test_a_browser_sorts_and_filters(both: Path, tmp_path: Path) -> None:
    photos = facts(both.read_text())["photographs"]
    text = dom(both.as_uri(), tmp_path)
    errors = {photo["id"]: photo["runs"][0]["error"] for photo in photos}
    found = [errors[id] for id in listed(text)]
    assert len(found) == 16 and found == sorted(found, reverse=True)
    text = dom(both.as_uri() + "#class=2&where=tags&sort=u", tmp_path)
    wanted = {photo["id"]: photo["runs"][0]["u"].get("2") for photo in photos if 2 in photo["tags"]}
    assert set(listed(text)) == set(wanted) and 0 < len(wanted) < 16
    values = [wanted[id] for id in listed(text) if wanted[id] is not None]
    assert values == sorted(values, reverse=True)
    assert f"{len(wanted)} of 16 photographs" in text and 'aria-pressed="true"' in text
    name = photos[3]["id"]
    assert listed(dom(f"{both.as_uri()}#find={name}", tmp_path)) == [name]


FRAMES = """<body><iframe id=a width=390 height=800 src="{0}"></iframe><iframe id=b width=1400 height=800 src="{0}">
</iframe><pre id=found></pre><script>
addEventListener("load", () => setTimeout(() => {{
  const told = [];
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, view = frame.contentWindow;
    const small = [...page.querySelectorAll("figcaption, .numbers, label, #legend *, p")];
    const key = (key, target = page.body) =>
      target.dispatchEvent(new view.KeyboardEvent("keydown", {{ key, bubbles: true }}));
    const wide = page.documentElement.scrollWidth;
    key("j"); key("j");
    const second = page.activeElement === page.querySelectorAll(".card")[1];
    key("Enter", page.activeElement);
    const large = page.querySelector("dialog"), first = large.querySelector("h2").textContent;
    key("ArrowRight");
    told.push([frame.width, wide, Math.min(...small.map((e) => parseFloat(view.getComputedStyle(e).fontSize))),
      page.querySelectorAll(".card:first-child img").length, second, large.open,
      first !== large.querySelector("h2").textContent,
      [...page.querySelectorAll(".card:first-child img")].filter((e) => !e.naturalWidth).length,
      page.querySelectorAll("#filters[open]").length, large.scrollWidth - large.clientWidth,
      Math.min(...[...page.querySelectorAll(".card:first-child .stack")].map((e) => e.clientWidth))].join(" "));
  }}
  document.getElementById("found").textContent = told.join(";");
}}, 500));
</script>"""


@browser
@pytest.mark.parametrize("kind", ["shown", "both", "apart"])
def test_a_browser_shows_the_page_on_a_phone_and_on_a_desk(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    frames = tmp_path / "frames.html"
    frames.write_text(FRAMES.format(request.getfixturevalue(kind).as_uri()))
    check_frames(dom(frames.as_uri(), tmp_path), images=19 if kind == "both" else 11)


def check_frames(text: str, images: int) -> None:
    found = re.search(r'<pre id="found">([^<]+)</pre>', text)
    assert found is not None
    for part, filters in zip(found[1].split(";"), (0, 1), strict=True):
        width, content, font, count, second, large, moved, missing, open, beyond, tile = part.split()
        assert int(content) <= int(width) and float(font) >= 13  # nothing moves sideways
        assert int(count) == images and missing == "0"
        assert (second, large, moved) == ("true", "true", "true") and int(open) == filters and int(beyond) <= 0
        assert int(tile) >= 150


@browser
def test_a_browser_takes_a_served_page(apart: Path, tmp_path: Path) -> None:
    files = {str(p.relative_to(apart.parent)): p.read_bytes() for p in (apart, *sorted(apart.parent.glob("*/*")))}
    with Server(page.Page({**files, "frames.html": FRAMES.format("/").encode()})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            check_frames(dom(f"{server.url}frames.html", tmp_path), images=11)
        finally:
            server.shutdown()
            thread.join()


# -- figures ----------------------------------------------------------------------------------


def test_figures_are_written_as_png_and_pdf(
    trained: Path, other: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["figures", str(trained), str(other), "--data", str(shards), "--out", str(tmp_path / "f")]
    assert main([*words, "--images", "3", "--device", "cpu"]) == 0
    assert {p.name for p in (tmp_path / "f").iterdir()} == {
        f"{name}.{suffix}" for name in figures.FIGURES for suffix in ("png", "pdf")
    }
    assert "not drawn" not in capsys.readouterr().err
    for file in (tmp_path / "f").glob("*.png"):
        pixels = np.asarray(Image.open(file).convert("L"))
        assert min(pixels.shape) > 200 and pixels.std() > 5
    assert all(p.read_bytes().startswith(b"%PDF") for p in (tmp_path / "f").glob("*.pdf"))


def test_what_cannot_be_drawn_is_said(run: Run) -> None:
    prototypes = run.got.prototypes
    kept = prototypes.prototypes_Cd.clone()
    try:
        prototypes.prototypes_Cd[1:] = 0
        found = figures.Found([run], ("background", *run.got.class_names), [{}])
        colours = palette("safe")
        assert figures.prototypes(found, colours) == "1 class has a prototype after step 3"
        assert figures.risk(found, colours) == "fewer than two (image, class) pairs have a mask and a known u"
        assert figures.scatter(found, colours) == "fewer than three class vectors"
        assert figures.cams(found, colours) == "no photograph has a tag"
    finally:
        prototypes.prototypes_Cd.copy_(kept)


def test_risk_falls_with_a_score_that_knows_the_error() -> None:
    rng = np.random.default_rng(0)
    risk_n = rng.random(200)
    best, blind = figures.risk_coverage(risk_n, risk_n), figures.risk_coverage(np.zeros(200), risk_n)
    assert (np.diff(best) > 0).all() and best[-1] == pytest.approx(risk_n.mean())
    assert blind == pytest.approx(np.full(200, risk_n.mean())) and best.mean() < blind.mean()


def test_directions_are_the_principal_ones() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 6)) * (9, 1, 4, 0.1, 0.1, 0.1)
    at, mean, two, share = figures.principal(x)
    assert at == pytest.approx((x - mean) @ two.T) and share.sum() > 0.9
    assert np.abs(two[0]).argmax() == 0 and np.abs(two[1]).argmax() == 2
    assert figures.principal(x[:1])[3].tolist() == [0, 0]
