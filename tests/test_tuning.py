"""`ugrl-tune` on real clusters: searches that are killed and resumed, final runs, workers, the dashboard, bad input."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from optuna.trial import TrialState
from rich.console import Console

from cluster.capacity import Capacity, Node
from tests.raycluster import kill_raylet, raylets, wait_for
from tests.searches import ENDED, SOUND, SPACE, check_whole, count, search_of, study_of, write_space
from tuning import cli
from tuning.run.placement import concurrent_trials, held
from tuning.space.search import Search
from tuning.study.record import read_trials
from tuning.study.search_folder import stored_search
from tuning.study.store import open_storage
from ugrl import config as configs
from ugrl.errors import ConfigError
from ugrl.train import checkpoint

pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where generated data go."""
    folder = tmp_path_factory.mktemp("tune")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("UGRL_DATA", str(folder / "data"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


def start(*words: str, log: Path | None = None) -> subprocess.Popen[bytes]:
    target = open(log, "ab") if log is not None else subprocess.DEVNULL  # noqa: SIM115
    return subprocess.Popen([sys.executable, "-m", "tuning.cli", *words], stdout=target, stderr=target)


# -- kills -------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.parametrize("storage", ["journal", pytest.param("sqlite:///study.db", marks=pytest.mark.long)])
def test_a_search_whose_driver_was_killed_is_resumed_to_its_budget(
    storage: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = home / f"killed-{storage[:6]}"
    again = 2 if storage == "journal" else 0  # final runs, once
    file = write_space(home / "killed.yaml", SPACE, storage=storage, final={"best": min(1, again), "seeds": 2})
    args = ["--space", str(file), "--out", str(out)]
    driver = start(*args)
    try:
        wait_for(lambda: count(out, storage, *ENDED) >= 1 or driver.poll() is not None)
        running = count(out, storage, TrialState.RUNNING)
    finally:
        driver.kill()
        driver.wait()
    before = study_of(out, storage)
    assert before is not None and 1 <= count(out, storage, *ENDED) < 5
    points = {t.number: t.params for t in before.get_trials() if t.state == TrialState.RUNNING}
    assert running and points

    assert cli.main(args) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*args, "--resume", "train.weight_decay=0.5"]) == 2
    assert "was started with overrides.train.weight_decay = None, not 0.5" in capsys.readouterr().err

    assert cli.main(["--out", str(out), "--resume"]) == 0
    shown = capsys.readouterr().err
    found = study_of(out, storage)
    assert found is not None
    hopeless = sum(t.params.get("train.global_batch") == 4096 for t in found.get_trials())
    study = check_whole(out, 5, storage, failed=hopeless)
    assert hopeless >= 1
    for number, point in points.items():  # what was running went on with the same parameters
        # It may have been killed between two of them.
        assert point.items() <= study.get_trials()[number].params.items()
    failed = study.get_trials(states=(TrialState.FAIL,))
    assert all("do not fill one global batch of 4096" in t.user_attrs["error"] for t in failed)
    assert "do not fill one global batch of 4096" in shown

    if again:
        finals = optuna.load_study(study_name=study.study_name + ":final", storage=open_storage(storage, out))
        assert [t.state for t in finals.get_trials()] == [TrialState.COMPLETE] * again
        for trial in finals.get_trials():
            (run,) = trial.user_attrs["runs"].values()
            assert 0 <= run["final"]["seg_miou"] <= 1 and run["ended"]
        assert {t.params["seed"] for t in finals.get_trials()} == {1000, 1001}

    best = configs.load(out / "best.yaml")
    chosen = max(study.get_trials(states=(TrialState.COMPLETE,)), key=lambda t: t.value)
    assert best.data.val_split == "val" and best.train.lr == chosen.params["train.lr"]
    with (out / "trials.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [int(r["number"]) for r in rows] == list(range(5))
    for name in ("report.html", "report.md", "plots/history.png"):
        assert (out / name).stat().st_size > 1000

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.connect.start_ray", None)  # nothing is left to run: nobody needs a cluster
        assert cli.main(["--out", str(out), "--resume", "--quiet"]) == 0
    check_whole(out, 5, storage, failed=len(failed))


def trial_processes(root: int) -> list[int]:
    """Processes of trials among the descendants of a process."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            if "ray::trial" in " ".join(process.cmdline()) or "ImplicitFunc" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.ray
@pytest.mark.long
def test_a_trial_whose_process_is_killed_goes_on_and_counts_once(home: Path) -> None:
    out = home / "worker"
    file = write_space(home / "worker.yaml", SOUND, trials=3, scheduler={"name": "none"}, concurrent=1)
    log = home / "worker.log"
    driver = start("--space", str(file), "--out", str(out), log=log)
    try:
        wait_for(lambda: driver.poll() is not None or _curve(out, 0))
        (pid,) = trial_processes(driver.pid)
        os.kill(pid, signal.SIGKILL)
        assert driver.wait(400) == 0
    finally:
        driver.kill()
    check_whole(out, 3)
    assert "trial 0: its process died; it goes on from its checkpoint" in log.read_text()


def _curve(out: Path, number: int) -> list:
    found = study_of(out)
    trials = found.get_trials(deepcopy=False) if found is not None else []
    runs = trials[number].user_attrs.get("runs", {}) if trials else {}
    return next(iter(runs.values()), {}).get("curve", [])


@pytest.mark.ray
@pytest.mark.full
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("storage", ["journal", "sqlite:///study.db"])
def test_a_search_survives_five_kills_at_random_moments(storage: str, home: Path) -> None:
    """Driver, trial, node, in random order and at random moments; a driver is started again by the same command."""
    import random

    chance = random.Random(storage)
    kinds = ["driver", "driver", "trial", "node", chance.choice(["driver", "trial", "node"])]
    chance.shuffle(kinds)
    out, log = home / f"chaos-{storage[:6]}", home / f"chaos-{storage[:6]}.log"
    file = write_space(home / "chaos.yaml", SOUND, trials=24, storage=storage, repeats={"seeds": 2}, max_failures=10)
    with raylets(2) as made:
        words = ["--space", str(file), "--out", str(out), "--resume", "--address", made.address]
        driver = start(*words, log=log)
        try:
            for kind in kinds:
                ended = count(out, storage, *ENDED)
                wait_for(lambda: driver.poll() is not None or count(out, storage, *ENDED) > ended)  # noqa: B023
                time.sleep(chance.uniform(0, 2))
                assert driver.poll() is None, log.read_text()
                if kind == "driver":
                    driver.kill()
                    driver.wait()
                    driver = start(*words, log=log)
                elif kind == "trial":
                    wait_for(lambda: trial_processes(os.getpid()))
                    os.kill(chance.choice(trial_processes(os.getpid())), signal.SIGKILL)
                else:
                    kill_raylet(made.nodes.pop())
                    made.nodes.append(made.add_node(num_cpus=1, object_store_memory=100 * 2**20))
            assert driver.wait(600) == 0, log.read_text()
        finally:
            driver.kill()
    check_whole(out, 24, storage)


@pytest.mark.ray
@pytest.mark.long
def test_two_drivers_on_one_cluster_share_it(home: Path) -> None:
    """Neither claims what it has no room for, or holds what the other one waits for; a third leaves while it waits."""
    out = home / "one-cluster"
    file = write_space(home / "one.yaml", SOUND, trials=4, scheduler={"name": "none"}, final={"best": 1, "seeds": 2})
    words = ["--space", str(file), "--out", str(out), "--resume"]
    logs = [home / f"one-{k}.log" for k in range(3)]
    with raylets(1, cpus=2) as made:
        words += ["--address", made.address]
        drivers = [start(*words, log=log) for log in logs[:2]]
        try:
            # Whoever finds all trials taken waits, and says so; a third one has come to wait alone.
            wait_for(
                lambda: count(out, "journal", TrialState.RUNNING) == 2 or any(d.poll() is not None for d in drivers)
            )
            drivers.append(start(*words, log=logs[2]))
            wait_for(lambda: "no room for one now" in logs[2].read_text() or drivers[2].poll() is not None)
            drivers[2].send_signal(signal.SIGTERM)
            assert drivers[2].wait(300) in (143, 0), logs[2].read_text()
            assert [d.wait(500) for d in drivers[:2]] == [0, 0], [log.read_text() for log in logs]
        finally:
            for driver in drivers:
                driver.kill()
    study = check_whole(out, 4)
    assert all(t.state == TrialState.COMPLETE for t in study.get_trials())
    finals = optuna.load_study(study_name=study.study_name + ":final", storage=open_storage("journal", out))
    assert [t.state for t in finals.get_trials()] == [TrialState.COMPLETE] * 2


@pytest.mark.ray
@pytest.mark.full
@pytest.mark.timeout(900)
def test_two_drivers_with_a_ray_of_their_own_share_a_search_and_its_final_runs(home: Path) -> None:
    """Both begin the same new search at the same moment; a third takes the place of one that is killed."""
    out = home / "shared"
    file = write_space(
        home / "shared.yaml",
        SOUND,
        trials=10,
        concurrent=1,
        scheduler={"name": "none"},
        final={"best": 2, "seeds": 2},
    )
    words = ["--space", str(file), "--out", str(out), "--resume"]
    logs = [home / f"shared-{k}.log" for k in range(3)]
    drivers = [start(*words, log=log) for log in logs[:2]]
    try:
        wait_for(lambda: count(out, "journal", *ENDED) >= 3 or any(d.poll() is not None for d in drivers), 120)
        drivers[0].kill()
        drivers[0].wait()
        drivers.append(start(*words, log=logs[2]))
        assert [d.wait(300) for d in drivers[1:]] == [0, 0], [log.read_text() for log in logs]
    finally:
        for driver in drivers:
            driver.kill()
    study = check_whole(out, 10)
    assert all(t.state == TrialState.COMPLETE for t in study.get_trials())
    assert len({t.user_attrs["driver"] for t in study.get_trials()}) >= 2
    finals = optuna.load_study(study_name=study.study_name + ":final", storage=open_storage("journal", out))
    assert [t.state for t in finals.get_trials()] == [TrialState.COMPLETE] * 4
    made = {(t.params["candidate"], t.params["seed"]) for t in finals.get_trials()}
    assert len(made) == 4 and {seed for _, seed in made} == {1000, 1001}


# -- what else runs -------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.long
def test_a_trial_of_two_workers_is_measured_like_one_of_one(home: Path) -> None:
    values = {}
    with raylets(1, cpus=2) as made:
        for workers in (1, 2):
            out = home / f"workers-{workers}"
            file = write_space(
                home / "workers.yaml",
                SOUND,
                first=[{"train.global_batch": 8, "train.lr": 1e-3}],
                trials=1,
                workers=workers,
                scheduler={"name": "none"},
                final={"every": True},
                constraints={"step_s": 60, "gflop": 50},
            )
            words = ["--space", str(file), "--out", str(out), "--quiet", "--address", made.address]
            words += ["cluster.cpus_per_worker=0.5", "cluster.data_cpus=0.5", "train.dtype=float64"]
            assert cli.main(words) == 0
            study = check_whole(out, 1)
            (run,) = study.get_trials()[0].user_attrs["runs"].values()
            values[workers] = (run["value"], run["final"]["seg_miou"], run["final"]["tag_map"])
            assert run["metrics"]["step_s"] > 0 and run["metrics"]["memory_gb"] > 0
            assert 0.001 < run["metrics"]["gflop"] < 10
            assert study.get_trials()[0].user_attrs["held"]["cpus"] == 1.0  # one CPU, or two halves
    assert values[2] == pytest.approx(values[1], abs=1e-6)


@contextmanager
def dashboard(out: Path) -> Iterator[Callable[[str], Any]]:
    """optuna-dashboard serving a search's journal; yields a function that asks it for a path."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ask(path: str) -> Any:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return json.loads(answer.read()) if path.startswith("/api") else answer.status
        except OSError:
            return None

    board = subprocess.Popen(
        [str(Path(sys.executable).parent / "optuna-dashboard"), str(out / "study.journal")]
        + ["--port", str(port), "--host", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: ask("/dashboard/") == 200)
        yield ask
    finally:
        board.kill()


@pytest.mark.ray
@pytest.mark.long
def test_a_search_is_watched_then_told_to_leave_then_resumed(home: Path) -> None:
    """The dashboard serves it while it runs; after SIGTERM its trials leave with a checkpoint."""
    pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")
    out, log = home / "asked", home / "asked.log"
    file = write_space(home / "asked.yaml", SOUND, trials=12, scheduler={"name": "none"})
    driver = start("--space", str(file), "--out", str(out), log=log)
    try:
        wait_for(lambda: driver.poll() is not None or (out / "study.journal").is_file())
        with dashboard(out) as ask:
            wait_for(lambda: driver.poll() is not None or _curve(out, 0))
            (summary,) = ask("/api/studies")["study_summaries"]
            assert summary["study_name"] == "ugrl"
            shown = ask(f"/api/studies/{summary['study_id']}?after=0")
            assert len(shown["trials"]) == 12
            assert any(t["intermediate_values"] for t in shown["trials"])
            assert driver.poll() is None, "the search had ended before the dashboard answered"
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(300) == 143
    finally:
        driver.kill()
    study = study_of(out)
    assert study is not None
    assert not study.get_trials(states=(TrialState.RUNNING,)) and len(study.get_trials()) == 12
    assert study.get_trials(states=(TrialState.WAITING,))
    said = log.read_text()
    assert "continue with: ugrl-tune --out" in said and f"ugrl-tune report {out}" in said
    # 9 steps, and no checkpoint before the last one: what is there was written by the stop.
    left = [
        checkpoint.read_state(p) for p in out.glob("trials/*/seed_*/checkpoints/step_*") if p.name < "step_00000009"
    ]
    assert left and not list(out.rglob("owner/*.json"))
    for run in {p.parent for p in out.glob("trials/*/seed_*/metrics.jsonl")}:  # in no slot a step was lost
        steps = [json.loads(text)["step"] for text in (run / "metrics.jsonl").read_text().splitlines()]
        saved = checkpoint.latest(run)
        assert not steps or (saved is not None and checkpoint.read_state(saved).step >= steps[-1]), run
    assert cli.main(["--out", str(out), "--resume", "--quiet"]) == 0
    check_whole(out, 12)


@pytest.fixture
def ended(home: Path) -> Path:
    """A search that has ended: what the first test of this module leaves, or one that is run for who runs alone."""
    out = home / "killed-journa"
    if not out.is_dir():
        file = write_space(home / "killed.yaml", SPACE)
        assert cli.main(["--space", str(file), "--out", str(out), "--quiet"]) == 0
    return out


@pytest.mark.ray
def test_a_report_is_written_from_the_storage_alone(
    ended: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ended
    (out / "report.html").unlink()
    assert cli.main(["report", str(out)]) == 0
    assert (out / "report.html").is_file()
    assert cli.main(["report", str(home / "nothing")]) == 2
    assert "holds no search; expected space.yaml and base.yaml in it" in capsys.readouterr().err


# -- refusals -------------------------------------------------------------------------------------------


def test_trials_side_by_side_are_what_fits(tmp_path: Path) -> None:
    def fits(have: Capacity, **changes: Any) -> int:
        return concurrent_trials(search_of(SPACE, tmp_path, **changes), have)

    assert fits(Capacity(2, 0, 2)) == 2
    # Two half CPUs a run, and one for reading data.
    assert fits(Capacity(2, 0, 2), workers=2) == 1
    assert fits(Capacity(4, 0, 4), workers=2) == 3
    gpus = Capacity(32, 5, 16, (Node("a", 16, 4), Node("b", 16, 1)))
    assert fits(gpus) == 5
    # A fraction lies on one GPU: two of 0.4 on each, not twelve on five.
    assert fits(gpus, resources={"cpus_per_trial": 1, "gpus_per_trial": 0.4}) == 10
    assert fits(gpus, resources={"cpus_per_trial": 4, "gpus_per_trial": 0.25}) == 8
    assert fits(gpus, resources={"cpus_per_trial": 1, "gpus_per_trial": 2}) == 2
    assert held(search_of(SPACE, tmp_path), gpus) == (4.0, 1.0)
    assert held(search_of(SPACE, tmp_path, resources={"gpus_per_trial": 0.5}), Capacity(8, 1, 8)) == (4.0, 0.5)
    assert held(search_of(SPACE, tmp_path), Capacity(8, 0, 8)) == (1.0, 0.0)
    with pytest.raises(ConfigError, match="3 concurrent trials × 1 CPU; the cluster has 2 CPUs: at most 2 fit"):
        fits(Capacity(2, 0, 2), concurrent=3)
    with pytest.raises(ConfigError, match=r"a trial takes 1 CPU and 1 GPU; the cluster has 2 CPUs"):
        fits(Capacity(2, 0, 2), resources={"gpus_per_trial": 1})
    search = search_of(SPACE, tmp_path)
    asked = replace(search.base, cluster=replace(search.base.cluster, gpus_per_worker=1.0))
    with pytest.raises(ConfigError, match=r"a trial takes 1 CPU and 1 GPU; the cluster has 2 CPUs"):
        concurrent_trials(replace(search, base=asked), Capacity(2, 0, 2))
    with pytest.raises(ConfigError, match=r"2 runs × 2 workers × 0.5 CPU \+ 1 for reading data = 3 CPUs"):
        fits(Capacity(2, 0, 2), concurrent=2, workers=2)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--space", "shaeps"], "did you mean 'shapes'?"),
        (["train.stpes=3"], "did you mean 'train.steps'?"),
        (["--trials", "0"], "'trials' is 0; expected an integer ≥ 1"),
        (["--space", "voc"], "no shards"),
        (["eval.cam=false", "--space", "WRONG"], "objective 'cam_miou': split 'tune_val' does not measure it"),
        (["--space", "UNTOUCHED"], "no split 'test'; expected one of train, tune_val, val"),
        (["--storage", "study.db"], "expected journal or a URL"),
        (["--warm-start", "nowhere"], "holds no search"),
        (["--dry-run", "--step-s", "0"], "--step-s is 0; expected a number > 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    words: list[str], text: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "WRONG": write_space(home / "wrong.yaml", SPACE, objective="cam_miou"),
        "UNTOUCHED": write_space(home / "untouched.yaml", SPACE, final={"best": 1, "split": "test"}),
    }
    words = [str(files.get(w, w)) for w in words]
    assert cli.main([*words, "--out", str(home / "refused")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert text in error[-1]
    assert error[-1].startswith("error: ")
    assert not (home / "refused").exists()


@pytest.mark.ray
@pytest.mark.long
def test_resources_that_are_not_there_are_said_at_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_space(home / "large.yaml", SOUND, resources={"cpus_per_trial": 64})
    assert cli.main(["--space", str(file), "--out", str(home / "large")]) == 2
    shown = capsys.readouterr().err
    assert "a trial takes 64 CPU; the cluster has" in shown
    assert "warning: split 'tune_val' steers the search with 6 images" in shown
    assert not (home / "large").exists()


@pytest.mark.ray
def test_a_folder_holds_one_search(ended: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ended
    other = write_space(home / "other.yaml", SOUND)
    assert cli.main(["--space", str(other), "--out", str(out), "--resume"]) == 2
    assert "a search is resumed as it was" in capsys.readouterr().err
    (home / "file").write_text("")
    assert cli.main(["--space", str(other), "--out", str(home / "file")]) == 2
    assert "is a file; expected a folder" in capsys.readouterr().err
    (home / "stranger").mkdir()
    (home / "stranger" / "notes.txt").write_text("")
    assert cli.main(["--space", str(other), "--out", str(home / "stranger"), "--resume"]) == 2
    assert "holds no search to resume; expected space.yaml in it" in capsys.readouterr().err


def test_a_search_that_another_driver_is_beginning_is_joined(home: Path) -> None:
    (home / "begun").mkdir()
    (home / "begun" / "base.yaml").write_text("")  # the space file comes last
    file = write_space(home / "begun.yaml", SOUND)
    words = cli.build_parser().parse_args(["--space", str(file), "--out", str(home / "begun"), "--resume"])
    assert cli.plan_search(words, Console(quiet=True)).out == home / "begun"
    (home / "begun" / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match="holds no search to resume"):
        cli.plan_search(words, Console(quiet=True))


@pytest.mark.ray
@pytest.mark.long
def test_a_search_whose_trials_all_fail_alike_stops_and_quotes_the_error(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {
        **SOUND,
        "search": {"train.global_batch": {"choice": [2048, 4096]}, "train.lr": {"loguniform": [1e-4, 1e-2]}},
    }
    file = write_space(home / "hopeless.yaml", tree, trials=30)
    out = home / "hopeless"
    assert cli.main(["--space", str(file), "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "trials in a row failed alike, and none has worked: 34 training rows do not fill one global batch" in error
    assert 3 <= count(out, "journal", TrialState.FAIL) <= 5
    assert not count(out, "journal", TrialState.RUNNING)


def test_a_dry_run_needs_no_data_and_leaves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--space", "voc", "--dry-run", "--step-s", "0.1", "model.backbone=tiny", "model.weights=null"]
    assert cli.main([*words, "data.crop=64"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "method.uncertainty.alpha [1, 50] log" in shown
    assert "rungs at 6000, 18000 of 20000 steps, 1 in 3 goes on" in shown
    assert "with --step-s: 0.1 s a step, 33 min a run without validations" in shown
    assert "side by side:" in shown and "first suggestions" in shown
    assert not list(tmp_path.iterdir())


def test_a_bare_command_names_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "coco, coco100, corners, fig7, shapes, table3, table4, voc" in shown


@pytest.mark.ray
def test_what_a_search_was_is_read_back(ended: Path) -> None:
    out = ended
    search, study = stored_search(out)
    assert isinstance(search, Search) and search.objective == "seg_miou"
    rows = read_trials(study, search.objectives)
    assert len(rows) == 5 and yaml.safe_load((out / "space.yaml").read_text())["budget"]["trials"] == 5
