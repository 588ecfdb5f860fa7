"""The tables of docs/finding.md from results whose values are known."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import finding
from bench import finding_stats as stats
from bench.finding_tables import TELLS
from bench.real_measure import image_counts
from tests.reference_metrics import ref_auroc
from ugrl.eval.metrics import Confusion
from ugrl.method.calibrate import Mixture
from ugrl.seeding import generator


def labels(seed: str, wrong: float, n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Truth of some images, and a prediction of which a share is wrong."""
    g = generator("finding labels", seed)
    truth = g.choice([0, 0, 1, 2, 3, 255], (n, 8, 9))
    other = (truth + 1) % 4
    guess = np.where(
        generator("finding wrong", seed).random(truth.shape) < wrong, other, np.where(truth == 255, 0, truth)
    )
    return torch.from_numpy(guess), torch.from_numpy(truth)


def result(arm: str, seed: int, wrong: float, has_u: bool = True) -> dict[str, Any]:
    """As ``bench.real_measure`` writes it."""
    guess, truth = labels(str(seed), wrong)
    counts = image_counts([f"i{k}" for k in range(12)], guess, truth, 4)
    g = generator("finding pairs", arm, seed)
    iou = g.random(20)
    noise = g.normal(0, 0.3, 20)
    pairs = {
        "image": [k // 2 for k in range(20)],
        "iou": [None, *iou[1:].tolist()],
        "p": g.random(20).tolist(),
        **{name: (1 - iou + noise).tolist() if has_u else [None] * 20 for name in TELLS},
    }
    found = Confusion(4)
    found.add(guess, truth)
    scores = {
        "seg_val": found.miou,
        "pseudo_train": found.miou,
        "tag_map": 0.8,
        "pixel_conf_fg": 0.6,
        "pixel_conf_bg": 0.7,
    }
    return {
        "scores": {**scores, "u_auroc_val": None},
        "images": {"seg_val": counts, "pseudo_train": counts},
        "pairs": {"train": pairs, "val": pairs},
    }


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Two seeds of three arms; one file is compressed."""
    for arm, wrong in (("Base", 0.5), ("IV", 0.3), ("Full", 0.1)):
        for seed in (0, 1):
            tree = json.dumps(result(arm, seed, wrong, has_u=arm != "Full"))
            (tmp_path / f"{arm}-{seed}.json").write_text(tree)
    raw = (tmp_path / "IV-1.json").read_bytes()
    (tmp_path / "IV-1.json").unlink()
    (tmp_path / "IV-1.json.gz").write_bytes(gzip.compress(raw))
    return tmp_path


def test_counts_give_the_mean_iou_again(stored: Path) -> None:
    found = stats.read_all(stored)
    assert {arm: sorted(runs) for arm, runs in found.items()} == {arm: [0, 1] for arm in ("Base", "Full", "IV")}
    for runs in found.values():
        for run in runs.values():
            assert stats.miou(run.counts["seg_val"], np.ones((1, 12))) == pytest.approx(
                run.scores["seg_val"], abs=1e-12
            )
    guess, truth = labels("0", 0.5)
    twice = Confusion(4)
    twice.add(torch.cat([guess, guess[:1]]), torch.cat([truth, truth[:1]]))
    weight = np.stack([np.ones(12), [2.0, *[1.0] * 11]])
    want = [found["Base"][0].scores["seg_val"], twice.miou]
    assert stats.miou(found["Base"][0].counts["seg_val"], weight) == pytest.approx(want, abs=1e-12)


def test_areas_are_those_of_loops_with_ties_and_weights() -> None:
    g = generator("finding auroc")
    score, bad = g.integers(0, 5, 30).astype(float), g.random(30) < 0.4
    weight = g.integers(0, 3, 30)
    again = [(s, b) for s, b, w in zip(score, bad, weight, strict=True) for _ in range(w)]
    want = ref_auroc([s for s, _ in again], [b for _, b in again])
    both = stats.auroc(score, bad, np.stack([np.ones(30), weight.astype(float)]))
    assert both == pytest.approx([ref_auroc(score, bad), want], abs=1e-12)


def test_differences_are_paired(stored: Path) -> None:
    found = stats.read_all(stored)
    gap = stats.against(found, "seg_val", "Base")["IV"]
    values = [found["IV"][s].scores["seg_val"] - found["Base"][s].scores["seg_val"] for s in (0, 1)]
    assert gap.mean == pytest.approx(sum(values) / 2) and gap.low < gap.mean < gap.high and gap.seeds == 2
    assert gap.low > 0 and gap.p == pytest.approx(2 / stats.DRAWS)
    # Paired with itself there is nothing: no draw of images or seeds makes a difference.
    same = stats.against({"A": found["IV"], "Base": found["IV"]}, "seg_val", "Base")["A"]
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 2)


def test_what_tells_is_that_of_loops(stored: Path) -> None:
    found = stats.read_all(stored)
    got = stats.tells(found["IV"], "val", "margin")
    assert got is not None and stats.tells(found["Full"], "val", "margin") is None
    areas, gaps = [], []
    for run in found["IV"].values():
        pairs = {name: values[1:] for name, values in run.pairs["val"].items()}  # the first has no IoU
        bad = pairs["iou"] < np.median(pairs["iou"])
        areas.append(ref_auroc(pairs["margin"], bad))
        gaps.append(areas[-1] - ref_auroc(-pairs["p"], bad))
    assert got[0] == pytest.approx(np.mean(areas), abs=1e-12) and got[1].mean == pytest.approx(np.mean(gaps), abs=1e-12)


def test_the_calibration_error_is_that_of_loops(stored: Path) -> None:
    runs = stats.read_all(stored)["IV"]
    errors = []
    for run in runs.values():
        rows = {
            split: sorted(zip(-pairs["p"][1:], pairs["iou"][1:], strict=True)) for split, pairs in run.pairs.items()
        }
        median = np.median([iou for _, iou in rows["train"]])
        edges = np.quantile([score for score, _ in rows["train"]], [k / 10 for k in range(1, 10)])
        gaps = []
        for low, high in zip([-np.inf, *edges], [*edges, np.inf], strict=True):
            bad = {s: [iou < median for score, iou in rows[s] if low < score <= high] for s in rows}
            gaps += [abs(np.mean(bad["train"]) - np.mean(bad["val"]))] * len(bad["val"])
        errors.append(np.mean(gaps))
    assert stats.calibration_error(runs, "p") == pytest.approx(np.mean(errors), abs=1e-12)
    # Here train is val: each tenth has the share that it had.
    assert errors == [0, 0]
    for run in runs.values():
        run.pairs["val"]["p"] = run.pairs["val"]["p"][::-1].copy()
    assert stats.calibration_error(runs, "p") > 0
    assert stats.calibration_error(stats.read_all(stored)["Full"], "p") is None


def test_doubts_are_mixed_as_a_run_mixes_them() -> None:
    g = generator("finding doubts")
    pairs = {
        split: {"margin_shown": g.normal(1, 0.1, 30), "decoder": g.random(30), "p": g.random(30)}
        for split in ("train", "val")
    }
    pairs["train"]["decoder"][3] = np.nan
    found = stats.with_doubts(pairs)
    for name, weights in (("mixed", {"classifier": 0.5}), ("all", {"classifier": 1 / 3, "decoder": 1 / 3})):
        mixture = Mixture(weights, 1, 0.99).double()
        both = {}
        for split, columns in pairs.items():
            doubts = {"classifier": -np.log(columns["p"] / (1 - columns["p"])), "decoder": columns["decoder"]}
            u, doubts = torch.from_numpy(columns["margin_shown"]), {k: torch.from_numpy(x) for k, x in doubts.items()}
            if split == "train":
                mixture.update(u, u > -1, doubts)
            both[split] = mixture(u, u > -1, doubts).numpy()
        here = np.isfinite(found["val"][name])
        assert here.all()
        # Another scale, the same order.
        np.testing.assert_allclose(np.corrcoef(found["val"][name], both["val"])[0, 1], 1, rtol=1e-2)
        assert name == "all" or (np.argsort(found["val"][name]) == np.argsort(both["val"])).all()


def test_the_report_has_all_tables(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finding.main(["--results", str(stored), "--out", str(stored / "out" / "tables.md")]) == 0
    said, text = capsys.readouterr().out, (stored / "out" / "tables.md").read_text()
    assert text.strip() == said.strip()
    for title in ("Scores", "Differences to Base", "Differences to IV", "What tells bad pairs", "Risk and coverage"):
        assert f"### {title}" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block
    assert "Power: the paired differences" in text


def cells(table: str, row: str) -> dict[str, str]:
    """A row of a table in Markdown, by column."""
    lines = [[c.strip() for c in line.strip("| ").split("|")] for line in table.splitlines()]
    return dict(zip(lines[0], next(line for line in lines if line[0] == row), strict=True))


def test_a_row_is_an_arm_and_a_column_a_score(stored: Path) -> None:
    found = finding.read_arms(stored)
    tables = {block[2:].split(" |")[0]: block for block in finding.report(stored).split("\n\n") if block[:1] == "|"}
    for split in ("train", "val"):
        for name, text in {**TELLS, "p": "1 − p"}.items():
            told = stats.tells(found["IV"], split, name)
            assert told is not None
            assert cells(tables[f"AUROC for pairs, {split}"], "IV")[text] == f"{100 * told[0]:.1f}"
            if name != "p":
                assert cells(tables[f"AUROC − that of 1 − p, {split}"], "IV")[text] == str(told[1])
    # Of the 40 % that 1 − p trusts most, by hand.
    trusted = []
    for run in found["IV"].values():
        p, iou = (run.pairs["val"][name][np.isfinite(run.pairs["val"]["iou"])] for name in ("p", "iou"))
        trusted.append(100 * float(iou[p >= np.sort(p)[-round(0.4 * len(p))]].mean()))
    assert cells(tables["40 % of the pairs"], "IV")["1 − p"].startswith(f"{np.mean(trusted):.1f} ±")
    # What a run of an arm lacks is a dash, what none has is no column, and an arm without any is no row.
    assert "| Full |" not in tables["AUROC for pairs, val"]
    tree = json.loads((stored / "Base-0.json").read_text())
    tree["pairs"]["val"]["decoder"] = [None] * 20
    (stored / "Base-0.json").write_text(json.dumps(tree))
    (block,) = [b for b in finding.report(stored).split("\n\n") if b.startswith("| AUROC for pairs, val")]
    assert cells(block, "Base")["the decoder's doubt"] == "–" != cells(block, "IV")["the decoder's doubt"]
    assert list(cells(tables["AUROC for pixels, foreground"], "Full"))[1:] == ["confidence of the label"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"images": 3}', '{"images": {"a": {"b": [[0]]}}, "pairs": {}, "scores": {}}']
)
def test_a_file_that_is_no_result_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "IV-0.json").write_text(text)
    assert finding.main(["--results", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and "IV-0.json" in errors[0]


def test_arms_without_the_baseline_have_a_report_too(stored: Path) -> None:
    for file in stored.glob("Base-*"):
        file.unlink()
    text = finding.report(stored)
    assert "| IV | 2 |" in text and "Power: no arm has two seeds yet." in text


def test_smaller_experiments_have_tables_of_their_own(tmp_path: Path) -> None:
    for folder, names in (
        ("one_at_a_time", ("no-weights-0", "no-contrast-0")),
        ("transfer", ("Base+crop192-0", "IV-decoder+crop192-0", "IV-decoder+scratch-0")),
        ("few", ("Base+few-0", "IV-decoder+few-0")),
        ("shapes", ("Base-0", "IV-decoder-0")),
        ("over_time", ("IV-decoder@100-0", "IV-decoder-0")),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            tree = {**result(name, 0, 0.2 if "decoder" in name else 0.4), "step": 100 if "@" in name else 400}
            (tmp_path / folder / f"{name}.json").write_text(json.dumps(tree))
    main = tmp_path / "finding"
    assert "Scores" not in (alone := finding.report(main)) and "| crop192 |" in alone
    main.mkdir()
    (main / "IV-decoder-0.json").write_text(json.dumps(result("IV-decoder", 0, 0.2)))
    text = finding.report(main)
    parts = dict(part.split("\n\n", 1) for part in text.split("### ")[1:])
    one = parts["One thing at a time"]
    assert "IV-decoder" in one.splitlines()[0] and "| no-weights | 1 | -" in one and "| no-contrast | 1 | -" in one
    # An arm without its baseline has nothing to be compared with.
    (row,) = [line for line in parts["Transfer"].splitlines() if line.startswith("| crop192")]
    seg = {
        name: 100 * stats.read(tmp_path / "transfer" / f"{name}+crop192-0.json").scores["seg_val"]
        for name in ("Base", "IV-decoder")
    }
    assert (
        f"| IV-decoder | 1 | {seg['Base']:.1f} | {seg['IV-decoder']:.1f} | {seg['IV-decoder'] - seg['Base']:+.1f}"
        in row
    )
    few = parts["With few photographs"]
    assert "| IV-decoder+few | 1 | +" in few and "− Base+few" in few and "− IV-doubts+few" not in few
    assert "| IV-decoder | 1 | +" in parts["On shapes"] and "| AUROC for pairs, val |" in parts["On shapes"]
    over = parts["Over training time"]
    assert over.count("| step 100 | step 400 |") == 6 and "| 1 − p |" in over and "| the run's own u |" in over


def test_one_thing_at_a_time_is_paired_with_the_default_of_either_table(tmp_path: Path) -> None:
    """The part's own run of a seed; where it has none, that of the main table, which is the same run."""
    for folder, arm, seed, wrong in (
        ("finding", "IV-decoder", 0, 0.1),
        ("finding", "IV-decoder", 1, 0.2),
        ("one_at_a_time", "IV-decoder", 0, 0.3),
        ("one_at_a_time", "no-contrast", 0, 0.5),
        ("one_at_a_time", "no-contrast", 1, 0.5),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{arm}-{seed}.json").write_text(json.dumps(result(arm, seed, wrong)))
    block = finding.report(tmp_path / "finding").partition("### One thing at a time\n\n")[2]
    row = list(cells(block, "no-contrast").values())
    miou = {(seed, wrong): result("", seed, wrong)["scores"]["seg_val"] for seed in (0, 1) for wrong in (0.2, 0.3, 0.5)}
    mean = 50 * (miou[0, 0.5] - miou[0, 0.3] + miou[1, 0.5] - miou[1, 0.2])
    assert row[1] == "2" and row[2].startswith(f"{mean:+.1f} (")


def test_a_search_has_a_table_of_its_trials(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "number,state,step,seg_miou,seg_miou.stderr,seeds,tag_map,collapsed,final.seg_miou,method.contrast.tau,"
        "method.contrast.keep,seconds\n"
        "0,COMPLETE,100,0.2345,,1,0.8,0,0.25,0.1,0.35,60.5\n"
        "1,COMPLETE,100,0.01,,1,0.7,1,,1,0.05,60.5\n2,FAIL,20,,,1,,,,0.03,0.8,9\n"
        "3,COMPLETE,100,0.2,,1,,0,,0.03,0.05,60.5\n4,COMPLETE,100,0.25,,1,,0,,1,0.8,60.5\n"
    )
    # As ugrl-tune and bench.real lay them out under runs.
    main, file = stored / "finding" / "results", stored / "corners" / "trials.csv"
    for folder in (main, file.parent):
        folder.mkdir(parents=True)
    for result_file in stored.glob("*.json*"):
        result_file.rename(main / result_file.name)
    file.write_text(text)
    block = finding.report(main).partition("### Corners of the search space\n\n")[2]
    rows = {number: list(cells(block, number).values())[1:] for number in "012"}
    assert rows["0"] == ["complete", "100", "23.4", "25.0", "80.0", "0.1", "0.35"]
    assert rows["1"] == ["complete †", "100", "1.0", "–", "70.0", "1", "0.05"]
    assert rows["2"] == ["fail", "20", "–", "–", "–", "0.03", "0.8"]
    # Trial 0 lies within, trial 2 has no score.
    ends = block[block.index("| axis |") :]
    assert list(cells(ends, "tau").values())[1:] == ["0.03", "1", "20.0", "13.0", "-7.0"]
    assert list(cells(ends, "keep").values())[1:] == ["0.05", "0.8", "10.5", "25.0", "+14.5"]
    file.write_text("number,state,step,method.uncertainty.kind,method.contrast.tau\n7,WAITING,,margin,\n")
    search = stored / "search" / "trials.csv"
    search.parent.mkdir()
    file.rename(search)
    waiting = finding.report(main).partition("### A search\n\n")[2]
    assert list(cells(waiting, "7").values())[1:] == ["waiting", "", "margin", "–"]
    for broken in ("", "number,state\n1\n", text.replace(",1,0.05", ",much,0.05"), text.replace("0.2345", "much")):
        file.write_text(broken)
        assert finding.main(["--results", str(main)]) == 2
        assert "trials.csv" in capsys.readouterr().err


def test_a_folder_without_results_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (None, "notes.json"):
        if name:
            (tmp_path / name).write_text("{}")
        assert finding.main(["--results", str(tmp_path)]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_page_shows_the_tables_of_the_stored_results() -> None:
    page = (Path(__file__).parents[1] / "docs" / "finding.md").read_text(encoding="utf-8")
    assert finding.with_tables(page, finding.report(finding.STORED)) == page


def test_a_page_without_marks_is_one_line(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stored / "page.md").write_text("# no marks\n")
    assert finding.main(["--results", str(stored), "--page", str(stored / "page.md")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
