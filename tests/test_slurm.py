"""The Slurm script with stand-ins for srun and scontrol that really start the processes: two nodes on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.test_deploy import DEPLOY, tool
from ugrl.train import checkpoint

pytestmark = pytest.mark.ray

SCRIPT = DEPLOY / "slurm" / "train.sbatch"
MARK = "UGRL_TEST_MARK"
PATIENCE = 240

# Like srun: one task for each node, signals forwarded, the worst status. A node's name may say that it fails.
SRUN = """\
import os, signal, subprocess, sys, time
words, options = sys.argv[1:], {}
while words[0].startswith("--"):
    name, _, value = words.pop(0)[2:].partition("=")
    options[name] = value
hosts = options["nodelist"].split(",")
assert int(options["nodes"]) == int(options["ntasks"]) == len(hosts) and int(options["cpus-per-task"]) > 0, options
tasks = []
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
for host in hosts:
    local = {"SLURMD_NODENAME": host, "UGRL_RAY_TMP": os.environ["HOME"] + "/" + host}
    command = {"broken": ["false"], "silent": ["sleep", "300"]}.get(host, words)
    tasks.append(subprocess.Popen(command, env=os.environ | local))
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """\
#!/bin/sh
case "$1 $2" in
"show hostnames") echo "$3" | tr , '\\n' ;;
"show job") echo "   StartTime=2020-01-01T00:00:00 EndTime=$TEST_END Deadline=N/A" ;;
requeue*) echo "$2" >>"$HOME/requeued" ;;
*) exit 1 ;;
esac
"""
# A driver that says what it sees, and takes its time to leave.
DRIVER = """\
import json, os, signal, sys, time
import ray
ray.init(log_to_driver=False)
token = os.environ["RAY_AUTH_TOKEN_PATH"]
seen = {"cpus": ray.cluster_resources()["CPU"], "nodes": len(ray.nodes()), "mode": oct(os.stat(token).st_mode & 0o777)}
json.dump(seen, open(sys.argv[1], "w"))
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
while not stop:
    time.sleep(0.1)
time.sleep(2)
open(sys.argv[2], "w").write("saved")
sys.exit(7)
"""


class Slurm:
    """A job's environment, and its processes on this machine."""

    def __init__(self, home: Path) -> None:
        self.home, self.mark = home, uuid.uuid4().hex
        (home / "bin").mkdir()
        for name, text in (("srun", f"#!{sys.executable}\n{SRUN}"), ("scontrol", SCONTROL)):
            (home / "bin" / name).write_text(text)
            (home / "bin" / name).chmod(0o755)

    def start(self, *command: str, nodes: str = "n1,n2", left_s: float = 120, **env: str) -> subprocess.Popen[str]:
        """The batch script as Slurm starts it; the time limit is ``left_s`` away."""
        ends = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + left_s))
        given = {
            "PATH": f"{self.home}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "TEST_END": ends,
            MARK: self.mark,
            "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": nodes,
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_MEM_PER_NODE": "600",
        }
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RAY_", "UGRL_"))}
        with (self.home / "log").open("a") as log:
            words = ["bash", str(SCRIPT), *command]
            return subprocess.Popen(words, env=clean | given | env, stdout=log, stderr=log, text=True)

    @property
    def log(self) -> str:
        """What the job printed."""
        return (self.home / "log").read_text()

    def until(self, seen: Callable[[], object], job: subprocess.Popen[str]) -> None:
        """Waits for something that a running job does."""
        deadline = time.monotonic() + PATIENCE
        while not seen():
            assert job.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.2)

    def pids(self) -> list[int]:
        """Processes that the job started and that still run."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def left_behind(self) -> list[str]:
        """Processes and files that a job should have taken with it."""
        deadline = time.monotonic() + 30
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.2)
        files = [p for p in (*self.home.glob("n*/*"), *self.home.glob(".ugrl/*/token"))]
        return [str(p) for p in (*self.pids(), *files)]


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    home = Path(tempfile.mkdtemp(dir="/tmp", prefix="s"))  # Ray's sockets need a short path
    made = Slurm(home)
    yield made
    for pid in made.pids():
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(home, ignore_errors=True)


def test_the_script_is_clean_to_its_linter() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    done = subprocess.run([tool("shellcheck"), str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    directives = re.findall(r"^#SBATCH (\S+)", SCRIPT.read_text(), re.MULTILINE)
    assert "--signal=B:TERM@180" in directives and "--requeue" in directives
    code = [s for s in SCRIPT.read_text().splitlines() if not s.startswith("#")]
    assert not any("ray stop" in line for line in code)  # it would end every Ray process on the host


@pytest.mark.parametrize(
    ("command", "env", "said"),
    [
        ([], {}, "no command; expected for example: sbatch train.sbatch ugrl-train"),
        (["no-such-program"], {}, "'no-such-program' is not on PATH; submit from an activated environment"),
        (["true"], {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set; start this file with sbatch"),
    ],
)
def test_what_cannot_start_is_one_line(slurm: Slurm, command: list[str], env: dict[str, str], said: str) -> None:
    assert slurm.start(*command, **env).wait(PATIENCE) == 1
    assert slurm.log.count("\n") == 1 and said in slurm.log
    assert slurm.left_behind() == []


@pytest.mark.parametrize(
    ("nodes", "patience", "said"),
    [
        pytest.param(
            "n1,silent",
            "4",
            r"[01] of 2 nodes joined within 4 s \(.*\)\n.*not all nodes are there: see .*/ray-\*\.log",
            marks=pytest.mark.full,
        ),
        ("n1,broken", "900", r"ray start ended before all nodes had joined: see .*/ray-\*\.log"),
    ],
)
def test_a_node_that_does_not_join_ends_the_job_with_the_reason(
    slurm: Slurm, nodes: str, patience: str, said: str
) -> None:
    assert slurm.start("true", nodes=nodes, UGRL_JOIN_S=patience).wait(PATIENCE) == 1
    assert re.search(said, slurm.log), slurm.log
    assert [p for p in slurm.left_behind() if not p.startswith(f"{slurm.home}/n1/")] == []  # but for Ray's logs


def test_the_time_limit_reaches_the_command_which_may_finish_what_it_does(slurm: Slurm) -> None:
    driver, seen, saved = (slurm.home / name for name in ("driver.py", "seen.json", "saved"))
    driver.write_text(DRIVER)
    job = slurm.start("python", str(driver), str(seen), str(saved))
    slurm.until(lambda: seen.exists() and seen.read_text().endswith("}"), job)
    assert json.loads(seen.read_text()) == {"cpus": 2.0, "nodes": 2, "mode": "0o600"}
    job.terminate()
    assert job.wait(PATIENCE) == 7, slurm.log
    assert saved.read_text() == "saved"
    assert (slurm.home / "requeued").read_text() == "77\n"
    assert slurm.left_behind() == []


@pytest.mark.full
def test_a_training_job_is_stopped_requeued_and_ends(slurm: Slurm) -> None:
    run, words = slurm.home / "run", [f"{k}={v}" for k, v in TINY.items()]
    command = ("ugrl-train", "--config", "shapes", "--workers", "2", "--out", str(run), *words)
    data = {"UGRL_DATA": str(slurm.home / "data")}
    job = slurm.start(*command, left_s=7200, **data)
    slurm.until(lambda: checkpoint.latest(run) is not None, job)
    job.terminate()
    assert job.wait(PATIENCE) != 0
    assert not (slurm.home / "requeued").exists()  # hours are left: this was `scancel`, or pre-emption
    stopped = checkpoint.read_state(checkpoint.find(run)).step
    assert 0 < stopped < TINY["train.steps"], slurm.log
    assert slurm.left_behind() == []

    # As Slurm starts it again: the same words, and the count of restarts.
    assert slurm.start(*command, **data, SLURM_RESTART_COUNT="1").wait(PATIENCE) == 0, slurm.log
    assert checkpoint.read_state(checkpoint.find(run)).step == TINY["train.steps"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == TINY["train.steps"]  # continued, not started over
    assert slurm.left_behind() == []


# Long enough to be stopped in the middle.
TINY: dict[str, int] = {
    "data.crop": 32,
    "data.shapes.train": 40,
    "data.shapes.val": 6,
    "data.shapes.size": 32,
    "data.threads": 1,
    "train.steps": 160,
    "train.global_batch": 4,
    "train.lr_warmup_iters": 2,
    "train.cls_warmup_iters": 6,
    "train.eval_every": 160,
    "train.checkpoint_every": 8,
    "train.picture_every": 1000,
    "train.log_every": 4,
    "method.uncertainty.d_cls": 64,
    "method.contrast.d_seg": 32,
}
