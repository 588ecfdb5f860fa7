"""`ray job submit` of the documented commands, on a cluster with a token that is started on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from cluster import cli as train_cli
from tests.test_deploy import DEPLOY, ROOT, tool
from tests.test_slurm import MARK, PATIENCE, TINY
from tuning import cli as tune_cli
from ugrl.train import checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
# Of each run of the search. And how long a job may take, in seconds, beside other loads.
STEPS, JOB_S = 80, 900


def commands(path: Path) -> list[list[str]]:
    """Every `ray job submit` in the code blocks of a document, as words."""
    blocks = re.findall(r"^```sh\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("ray job submit")]


def documented(program: str) -> list[str]:
    (words,) = [w for w in commands(DEPLOY / "README.md") if program in w]
    return words


@pytest.mark.parametrize("path", [ROOT / "docs" / "cluster.md", DEPLOY / "README.md"], ids=["docs", "deploy"])
def test_the_documented_commands_are_ones_that_the_programs_take(path: Path) -> None:
    found = commands(path)
    assert found
    for words in found:
        options, (program, *rest) = words[: words.index("--")], words[words.index("--") + 1 :]
        for name in options[1:]:
            assert not name.endswith(".yaml") or (ROOT / name).is_file(), name
        parser = {"ugrl-train": train_cli.build_parser, "ugrl-tune": tune_cli.build_parser}[program]()
        args = parser.parse_intermixed_args(rest)
        assert Path(args.out).is_absolute() and Path(args.data).is_absolute()


class Cluster:
    """A head with a token of its own; its processes carry a mark and are ended by their ids."""

    def __init__(self, home: Path) -> None:
        self.home, self.mark = home, uuid.uuid4().hex
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            for each in (a, b, c):
                each.bind(("", 0))
            gcs, board, client = (each.getsockname()[1] for each in (a, b, c))
        self.address = f"http://127.0.0.1:{board}"
        self.token = home / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(uuid.uuid4().hex)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "UGRL_"))}
        self.env = clean | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(home),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
        }
        words = ["--head", "--block", f"--port={gcs}", f"--dashboard-port={board}", "--num-cpus=4", "--num-gpus=0"]
        words += [f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0"]
        words += [f"--temp-dir={home}/ray", "--object-store-memory=200000000"]
        self.log = (home / "head.log").open("w")
        self.head = subprocess.Popen(
            [tool("ray"), "start", *words], env=self.env, stdout=self.log, stderr=self.log, cwd=home
        )

    def answers(self) -> bool:
        """Whether the dashboard listens."""
        try:
            socket.create_connection(("127.0.0.1", int(self.address.rpartition(":")[2])), timeout=1).close()
        except OSError:
            return False
        return "block forever" in (self.home / "head.log").read_text()

    def stop(self) -> None:
        """SIGTERM to what was started, then SIGKILL to what carries the mark."""
        self.head.terminate()
        try:
            self.head.wait(30)
        except subprocess.TimeoutExpired:
            pass
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue
        self.head.wait()
        self.log.close()

    def ray(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A command of Ray's, as a user of the cluster gives it in a checkout."""
        command = [tool("ray"), *words]
        return subprocess.run(
            command, env=self.env | env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=JOB_S
        )

    def submit(self, words: list[str], shared: Path, *, name: str, wait: bool = True) -> str:
        """A documented command with this cluster's address, a folder for /shared, and two workers."""
        swap = {"http://127.0.0.1:8265": self.address, "8": "2"}
        words = [swap.get(w, w).replace("/shared", str(shared)) for w in words]
        assert words[:3] == ["ray", "job", "submit"]
        options = ["--submission-id", name, *([] if wait else ["--no-wait"])]
        done = self.ray("job", "submit", *options, *words[3:])
        assert wait or done.returncode == 0, done.stderr + done.stdout
        return f"{done.returncode}\n{done.stdout}"

    def status(self, name: str) -> str:
        """RUNNING, SUCCEEDED, …"""
        said = self.ray("job", "status", "--address", self.address, name)
        found = re.search(r"Status for job '\S+': (\w+)|Job '\S+' (?:was )?(succeeded|failed|stopped)", said.stdout)
        assert found, said.stdout + said.stderr
        return (found.group(1) or found.group(2)).upper()

    def logs(self, name: str) -> str:
        return self.ray("job", "logs", "--address", self.address, name).stdout

    def until(self, seen: Callable[[], object], name: str) -> None:
        """Waits for something that a job does."""
        deadline = time.monotonic() + JOB_S
        while not seen():
            assert time.monotonic() < deadline, self.logs(name)
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    home = Path(tempfile.mkdtemp(dir="/tmp", prefix="j"))  # Ray's sockets need a short path
    made = Cluster(home)
    try:
        deadline = time.monotonic() + PATIENCE
        while not made.answers():
            assert made.head.poll() is None and time.monotonic() < deadline, (home / "head.log").read_text()
            time.sleep(0.2)
        yield made
    finally:
        made.stop()
        shutil.rmtree(home, ignore_errors=True)


def test_a_call_without_the_right_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("wrong")
    words = ["job", "submit", "--address", cluster.address, "--", "true"]
    said = cluster.ray(*words, RAY_AUTH_TOKEN_PATH=str(tmp_path / "wrong"))
    assert said.returncode != 0 and "Invalid authentication token" in said.stderr.splitlines()[-3]
    none = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": ""}
    said = cluster.ray(*words, **none)
    assert said.returncode != 0 and "Missing authentication token" in said.stderr
    assert "raysubmit" not in cluster.ray("job", "list", "--address", cluster.address).stdout


@pytest.fixture
def shared(shards: Path, tmp_path: Path) -> Path:
    """What /shared of the documented commands stands for."""
    shutil.copytree(shards, tmp_path / "shards" / "voc")
    return tmp_path


def small_train() -> list[str]:
    """The documented training, of generated data for a few steps."""
    words = documented("ugrl-train")
    words[words.index("voc")] = "shapes"
    return [*words, *(f"{k}={v}" for k, v in TINY.items())]


def small_search() -> list[str]:
    """The documented search in the space that fits two cores, of one trial."""
    words = documented("ugrl-tune")
    at = words.index("tuning/voc.yaml")
    words[at] = "tuning/shapes.yaml"
    searched = yaml.safe_load((ROOT / words[at]).read_text())["search"]
    small = {**TINY, "train.steps": STEPS, "train.eval_every": STEPS}
    return [*words, "--trials", "1", *(f"{k}={v}" for k, v in small.items() if k not in searched)]


def logged(run: Path) -> list[int]:
    """Steps whose losses a run has logged; a validation is a line of its own."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "val/seg_miou" not in line]


def stop(cluster: Cluster, name: str, run: Path) -> int:
    """Stops a job once a run of it has a checkpoint, and gives the step that the run was left with."""
    cluster.until(lambda: checkpoint.latest(run) is not None, name)
    began = time.monotonic()
    said = cluster.ray("job", "stop", "--address", cluster.address, name)
    assert said.returncode == 0, said.stdout + said.stderr
    assert cluster.status(name) == "STOPPED"
    step = checkpoint.read_state(checkpoint.find(run)).step
    # Ray kills after the time that the runtime environment gives; it left by itself, and after a whole checkpoint.
    assert re.search(r"interrupted.*continue with:\s+ugrl-t", cluster.logs(name), re.DOTALL)
    assert 0 < step < TINY["train.steps"], cluster.logs(name)
    lost = max(0, logged(run)[-1] - step)
    print(f"{name}: STOPPED after {time.monotonic() - began:.1f} s, {lost} steps lost at step {step}")
    assert lost == 0
    return step


@pytest.mark.long
def test_a_search_that_was_stopped_continues_with_the_same_command(cluster: Cluster, shared: Path) -> None:
    # As it stands, for GPUs that are not here; but for weights that a hub would have to give.
    refused = [*(w.replace("voc-search", "refused") for w in documented("ugrl-tune")), "model.weights=null"]
    code, _, text = cluster.submit(refused, shared, name="refused").partition("\n")
    assert code == "1"
    assert "error: " in text and "the cluster has 4 CPUs" in text
    assert not (shared / "runs" / "refused").exists()

    search = shared / "runs" / "voc-search"
    cluster.submit(small_search(), shared, name="search", wait=False)
    cluster.until(lambda: list(search.glob("trials/000/seed_*")), "search")
    (run,) = search.glob("trials/000/seed_*")
    stopped = stop(cluster, "search", run)
    cluster.submit(small_search(), shared, name="again", wait=False)
    cluster.until(lambda: cluster.status("again") not in ("RUNNING", "PENDING"), "again")
    assert cluster.status("again") == "SUCCEEDED", cluster.logs("again")
    steps = logged(run)
    assert steps == sorted(set(steps)) and steps[0] <= stopped  # it went on
    assert "voc-search: 1 trials" in cluster.logs("again")
    assert yaml.safe_load((search / "best.yaml").read_text())["train"]["steps"] == STEPS
    assert len((search / "trials.csv").read_text().splitlines()) == 2


@pytest.mark.long
def test_a_job_that_was_stopped_continues_with_the_same_command(cluster: Cluster, shared: Path) -> None:
    run = shared / "runs" / "voc"
    cluster.submit(small_train(), shared, name="first", wait=False)
    stopped = stop(cluster, "first", run)
    code, _, text = cluster.submit(small_train(), shared, name="second").partition("\n")
    assert code == "0", text
    # The job's own lines, while it ran.
    assert f"run: {run}" in text and "validation" in text
    assert checkpoint.read_state(checkpoint.find(run)).step == TINY["train.steps"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[0] <= stopped and steps[-1] == TINY["train.steps"]
